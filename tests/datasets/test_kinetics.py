"""Kinetics and mini-Kinetics from official lists and from lists of paths, in every layout of the videos."""

from __future__ import annotations

from pathlib import Path

import pytest
from list_files import K400, listed, touch, write

from atfr.data.datasets.kinetics import kinetics, locate, read_segments
from atfr.data.datasets.mini_kinetics import mini_kinetics

LAYOUTS = {
    "class folders": (
        "val/abseiling/0wR5jVB-WPk_000417_000427.mp4",
        "val/air drumming/-5ScotRN_I4_000001_000011.mp4",
        "val/massaging person's head/x_y_000000_000010.mp4",
    ),
    "underscores": (
        "val/abseiling/0wR5jVB-WPk_000417_000427.mp4",
        "val/air_drumming/-5ScotRN_I4_000001_000011.mp4",
        "val/massaging_person's_head/x_y_000000_000010.mp4",
    ),
    "flat": ("val/0wR5jVB-WPk_000417_000427.mp4", "val/-5ScotRN_I4_000001_000011.mp4", "val/x_y_000000_000010.mp4"),
    "ids alone": ("validate/abseiling/0wR5jVB-WPk.mkv", "validate/air drumming/-5ScotRN_I4.webm", "validate/x_y.MP4"),
    "one folder": ("abseiling/0wR5jVB-WPk_000417_000427.mp4", "-5ScotRN_I4_000001_000011.mp4", "x/x_y_000000_000010.mp4"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kinetics_videos_are_found_in_every_layout(tmp_path, layout):
    paths = LAYOUTS[layout]
    folder = Path(paths[0]).parts[0] if "/" in paths[1] else "."
    # No video, another part of the same YouTube video, and a video of no list.
    touch(tmp_path, *paths, f"{folder}/x/0wR5jVB-WPk_000417_000427.json", f"{folder}/x/x_y_000099_000109.mp4", f"{folder}/no_000000_000010.mp4")
    write(tmp_path, val__csv=K400)
    source = kinetics(root=str(tmp_path), train=None, test="val.csv")
    assert listed(source.test, tmp_path) == [(path, label) for label, path in enumerate(paths)]
    assert source.class_names == ("abseiling", "air drumming", "massaging person's head") and source.notes["missing"] == {"test": 0}


def test_two_parts_of_one_youtube_video_are_told_apart(tmp_path):
    header = "label,youtube_id,time_start,time_end,split\n"
    write(tmp_path, val__csv=header + "peeling apples,abc,14,24,val\ncutting apple,abc,64,74,val\nyarn spinning,d,0,10,val\nzumba,d,0,10,val\n")
    touch(tmp_path, "val/abc.mp4", "val/abc_000064_000074.mp4", "val/zumba/d_000000_000010.mp4", "val/yarn_spinning/d_000000_000010.mp4")
    found = [item.path for item in locate(read_segments(str(tmp_path / "val.csv")), str(tmp_path))]
    assert found == [
        "val/peeling apples/abc_000014_000024.mp4",  # not there: abc.mp4 could be either
        "val/abc_000064_000074.mp4",
        "val/yarn_spinning/d_000000_000010.mp4",
        "val/zumba/d_000000_000010.mp4",
    ]


def test_missing_kinetics_videos_are_counted_and_named_unless_all_of_a_list_are_missing(tmp_path):
    write(tmp_path, val__csv=K400)
    touch(tmp_path, LAYOUTS["class folders"][1])
    options = {"root": str(tmp_path), "train": None, "test": "val.csv"}
    source = kinetics(**options)
    assert listed(source.test, tmp_path) == [(LAYOUTS["class folders"][1], 1)] and len(source.class_names) == 3
    assert source.notes["missing"] == {"test": 2} and source.notes["videos"] == {"test": 1}
    assert source.missing == {"test": tuple(str(tmp_path / LAYOUTS["class folders"][i]) for i in (0, 2))}
    with pytest.raises(FileNotFoundError, match=r"val\.csv: .*0wR5jVB-WPk_000417_000427\.mp4 does not exist \(2 of 3 videos are missing"):
        kinetics(**options, allow_missing=False)
    (tmp_path / LAYOUTS["class folders"][1]).unlink()
    with pytest.raises(FileNotFoundError, match=r"\(3 of 3 videos are missing.*; see the page$"):
        kinetics(**options, prepare_hint="see the page")


def test_the_classes_of_kinetics_come_from_a_file_the_config_or_the_training_list(tmp_path):
    write(tmp_path, val__csv=K400, train__csv=K400.replace("abseiling", "zumba"))
    write(tmp_path, classes__txt="air_drumming\nmassaging person's head\nabseiling\n")
    touch(tmp_path, "train/x_y_000000_000010.mp4", *LAYOUTS["flat"])
    options = {"root": str(tmp_path), "test": "val.csv"}
    assert [video.label for video in kinetics(**options, train=None, classes="classes.txt").test] == [2, 0, 1]
    names = ["massaging person's head", "abseiling", "air drumming"]
    assert [video.label for video in kinetics(**options, train=None, class_names=names).test] == [1, 2, 0]
    with pytest.raises(ValueError, match=r"val\.csv: the class 'abseiling' of .* is none of the 3 classes \(air drumming, .*, zumba\)"):
        kinetics(**options, train="train.csv")
    with pytest.raises(ValueError, match="dataset kinetics: 3 classes, but num_classes is 400"):
        kinetics(**options, train=None, num_classes=400)


def test_pyslowfasts_lists_are_taken_too_and_may_miss_videos(tmp_path):
    write(tmp_path, train__csv="train/a b/x.mp4 1\ntrain/c/gone.mp4 0\n", val__csv="val/y.mp4 0\n", classes__txt="c\na b\n")
    touch(tmp_path, "train/a b/x.mp4", "val/y.mp4")
    source = kinetics(root=str(tmp_path), train="train.csv", test="val.csv", classes="classes.txt", num_classes=2)
    assert listed(source.train, tmp_path) == [("train/a b/x.mp4", 1)] and source.class_names == ("c", "a b")
    assert source.notes["missing"] == {"train": 1, "test": 0}


PATHS = ("air_drumming/a.mp4 1", "air_drumming/b.mkv 1", "answering_questions/c_000001_000011.mp4 0")
PLACES = {
    "as listed": ("air_drumming/a.mp4", "air_drumming/b.mkv", "answering_questions/c_000001_000011.mp4"),
    "blanks": ("air drumming/a.mp4", "air drumming/b.mkv", "answering questions/c_000001_000011.mp4"),
    "times": ("air drumming/a_000000_000010.mp4", "air drumming/b_000003_000013.mp4", "answering questions/c.mp4"),
    "suffixes": ("air_drumming/a.mkv", "air_drumming/b.webm", "answering_questions/c_000001_000011.MP4"),
    "folder of the split": ("val/air drumming/a_000000_000010.mp4", "val/air_drumming/b.mp4", "val/answering questions/c.mp4"),
    "no class folders": ("validate/a.mp4", "validate/b.mp4", "validate/c_000001_000011.mp4"),
}


@pytest.mark.parametrize("layout", PLACES)
def test_lists_of_paths_find_the_same_videos_as_the_official_ones(tmp_path, layout):
    paths = PLACES[layout]
    touch(tmp_path, *paths, *(f"{Path(path).parent}/{name}" for path in paths for name in ("a.json", "other.mp4")))
    write(tmp_path, val__txt="\n".join(PATHS))
    options = {"root": str(tmp_path), "train": None, "test": "val.txt"}
    assert listed(kinetics(**options).test, tmp_path) == list(zip(paths, (1, 1, 0)))
    # Lists of another machine are no different.
    write(tmp_path, val__txt="".join(f"/other/machine/{path}\n" for path in PATHS))
    assert listed(kinetics(**options, strip_prefix="/other/machine").test, tmp_path) == list(zip(paths, (1, 1, 0)))


def test_a_listed_path_is_no_other_video_of_the_same_name(tmp_path):
    touch(tmp_path, "x/abc_000001_000011.mp4", "x/abc_000064_000074.mp4", "x/d.mp4", "train/e.mp4", "val/f.mp4")
    write(tmp_path, val__txt="x/abc.mp4 0\nx/d_000001_000011.mp4 0\nx/d_000050_000060.mp4 0\nx/e.mp4 0\nx/f.mp4 0\n")
    source = kinetics(root=str(tmp_path), train=None, test="val.txt")
    assert listed(source.test, tmp_path) == [("val/f.mp4", 0)]  # the others could be either of two, or are of another split
    write(tmp_path, val__txt="X_y/e.mp4 0\n")
    touch(tmp_path, "val/x y/other.mp4")
    with pytest.raises(FileNotFoundError, match=r"/X_y/e\.mp4 does not exist \(1 of 1 videos are missing; root is .*\); there is .*, but no X_y in it$"):
        kinetics(root=str(tmp_path), train=None, test="val.txt")


def test_a_link_that_leads_nowhere_gives_way_to_the_video_itself(tmp_path):
    write(tmp_path, val__csv=K400, val__txt="abseiling/0wR5jVB-WPk.mp4 0\n")
    touch(tmp_path, "abseiling/0wR5jVB-WPk.mkv")
    (tmp_path / "abseiling/0wR5jVB-WPk_000417_000427.mp4").symlink_to("gone.mp4")
    for file in ("val.csv", "val.txt"):
        assert listed(kinetics(root=str(tmp_path), train=None, test=file).test, tmp_path) == [("abseiling/0wR5jVB-WPk.mkv", 0)]


WRONG_KINETICS = {
    "a blank label": (K400 + ",abc,1,11,val,0\n", r"val\.csv:5: the label is missing"),
    "no labels": ("youtube_id,time_start,time_end,split\na,1,2,test\n", "the list has no labels"),
    "no times": ("label,youtube_id,split\nx,a,test\n", "the header lacks time_start; the official lists begin with label,youtube_id"),
    "a time in words": (K400.replace("417", "late"), r"val\.csv:2: time_start and time_end must be seconds"),
    "a short row": (K400 + "abseiling,abc\n", r"val\.csv:5: time_start and time_end must be seconds"),
    "header only": (K400.splitlines()[0] + "\n", "the list is empty"),
}


@pytest.mark.parametrize("fault", WRONG_KINETICS)
def test_a_kinetics_list_that_is_wrong_is_refused_in_one_line(tmp_path, fault):
    text, message = WRONG_KINETICS[fault]
    write(tmp_path, val__csv=text)
    with pytest.raises(ValueError, match=message) as caught:
        kinetics(root=str(tmp_path), train=None, test="val.csv")
    assert "\n" not in str(caught.value) and "val.csv" in str(caught.value)


# ---- mini-Kinetics


def mini(root, **options):
    return mini_kinetics(**{"root": str(root), "train": None, "test": "val.csv", "num_classes": None, **options})


def test_mini_kinetics_is_chosen_by_videos_by_classes_or_by_its_own_lists_and_says_so(tmp_path):
    write(tmp_path, val__csv=K400, train_ids__txt="-5ScotRN_I4\n", val_ids__txt="x_y\n0wR5jVB-WPk\nunknown\n")
    write(tmp_path, classes__txt="air_drumming\nabseiling\n", one__txt="abseiling\n")
    touch(tmp_path, *LAYOUTS["flat"])
    by_videos = mini(tmp_path, subset=["train_ids.txt", "val_ids.txt"])
    assert listed(by_videos.test, tmp_path) == [(LAYOUTS["flat"][0], 0), (LAYOUTS["flat"][2], 1)]
    assert by_videos.notes["subset"] == {"by": "videos", "files": [str(tmp_path / "val_ids.txt")], "not_in_kinetics": {"test": 1}}
    by_classes = mini(tmp_path, subset="classes.txt")
    assert listed(by_classes.test, tmp_path) == [(LAYOUTS["flat"][0], 1), (LAYOUTS["flat"][1], 0)]
    assert by_classes.class_names == ("air drumming", "abseiling")
    assert len(mini(tmp_path, subset="one.txt", class_names=by_classes.class_names).test) == 1  # of a checkpoint, say
    assert by_classes.notes["subset"] == {"by": "classes", "files": [str(tmp_path / "classes.txt")]}
    whole = mini(tmp_path, subset=None)
    assert len(whole.test) == 3 and whole.notes["subset"] == {"by": "the lists themselves"}


def test_both_lists_of_ids_apply_to_their_own_split(tmp_path):
    write(tmp_path, val__csv=K400, train__csv=K400, train_ids__txt="x_y\n-5ScotRN_I4\n", val_ids__txt="-5ScotRN_I4\n")
    touch(tmp_path, *LAYOUTS["flat"])
    source = mini(tmp_path, train="train.csv", subset=["train_ids.txt", "val_ids.txt"])
    assert listed(source.train, tmp_path) == [(LAYOUTS["flat"][1], 0), (LAYOUTS["flat"][2], 1)]
    assert listed(source.test, tmp_path) == [(LAYOUTS["flat"][1], 0)]


def test_a_subset_that_does_not_fit_is_refused(tmp_path):
    write(tmp_path, val__csv=K400, ids__txt="nobody\n")
    touch(tmp_path, *LAYOUTS["flat"])
    with pytest.raises(ValueError, match=r"val\.csv has none of the videos that dataset\.subset="):
        mini(tmp_path, subset=["ids.txt", "ids.txt"])
    with pytest.raises(ValueError, match=r"dataset\.subset=\['ids\.txt'\] must be two files of ids"):
        mini(tmp_path, subset=["ids.txt"])
    with pytest.raises(FileNotFoundError, match="the test list of ids gone.txt does not exist"):
        mini(tmp_path, subset=["ids.txt", "gone.txt"])
    with pytest.raises(ValueError, match="3 classes, but num_classes is 200"):
        mini(tmp_path, subset=None, num_classes=200)
