"""The six datasets with a few generated videos each, in the layouts and files in which they are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from video_files import write_video

HEADER = "label,youtube_id,time_start,time_end,split\n"


def miniature(dataset: str, root: Path) -> list[str]:
    """Write a miniature of the dataset with two classes; the overrides that it needs."""
    classes = {"kinetics400": _kinetics400, "kinetics600": _kinetics600, "mini_kinetics": _mini_kinetics}
    classes |= {"something_something_v2": _something_something_v2, "ucf101": _ucf101, "hmdb51": _hmdb51}
    classes[dataset](root)
    return [f"dataset={dataset}", f"dataset.root={root}", "dataset.num_classes=2"]


def _videos(root: Path, names: list[str]) -> None:
    source = root / f"source{Path(names[0]).suffix}"
    root.mkdir(exist_ok=True)
    write_video(source, 20, codec={".webm": "libvpx-vp9", ".mp4": "libx264"}.get(source.suffix, "mpeg4"))
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / name)
    source.unlink()


def _kinetics400(root: Path) -> None:
    """Class folders, and one listed video in each list that is gone."""
    for split, count in (("train", 3), ("val", 2)):
        rows = [(label, f"{split[0]}{label[:2]}-{i}_", i, 10 + i) for label in ("air drumming", "abseiling") for i in range(count)]
        _videos(root, [f"{split}/{label}/{video}_{start:06d}_{end:06d}.mp4" for label, video, start, end in rows])
        (root / f"{split}.csv").write_text(HEADER + "".join(f'"{a}",{b},{c},{d},{split}\n' for a, b, c, d in [*rows, ("abseiling", "gone", 1, 11)]))


def _kinetics600(root: Path) -> None:
    """No class folders."""
    for split, count in (("train", 3), ("val", 2)):
        rows = [(label, f"{label[0]}{split}{i}", i, 10 + i) for label in ("backflip (human)", "zumba") for i in range(count)]
        _videos(root, [f"{split}/{video}_{start:06d}_{end:06d}.mp4" for _, video, start, end in rows])
        (root / f"{split}.csv").write_text(HEADER + "".join(f"{a},{b},{c},{d},{split}\n" for a, b, c, d in rows))


def _mini_kinetics(root: Path) -> None:
    """All of the Kinetics-400 above but the first training video."""
    _kinetics400(root)
    for split in ("train", "val"):
        ids = [line.split(",")[1] for line in (root / f"{split}.csv").read_text().splitlines()[1:]]
        (root / f"{split}_ytid_list.txt").write_text("\n".join(ids[split == "train" :]) + "\n")


def _something_something_v2(root: Path) -> None:
    labels = {"Closing something": "0", "Putting something into something": "1"}
    templates = ["Closing [something]", "Putting [something] into [something]"]
    (root / "labels").mkdir(parents=True)
    (root / "labels/labels.json").write_text(json.dumps(labels))
    for split, first, count in (("train", 100, 6), ("validation", 7, 4)):
        entries = [{"id": str(first + i), "label": "x", "template": templates[i % 2], "placeholders": ["x"]} for i in range(count)]
        (root / f"labels/{split}.json").write_text(json.dumps(entries))
        _videos(root, [f"20bn-something-something-v2/{entry['id']}.webm" for entry in entries])


def _ucf101(root: Path) -> None:
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "classInd.txt").write_bytes(b"1 ApplyEyeMakeup\r\n2 Archery\r\n")
    groups = {name: [f"{name}/v_{name}_g{group:02d}_c01.avi" for group in range(1, 7)] for name in ("ApplyEyeMakeup", "Archery")}
    _videos(root, [f"UCF-101/{video}" for videos in groups.values() for video in videos])
    for split in (1, 2, 3):
        test = [video for videos in groups.values() for video in videos[2 * split - 2 : 2 * split]]
        train = [f"{video} {i}" for i, videos in enumerate(groups.values(), start=1) for video in videos if video not in test]
        (lists / f"testlist0{split}.txt").write_bytes("".join(f"{video}\r\n" for video in test).encode())
        (lists / f"trainlist0{split}.txt").write_bytes("".join(f"{line}\r\n" for line in train).encode())


def _hmdb51(root: Path) -> None:
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    names = ["#20_Rhythm_[NEW]_{}_u_nm_0.avi", "Tom & Jerry!_{}_f_cm_1.avi", "(Rad)_{}_2.avi", "x_{}_3.avi", "y_{}_4.avi"]
    for class_name in ("climb", "climb_stairs"):
        videos = [name.format(class_name) for name in names]
        _videos(root, [f"videos/{class_name}/{video}" for video in videos])
        for split in (1, 2, 3):
            parts = "11220"[split:] + "11220"[:split]
            (lists / f"{class_name}_test_split{split}.txt").write_text("".join(f"{video} {part} \n" for video, part in zip(videos, parts)))
