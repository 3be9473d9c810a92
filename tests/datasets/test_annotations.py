"""The six datasets from their official files: excerpts written here, and the whole files where they are."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import pytest
from list_files import K400, listed, touch, write
from run_tools import ROOT

from atfr.data.datasets.hmdb51 import hmdb51, read_split
from atfr.data.datasets.kinetics import kinetics, read_segments
from atfr.data.datasets.mini_kinetics import mini_kinetics
from atfr.data.datasets.something_something import something_something_v2
from atfr.data.datasets.ucf101 import read_classes, read_list, ucf101
from atfr.data.lists.existing import ExistingFiles

sys.path.insert(0, str(ROOT / "scripts"))
import annotation_counts  # noqa: E402

# ---- Something-Something V2

LABELS = {"Closing something": "1", "Putting something into something": "0"}
ENTRIES = [
    {"id": "203", "label": "putting pen into box", "template": "Putting [something] into [something]", "placeholders": ["pen", "box"]},
    {"id": "17", "label": "closing a box", "template": "Closing [something]", "placeholders": ["a box"]},
]


def something(root, entries=ENTRIES, labels=LABELS, **options):
    write(root, labels__json=json.dumps(labels), list__json=json.dumps(entries))
    paths = {"labels": "labels.json", "train": None, "test": "list.json", "videos": "."}
    return something_something_v2(**{"root": str(root), "num_classes": 2, **paths, **options})


def test_a_template_without_its_brackets_is_a_class_of_something_something(tmp_path):
    touch(tmp_path, "203.webm", "17.webm")
    source = something(tmp_path)
    assert listed(source.test, tmp_path) == [("203.webm", 0), ("17.webm", 1)] and source.val == source.test and source.train == ()
    assert source.class_names == ("Putting something into something", "Closing something")


def test_what_is_wrong_in_something_something_is_refused_by_name(tmp_path):
    touch(tmp_path, "203.webm")
    with pytest.raises(FileNotFoundError, match=r"list\.json: .*17\.webm does not exist \(1 of 2 videos are missing"):
        something(tmp_path)
    assert len(something(tmp_path, allow_missing=True).test) == 1
    with pytest.raises(ValueError, match=r"list\.json: video 1420 has no template: the test list was published without labels"):
        something(tmp_path, entries=[{"id": "1420"}])
    with pytest.raises(ValueError, match=r"list\.json: the template of video 5 is not text: 17$"):
        something(tmp_path, entries=[{"id": "5", "template": 17}])
    with pytest.raises(ValueError, match=r"list\.json: the class 'Opening something' of 5\.webm is none of the 2 classes"):
        something(tmp_path, entries=[{"id": "5", "template": "Opening [something]"}])
    with pytest.raises(ValueError, match=r"labels\.json: expected .* ids from \"0\", as"):
        something(tmp_path, labels={"Closing something": "1", "Opening something": "2"})
    with pytest.raises(ValueError, match=r"labels\.json: ids are numbers, as in Something-Else; the official labels\.json has strings"):
        something(tmp_path, labels={"Closing something": 1, "Putting something into something": 0})
    with pytest.raises(ValueError, match=r"labels\.json: 2 classes, but num_classes is 174"):
        something(tmp_path, num_classes=174)
    (tmp_path / "broken.json").write_text("[{")
    with pytest.raises(ValueError, match=r"broken\.json: not a JSON file"):
        something(tmp_path, test="broken.json")
    (tmp_path / "answers.csv").write_text("203;Closing something\n17,Closing something\n")
    with pytest.raises(ValueError, match=r"answers\.csv:2: expected 'ID;TEMPLATE' as in the official test-answers.csv"):
        something(tmp_path, test="answers.csv")


def test_the_answers_to_the_test_list_of_something_something_are_a_test_list(tmp_path):
    touch(tmp_path, "203.webm", "17.webm")
    (tmp_path / "answers.csv").write_text("17;Putting something into something\n203;Closing something\n")
    assert listed(something(tmp_path, test="answers.csv").test, tmp_path) == [("17.webm", 0), ("203.webm", 1)]


# ---- UCF101 and HMDB51


def small_ucf101(root, **options):
    lists = {"classInd__txt": "1 Archery\n2 HandstandPushups\n", "trainlist02__txt": "Archery/v_Archery_g01_c01.avi 1\n"}
    lists["testlist02__txt"] = "HandstandPushups/v_HandStandPushups_g01_c01.avi\nArchery/v_Archery_g02_c01.avi\n"
    write(root, **{**lists, **options})
    return ucf101(root=str(root), split=2, annotations=".", num_classes=2)


def test_a_split_of_ucf101_is_its_two_lists(tmp_path):
    touch(tmp_path, *(f"UCF-101/{path}" for path in ("Archery/v_Archery_g01_c01.avi", "Archery/v_Archery_g02_c01.avi")))
    touch(tmp_path, "UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi")
    source = small_ucf101(tmp_path)
    assert listed(source.train, tmp_path) == [("UCF-101/Archery/v_Archery_g01_c01.avi", 0)]
    assert [label for _, label in listed(source.test, tmp_path)] == [1, 0]
    assert source.class_names == ("Archery", "HandstandPushups") and source.notes["official_split"] == 2


@pytest.mark.parametrize(
    "files,message",
    [
        ({"trainlist02__txt": "v_Archery_g01_c01.avi 1\n"}, r"trainlist02\.txt:1: expected 'Class/video\.avi'"),
        ({"trainlist02__txt": "\nArchery/v_Archery_g01_c01.avi 2\n"}, r"trainlist02\.txt:2: the number 2 is not that of class Archery"),
        ({"testlist02__txt": "Swimming/a.avi\n"}, r"testlist02\.txt: the class 'Swimming' of Swimming/a\.avi is none of the 2 classes"),
        ({"classInd__txt": "1 Archery\n3 Swimming\n"}, r"classInd\.txt:2: expected '2 CLASS', found '3 Swimming'"),
        ({"classInd__txt": "1 Archery\n"}, r"classInd\.txt: 1 class, but num_classes is 2"),
    ],
)
def test_lists_of_ucf101_that_are_wrong_are_refused_in_one_line(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        small_ucf101(tmp_path, **files)


CHEW = ("#2_Gum_chew_h_nm_np1_fr_med_0.avi 1 \n", "[a]_Tom_&_Jerry!_chew_u_1.avi 2 \n", "(Rad)_chew_u_2.avi 0 \n")


def small_hmdb51(root, chew="".join(CHEW), **options):
    write(root, chew_test_split1__txt=chew, climb_test_split1__txt="a_climb.avi 2 \n", climb_stairs_test_split1__txt="b_climb_stairs.avi 1 \n")
    return hmdb51(**{"root": str(root), "split": 1, "annotations": ".", "num_classes": 3, **options})


def test_hmdb51_takes_ones_to_train_and_twos_to_test_whatever_the_names_hold(tmp_path):
    train = ("chew/#2_Gum_chew_h_nm_np1_fr_med_0.avi", "climb_stairs/b_climb_stairs.avi")
    test = ("chew/[a]_Tom_&_Jerry!_chew_u_1.avi", "climb/a_climb.avi")
    touch(tmp_path / "videos", *train, *test)
    source = small_hmdb51(tmp_path)
    assert listed(source.train, tmp_path / "videos") == [(train[0], 0), (train[1], 2)]
    assert listed(source.test, tmp_path / "videos") == [(test[0], 0), (test[1], 1)]
    assert source.class_names == ("chew", "climb", "climb_stairs")


def test_what_is_wrong_in_hmdb51_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"chew_test_split1\.txt:2: expected 'VIDEO 0', 'VIDEO 1' or 'VIDEO 2', found 'b\.avi 3'"):
        small_hmdb51(tmp_path, chew="a.avi 1 \nb.avi 3 \n")
    with pytest.raises(ValueError, match=r"_test_split2\.txt: 0 classes, but num_classes is 3"):
        small_hmdb51(tmp_path, split=2)
    with pytest.raises(ValueError, match=r"dataset\.split is 4, it must be 1, 2 or 3"):
        small_hmdb51(tmp_path, split=4)
    with pytest.raises(FileNotFoundError, match=r"the folder of lists .*/lists does not exist; see the page"):
        small_hmdb51(tmp_path, annotations="lists", prepare_hint="see the page")


# ---- what all of them have in common


READERS = {
    "kinetics": (lambda root: kinetics(root=root, train=None, test="val.csv").test, {"val.csv": K400}, "0wR5jVB-WPk.mp4"),
    "mini_kinetics": (
        lambda root: mini_kinetics(root=root, train=None, test="val.csv", subset="classes.txt", num_classes=None).test,
        {"val.csv": K400, "classes.txt": "abseiling\n"},
        "0wR5jVB-WPk.mp4",
    ),
    "something_something_v2": (
        lambda root: something_something_v2(root=root, labels="labels.json", train=None, test="list.json", videos=".", num_classes=2, allow_missing=True).test,
        {"labels.json": json.dumps(LABELS), "list.json": json.dumps(ENTRIES)},
        "203.webm",
    ),
    "ucf101": (
        lambda root: ucf101(root=root, split=1, videos=".", annotations=".", num_classes=1).test,
        {"classInd.txt": "1 Archery\r\n", "trainlist01.txt": "Archery/a.avi 1\r\n", "testlist01.txt": "Archery/a.avi\r\n"},
        "Archery/a.avi",
    ),
    "hmdb51": (
        lambda root: hmdb51(root=root, split=1, videos=".", annotations=".", num_classes=1).test,
        {"chew_test_split1.txt": "a.avi 2 \nb.avi 1 \n"},
        "chew/a.avi",
    ),
}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("dataset", READERS)
def test_every_dataset_reads_its_lists_in_the_encoding_of_their_byte_order_mark(tmp_path, dataset, encoding):
    read, files, video = READERS[dataset]
    touch(tmp_path, video, "chew/b.avi")
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
    assert [path for path, _ in listed(read(str(tmp_path)), tmp_path)] == [video]


def test_every_dataset_warns_of_suspicious_lists(tmp_path):
    touch(tmp_path, "UCF-101/Archery/v_Archery_g01_c01.avi")
    source = small_ucf101(tmp_path, testlist02__txt="Archery/v_Archery_g01_c01.avi\n")
    video = f"{tmp_path}/UCF-101/Archery/v_Archery_g01_c01.avi"
    assert source.warnings == (
        f"{tmp_path}/trainlist02.txt: 1 of the 2 classes has no training videos: HandstandPushups",
        f"{tmp_path}/testlist02.txt: 1 of the 1 test videos are also training videos: {video}",
    )


def test_folders_of_videos_and_lists_may_start_at_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "videos/chew/a.avi", "videos/chew/b.avi", "lists/x")
    write(tmp_path / "lists", chew_test_split1__txt="a.avi 2 \nb.avi 1 \n")
    source = hmdb51(root="~", split=1, videos="~/videos", annotations="~/lists", num_classes=1)
    assert listed(source.train + source.test, tmp_path) == [("videos/chew/b.avi", 0), ("videos/chew/a.avi", 0)]


# ---- whole files, where there are some


@pytest.fixture
def annotations(test_data):
    return test_data / "annotations"


def test_all_official_lists_of_ucf101_have_the_published_counts_and_the_labels_that_others_read(annotations):
    classes = read_classes(str(annotations / "ucf101/classInd.txt"))
    assert len(classes) == 101
    counts = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
    for split, expected in counts.items():
        train, test = (read_list(str(annotations / f"ucf101/{part}list0{split}.txt"), classes) for part in ("train", "test"))
        assert (len(train), len(test)) == expected
        assert len({item.path for item in [*train, *test]}) == sum(expected) == 13320
    rows = [line.split() for line in (annotations / "file_lists/ucf101_rawframes_val_split1.txt").read_text().splitlines()]
    test = read_list(str(annotations / "ucf101/testlist01.txt"), classes)
    assert {name: int(label) for name, _, label in rows} == {Path(item.path).stem: classes.index(item.class_name) for item in test}


def test_all_official_lists_of_hmdb51_have_the_published_counts_and_the_labels_that_others_read(annotations):
    for split in (1, 2, 3):
        parts = read_split(str(annotations / "hmdb51"), split)
        assert len(parts["train"]) == 3570 and len(parts["test"]) == 1530
        assert len({item.path for listed in parts.values() for item in listed}) == 5100
    rows = [line.split() for line in (annotations / "file_lists/hmdb51_rawframes_train_split1.txt").read_text().splitlines()]
    parts = read_split(str(annotations / "hmdb51"), 1)
    classes = sorted({item.class_name for item in parts["train"]})
    assert {name: int(label) for name, _, label in rows} == {Path(item.path).stem: classes.index(item.class_name) for item in parts["train"]}


def test_the_official_lists_give_no_warning_where_all_videos_are_there(annotations, tmp_path, monkeypatch):
    monkeypatch.setattr("atfr.data.lists.annotations.ExistingFiles.__contains__", lambda self, path: True)
    folder = annotations / "something_something_v2"
    lists = {"labels": str(folder / "labels.json"), "train": str(folder / "train_excerpt.json"), "test": str(folder / "validation.json")}
    options = {"root": str(tmp_path), "split": 1}
    sources = [
        something_something_v2(root=str(tmp_path), **lists),
        ucf101(**options, annotations=str(annotations / "ucf101")),
        hmdb51(**options, annotations=str(annotations / "hmdb51")),
        kinetics(root=str(tmp_path), train=None, test=str(annotations / "kinetics600/kinetics-600_val.csv")),
    ]
    assert [source.warnings for source in sources] == [()] * 4


def test_every_template_of_something_something_is_one_of_its_174_classes(annotations, tmp_path):
    folder = annotations / "something_something_v2"
    lists = {"labels": str(folder / "labels.json"), "train": str(folder / "train_excerpt.json"), "test": str(folder / "validation.json")}
    train, test = (json.loads(Path(lists[split]).read_text()) for split in ("train", "test"))
    touch(tmp_path, *(f"{entry['id']}.webm" for entry in train[:3] + test[:3]))
    source = something_something_v2(root=str(tmp_path), videos=".", allow_missing=True, **lists)
    assert len(source.class_names) == 174
    assert len(source.train) == len(source.test) == 3 and len(source.missing["test"]) == 24777 - 3
    assert not set(source.missing["train"]) & set(source.missing["test"])


def test_the_answers_to_the_official_test_list_of_something_something_are_for_its_27157_videos(annotations, tmp_path):
    folder = annotations / "something_something_v2"
    ids = [entry["id"] for entry in json.loads((folder / "test.json").read_text())]
    touch(tmp_path, f"{ids[0]}.webm")
    answers = str(folder / "test-answers.csv")
    source = something_something_v2(root=str(tmp_path), videos=".", allow_missing=True, labels=str(folder / "labels.json"), train=None, test=answers)
    assert sorted([Path(video.path).stem for video in source.test] + [Path(path).stem for path in source.missing["test"]]) == sorted(ids)
    assert len(set(ids)) == 27157


@pytest.mark.parametrize("number,rows", [(400, 19906), (600, 30000)])
def test_the_validation_lists_of_kinetics_have_the_classes_in_their_usual_order(annotations, number, rows):
    folder = annotations / f"kinetics{number}"
    segments = read_segments(str(folder / f"kinetics-{number}_val.csv"))
    names = sorted({segment.class_name for segment in segments})
    assert len(segments) == rows and len({segment.stem for segment in segments}) == rows
    assert names == (folder / f"label_map{'_600' if number == 600 else ''}.txt").read_text().splitlines() and len(names) == number
    if number == 400:
        ids = json.loads((annotations / "file_lists/kinetics400_path_label_classids.json").read_text())
        assert {name.strip('"'): index for name, index in ids.items()} == {name: index for index, name in enumerate(names)}


@pytest.mark.slow
def test_the_published_mini_kinetics_lists_choose_80000_and_5000_videos_of_200_classes(annotations, tmp_path):
    folder = annotations / "mini_kinetics200"
    joined = {"train": str(folder / "kinetics_200_train.csv"), "test": str(annotations / "kinetics400/kinetics-400_val.csv")}
    ids = [str(folder / "train_ytid_list.txt"), str(folder / "val_ytid_list.txt")]
    touch(tmp_path, "train/kIRmvrmc2nM.mp4", "val/zkyy5cC7SL4_000000_000010.mp4")
    source = mini_kinetics(root=str(tmp_path), subset=ids, **joined)
    assert source.notes["missing"] == {"train": 79999, "test": 4999} and source.notes["subset"]["not_in_kinetics"] == {"train": 0, "test": 0}
    assert source.class_names == tuple((folder / "classes_sorted.txt").read_text().splitlines()) and len(source.class_names) == 200
    by_classes = mini_kinetics(root=str(tmp_path), subset=str(folder / "classes_sorted.txt"), **joined)
    assert by_classes.class_names == source.class_names
    with open(joined["test"]) as file:
        in_classes = sum(row["label"] in source.class_names for row in csv.DictReader(file))
    assert by_classes.notes["missing"]["test"] == in_classes - 1


def test_the_table_of_counts_says_what_differs_and_what_is_in_both_lists():
    lists = {"UCF101 split 2": annotation_counts.Lists(101, ["a", "b"], ["b", "c", "c"]), "Kinetics-600": annotation_counts.Lists(600)}
    lines = {line.split(" | ")[0]: line for line in annotation_counts.table(lists)}
    assert lines["| UCF101 split 2"] == "| UCF101 split 2 | 101 | 2 | 3 | 1 | 1 | yes: classes; NO: train: 9,586 published, test: 3,734 published |"
    assert lines["| Kinetics-600"] == "| Kinetics-600 | 600 | – | – | – | – | yes: classes |"
    assert lines["| Kinetics-400"] == "| Kinetics-400 | – | – | – | – | – | – |"


def test_pyslowfasts_list_of_another_machine_finds_its_videos_under_the_root(annotations, tmp_path):
    lists = annotations / "file_lists/kinetics400_path_label_val_excerpt.txt"
    touch(tmp_path, "abseiling/0wR5jVB-WPk.mp4")
    prefix = "/scratch/xiaolonw/kinetics/data/compress/val_256"
    source = kinetics(root=str(tmp_path), train=None, test=str(lists), num_classes=400, strip_prefix=prefix)
    assert listed(source.test, tmp_path) == [("abseiling/0wR5jVB-WPk.mp4", 0)] and len(source.missing["test"]) == 2999


def test_missing_files_are_recognised_from_the_listing_of_their_folder(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.mp4", "a/É.mp4")
    (tmp_path / "a/link.mp4").symlink_to("x.mp4")
    (tmp_path / "a/nowhere.mp4").symlink_to("gone.mp4")
    asked, exists = [], os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or exists(path))
    existing, folder = ExistingFiles(), str(tmp_path / "a")
    names = ("x.mp4", "link.mp4", "nowhere.mp4", "gone.mp4", "X.mp4", "", "..")
    found = [name for name in names if f"{folder}/{name}" in existing]
    assert found == [name for name in names if exists(f"{folder}/{name}")]
    assert f"{tmp_path}/none/x.mp4" not in existing and f"{folder}/gone.mp4" not in asked and f"{tmp_path}/none/x.mp4" not in asked
    assert [existing.is_link(f"{folder}/{name}") for name in names[:4]] == [False, True, False, False]
