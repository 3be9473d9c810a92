"""Overrides for a training of seconds on few videos of any dataset."""

SMALL = (
    "model=x3d_sgs",
    "model.size=tiny",
    "model.sgs.width=0.5",
    "dataset.clip.frames=8",
    "dataset.clip.crop_size=32",
    "dataset.clip.train_short_side=[32,40]",
    "dataset.clip.test_short_side=32",
    "dataset.clip.views=2",
    "trainer.batch_size=4",
    "trainer.epochs=1",
    "trainer.workers=0",
    "trainer.statistics_clips=0",
    "trainer.tensorboard_pictures=0",
    "trainer.examples=0",
)
