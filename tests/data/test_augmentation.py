"""Augmentation: the same for all frames of a clip, a function of its seed, and soft targets that say what was mixed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F
from torchvision.transforms import v2
from video_files import write_video

from atfr.data.clips import ClipSettings, TrainClips
from atfr.data.loader import TrainSampler, train_loader
from atfr.data.mixup import mixing
from atfr.data.transforms import TrainTransform
from atfr.data.types import Video

OPTIONS = {
    "randaugment": {"randaugment": (2, 15)},
    "color_jitter": {"color_jitter": (0.4, 0.4, 0.4, 0.2)},
    "erasing": {"erasing": 1.0},
    "all": {"randaugment": (1, 9), "color_jitter": (0.3, 0.3, 0.3, 0.1), "erasing": 0.5, "scale": (0.3, 1.0)},
}


def noise(frames):
    return torch.randint(0, 256, (frames, 3, 40, 52), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def augmented(clip, seed, **options):
    transform = TrainTransform(crop_size=32, short_side=(40, 40), fill=(100, 110, 120), **options)
    return transform(clip, short_side=40, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_frame_of_a_clip_is_treated_the_same(name):
    """A frame that is in a clip twice comes out the same; each comes out as it would alone, unless the clip is measured."""
    clip, changed, as_alone = noise(3), 0, 0
    for seed in range(24):
        together = augmented(torch.cat([clip, clip[:1]]), seed, **OPTIONS[name])
        assert together.shape == (3, 4, 32, 32) and together.dtype == torch.uint8 and type(together) is torch.Tensor
        assert torch.equal(together[:, 0], together[:, 3])
        together = together[:, :3]
        alone = torch.cat([augmented(frame[None], seed, **OPTIONS[name]) for frame in clip], dim=1)
        as_alone += bool((together.int() - alone.int()).abs().max() <= 3)  # of 255
        plain = {"scale": OPTIONS[name]["scale"]} if "scale" in OPTIONS[name] else {}
        changed += not torch.equal(together, augmented(clip, seed, **plain))
    assert changed >= 16, "augmentation that does nothing"
    assert as_alone >= 10


@pytest.mark.parametrize("operation", ["AutoContrast", "Equalize", "Contrast"])
def test_what_measures_the_picture_measures_the_whole_clip(operation):
    """Against Pillow, or the formula, on all frames as one picture; measured frame by frame it is another one."""
    dark = torch.linspace(20, 220, 3).view(3, 1, 1, 1)
    clip = (noise(3) * 0.1 + dark).to(torch.uint8)  # frames of very different brightness
    only = v2.RandAugment(1, 15)
    only._AUGMENTATION_SPACE = {operation: only._AUGMENTATION_SPACE[operation]}
    transform = TrainTransform(crop_size=40, short_side=(40, 40), flip=0)
    transform.augment = v2.Compose([v2.CenterCrop(40), only])
    out = transform(clip, short_side=40, rng=np.random.default_rng(0)).transpose(0, 1)  # [T, C, H, W]
    cropped = clip[..., 6:46]
    tall = Image.fromarray(cropped.permute(0, 2, 3, 1).reshape(3 * 40, 40, 3).numpy())
    if operation == "Contrast":
        strengths = [1 + sign * 0.9 * 15 / 30 for sign in (1, -1)]
        candidates = [ImageEnhance.Contrast(tall).enhance(strength) for strength in strengths]
    else:
        candidates = [ImageOps.autocontrast(tall) if operation == "AutoContrast" else ImageOps.equalize(tall)]
    expected = [torch.from_numpy(np.asarray(item).copy()).view(3, 40, 40, 3).permute(0, 3, 1, 2) for item in candidates]
    assert min((out.int() - item.int()).abs().max() for item in expected) <= 1
    assert not torch.equal(out, cropped)


def test_erasing_fills_one_rectangle_with_the_given_colour():
    for seed in range(20):
        plain, erased = augmented(noise(3), seed), augmented(noise(3), seed, erasing=1.0)
        filled = (erased == torch.tensor([100, 110, 120], dtype=torch.uint8)[:, None, None, None]).all(dim=0)  # [T, H, W]
        assert torch.equal(filled[0], filled[1]) and torch.equal(filled[0], filled[2])
        rows, columns = filled[0].any(dim=1).nonzero(), filled[0].any(dim=0).nonzero()
        height, width = (len(found) for found in (rows, columns))
        assert filled[0].sum() == height * width and 0.01 < height * width / 32**2 < 0.36
        assert torch.equal(plain[:, ~filled], erased[:, ~filled])


def test_augmented_clips_are_the_same_for_any_number_of_workers_and_ranks(tmp_path):
    videos = [Video(write_video(tmp_path / f"{label}.avi", 20), label) for label in range(4)]
    gray = [0.5, 0.5, 0.5]
    clip = ClipSettings(
        frames=4, stride=2, crop_size=24, train_short_side=[24, 32], test_short_side=32, mean=gray, std=gray,
        randaugment=[2, 9], color_jitter=[0.4, 0.4, 0.4, 0.1], erasing=0.5, train_scale=[0.5, 1.0],
    )  # fmt: skip

    def by_video(workers, world=1):
        found = {}
        for rank in range(world):
            sampler = TrainSampler(4, seed=0, global_batch=4, rank=rank, world=world)
            sampler.set_epoch(3)
            for batch in train_loader(TrainClips(videos, clip, seed=0), sampler=sampler, workers=workers, timeout_s=60):
                found.update(zip(batch.videos.tolist(), batch.clips))
        return found

    expected = by_video(0)
    assert sorted(expected) == [0, 1, 2, 3]
    for other in (by_video(1), by_video(2), by_video(0, world=2)):
        assert other.keys() == expected.keys() and all(torch.equal(other[video], expected[video]) for video in expected)


# ---- mixup and cutmix

CLIPS = torch.randn(6, 3, 4, 12, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 2, 2, 0])
PARTNER = [3, 4, 5, 0, 1, 2]


def test_mixup_blends_each_clip_with_the_one_half_a_batch_away_as_its_targets_say():
    shares = set()
    for step in range(5):
        clips, targets = mixing(mixup=0.8, cutmix=None, num_classes=3, seed=0)(CLIPS, LABELS, step)
        share = targets[0, 0].item()  # of clip 0, the rest is that of clip 3
        shares.add(share)
        for i, j in enumerate(PARTNER):
            torch.testing.assert_close(clips[i], share * CLIPS[i] + (1 - share) * CLIPS[j])
            torch.testing.assert_close(targets[i], share * F.one_hot(LABELS[i], 3) + (1 - share) * F.one_hot(LABELS[j], 3))
    assert len(shares) == 5


def test_cutmix_pastes_the_same_rectangle_into_all_frames_as_its_targets_say():
    for step in range(10):
        clips, targets = mixing(mixup=None, cutmix=1, num_classes=3, seed=0)(CLIPS, LABELS, step)
        for i, j in enumerate(PARTNER):
            pasted = (clips[i] != CLIPS[i]).flatten(0, 1)  # [C x T, H, W]
            assert torch.equal(pasted, pasted[:1].expand_as(pasted))
            assert torch.equal(clips[i], torch.where(pasted[0], CLIPS[j], CLIPS[i]))
            rows, columns = pasted[0].any(dim=1).sum(), pasted[0].any(dim=0).sum()
            assert pasted[0].sum() == rows * columns
            share = 1 - pasted[0].float().mean()
            torch.testing.assert_close(targets[i], share * F.one_hot(LABELS[i], 3) + (1 - share) * F.one_hot(LABELS[j], 3))


def test_mixed_clips_are_the_same_for_any_number_of_processes():
    clips, labels = torch.randn(12, 3, 2, 8, 8), torch.arange(12)
    mix = mixing(mixup=0.8, cutmix=1.0, num_classes=12, seed=0)
    for step, world in itertools.product(range(6), (2, 3, 6)):
        together, targets = mix(clips, labels, step)
        for rank in range(world):
            own, own_targets = mix(clips[rank::world].contiguous(), labels[rank::world], step)
            assert torch.equal(own, together[rank::world]) and torch.equal(own_targets, targets[rank::world])


def test_an_odd_share_of_the_batch_is_refused():
    with pytest.raises(ValueError, match="and 5 is odd: choose a trainer.batch_size"):
        mixing(mixup=0.8, cutmix=None, num_classes=3, seed=0)(CLIPS[:5], LABELS[:5], 0)


def test_the_loss_of_mixed_clips_is_the_mean_of_both_labels_losses_by_their_shares():
    _, targets = mixing(mixup=0.8, cutmix=None, num_classes=3, seed=0)(CLIPS, LABELS, 0)
    share, logits = targets[0, 0].item(), torch.randn(6, 3)
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = share * loss(logits, LABELS) + (1 - share) * loss(logits, LABELS.roll(3))
    torch.testing.assert_close(loss(logits, targets), expected)


def test_mixing_depends_on_seed_and_step_alone_and_takes_either_way_where_both_are_on():
    state = torch.get_rng_state()
    mix = mixing(mixup=0.8, cutmix=1.0, num_classes=3, seed=0)
    blended = []
    for step in range(30):
        clips, targets = mix(CLIPS, LABELS, step)
        again, _ = mixing(mixup=0.8, cutmix=1.0, num_classes=3, seed=0)(CLIPS, LABELS, step)
        assert torch.equal(clips, again) and type(clips) is torch.Tensor
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        blended.append(bool(((clips[1] != CLIPS[1]) & (clips[1] != CLIPS[4])).any()))
    assert 5 < sum(blended) < 25
    other = mixing(mixup=0.8, cutmix=1.0, num_classes=3, seed=1)
    assert any(not torch.equal(other(CLIPS, LABELS, step)[0], mix(CLIPS, LABELS, step)[0]) for step in range(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert mixing(mixup=None, cutmix=None, num_classes=3, seed=0) is None
