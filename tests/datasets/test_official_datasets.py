"""Training and testing on the six datasets: miniatures in their official layouts, and real clips where there are some."""

from __future__ import annotations

import json

import pytest
from miniatures import miniature
from run_tools import run_tool
from small_training import SMALL

DATASETS = ("kinetics400", "kinetics600", "mini_kinetics", "something_something_v2", "ucf101", "hmdb51")


def trained(folder, *overrides):
    """The results of a training on few videos, and what it printed."""
    outcome = run_tool("train", *overrides, *SMALL, f"trainer.output_dir={folder}")
    assert outcome.code == 0, outcome.err
    return json.loads((folder / "results.json").read_text()), outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
def test_each_dataset_trains_and_tests_on_a_miniature_in_its_official_layout(tmp_path, dataset):
    root, run = tmp_path / "data", tmp_path / "run"
    results, printed = trained(run, *miniature(dataset, root))
    protocol = results["protocol"]
    crops = 3 if "kinetics" in dataset else 1
    assert results["num_videos"] == 4 and results["num_views"] == 4 * 2 * crops and results["failed"] == []
    assert protocol["dataset"] == dataset
    if dataset in ("ucf101", "hmdb51"):
        assert protocol["official_split"] == 1 and "missing" not in protocol
    elif dataset == "something_something_v2":
        assert protocol["sampling"] == "segments" and protocol["stride"] is None
    else:
        gone = 0 if dataset == "kinetics600" else 1
        assert protocol["missing"] == {"train": gone, "test": gone}
        assert protocol["videos"] == {"train": 5 if dataset == "mini_kinetics" else 6, "test": 4}
    if dataset == "kinetics400":
        video = str(root / "val/abseiling/gone_000001_000011.mp4")
        assert f"kinetics400: 1 of the 5 test videos are not there and left out ({video}); {run}/missing_test.txt names them all" in printed
        assert (run / "missing_test.txt").read_text() == f"{video}\n" and (run / "missing_train.txt").exists()
    if dataset == "mini_kinetics":
        files = [str(root / f"{split}_ytid_list.txt") for split in ("train", "val")]
        assert protocol["subset"] == {"by": "videos", "files": files, "not_in_kinetics": {"train": 0, "test": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("dataset,train,test", [("ucf101", 2, 17), ("hmdb51", 2, 1), ("kinetics400", 7, 7), ("something_something_v2", 3, 2)])
def test_real_clips_of_four_datasets_train_and_test_with_the_official_lists(tmp_path, test_data, dataset, train, test):
    lists, root = test_data / "annotations" / dataset, test_data / "videos" / dataset
    own = [f"dataset.annotations={lists}", "dataset.videos=."]
    if dataset == "kinetics400":  # all of them are validation videos
        own = [f"dataset.{split}={lists}/kinetics-400_val.csv" for split in ("train", "test")]
    elif dataset == "something_something_v2":  # their ids are not known, so they take others of their class
        videos = sorted(root.glob("*/*.webm"))
        files = {"labels": "labels", "train": "train_excerpt", "test": "validation"}
        own = ["dataset.videos=.", *(f"dataset.{key}={lists}/{file}.json" for key, file in files.items())]
        for split, chosen in (("train_excerpt", videos[:1] + videos[-2:]), ("validation", videos[1:3])):
            entries = json.loads((lists / f"{split}.json").read_text())
            for number, video in enumerate(chosen):
                ids = [entry["id"] for entry in entries if entry["template"].replace("[", "").replace("]", "") == video.parent.name]
                (tmp_path / f"{ids[number]}.webm").symlink_to(video)
        root = tmp_path
    results, _ = trained(tmp_path / "run", f"dataset={dataset}", f"dataset.root={root}", "dataset.allow_missing=true", *own)
    assert results["protocol"]["videos"] == {"train": train, "test": test}
    assert results["num_videos"] == test and results["failed"] == []
