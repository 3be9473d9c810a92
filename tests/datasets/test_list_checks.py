"""Warnings about lists that can be read and yet are probably wrong."""

import codecs

import pytest

from atfr.data.datasets.videolist import videolist


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write lists by split, and every video that they name, and read them."""
    monkeypatch.chdir(tmp_path)

    def read(there=None, **lists):
        options = {key: lists.pop(key) for key in ("class_names", "num_classes", "allow_missing") if key in lists}
        for split, text in lists.items():
            (tmp_path / f"{split}.txt").write_text(text)
            for line in text.splitlines():
                path = tmp_path / line.split()[0]
                if there is None or path.name in there:
                    path.touch()
        files = {split: f"{split}.txt" if split in lists else None for split in ("train", "val", "test")}
        return videolist(root=str(tmp_path), **files, **options)

    return read


def warnings(source):
    """The warnings without the folder of the test."""
    return [warning.replace(f"{source.notes['root']}/", "") for warning in source.warnings]


def test_lists_without_a_fault_give_no_warning(load):
    assert load(train="a 0\nb 1\nc 2\n", val="d 0\n", test="e 2\nf 1\n").warnings == ()
    assert load(train="a x\nb y\n", test="e y\n").warnings == ()


UNSEEN = {
    "gaps": (
        {"train": "a 0\nb 100\nc 200\nd 300\n"},
        ["train.txt: 297 of the 301 classes (labels 0 to 300) have no training videos: 1, 2, 3, ..."],
    ),
    "in the test list": (
        {"train": "a 0\nb 1\n", "val": "c 3\nd 3\ne 0\n", "test": "f 2\n"},
        [
            "train.txt: 2 of the 4 classes (labels 0 to 3) have no training videos: 2, 3",
            "val.txt: 2 of the 3 val videos are of classes without training videos: 3",
            "test.txt: 1 of the 1 test videos are of classes without training videos: 2",
        ],
    ),
    "of class_names": ({"train": "a x\n", "class_names": ["x", "y"]}, ["train.txt: 1 of the 2 classes has no training videos: y"]),
    "of num_classes": ({"train": "a 0\nb 1\n", "num_classes": 3}, ["train.txt: 1 of the 3 classes (labels 0 to 2) has no training videos: 2"]),
    "left out": (
        {"train": "a x\nb y\n", "test": "c y\n", "allow_missing": True, "there": ("a", "c")},
        [
            "train.txt: 1 of the 2 classes has no training videos: y",
            "test.txt: 1 of the 1 test videos are of classes without training videos: y",
        ],
    ),
}


@pytest.mark.parametrize("lists, expected", UNSEEN.values(), ids=UNSEEN)
def test_classes_without_training_videos_are_counted_and_named(load, lists, expected):
    assert warnings(load(**lists)) == expected


def test_labels_that_count_from_1_are_noticed(load):
    start = "train.txt and test.txt: labels seem to count from 1: no video has label 0"
    assert warnings(load(train="a 1\nb 2\nc 3\n", test="d 2\n"))[0].startswith(start)
    # A class that was given by name and has no video in a part of a dataset is something else.
    assert "from 1" not in " ".join(load(train="a y\nb z\n", class_names=["x", "y", "z"]).warnings)


@pytest.mark.parametrize("one, zero", [("train", "test"), ("test", "train")])
def test_lists_that_count_from_different_numbers_are_noticed(load, one, zero):
    source = load(**{one: "a 1\nb 2\nc 3\n", zero: "d 0\ne 1\nf 2\n"})
    assert f"labels seem to count from 1 in {one}.txt, but from 0 in {zero}.txt" in warnings(source)


def test_a_test_list_that_lacks_the_first_class_does_not_count_from_1(load):
    assert load(train="a 0\nb 1\nc 2\n", test="d 1\ne 2\n").warnings == ()


def test_numbers_beside_given_names_are_said_to_be_positions(load):
    source = load(train="a 1\nb 0\n", class_names=["run", "walk"])
    assert warnings(source) == ["train.txt: labels are numbers and are used as positions in class_names (0 is 'run')"]
    assert [video.label for video in source.train] == [1, 0]


def test_a_single_class_is_pointed_out(load):
    assert warnings(load(train="a run\nb run\n")) == ["train.txt: there is only one class, 'run', so every prediction is right"]


def test_classes_that_differ_only_in_spelling_are_pointed_out(load):
    source = load(train="a Run_fast\nb walk\nc run_fast\n")
    assert warnings(source) == ["train.txt: classes differ only in case, blanks or underscores: Run_fast, run_fast"]


def test_a_file_with_two_labels_is_named_with_both_lines(load):
    within = warnings(load(train="a 0\nb 1\na 1\n"))
    assert within == [
        "train.txt:1: a is listed 2 times (repeated rows of the train list: 1)",
        "1 video has two labels: a is '0' in train.txt:1, but '1' in train.txt:3",
    ]
    across = warnings(load(train="a x\nb y\n", test="c x\n./b x\na y\n"))
    assert across == [
        "2 videos have two labels: b is 'y' in train.txt:2, but 'x' in test.txt:2",
        "test.txt: 2 of the 3 test videos are also training videos: b, ...",
    ]


def test_repeated_rows_and_training_videos_in_the_test_are_counted(load):
    source = load(train="a 0\nb 1\nb 1\n./b 1\na 0\n", test="c 0\nb 1\n")
    assert warnings(source) == [
        "train.txt:2: b is listed 3 times (repeated rows of the train list: 3)",
        "test.txt: 1 of the 2 test videos are also training videos: b",
    ]
    assert len(source.train) == 5


@pytest.mark.parametrize("link", ["copy", "folder"])
def test_a_training_video_in_the_test_list_under_the_name_of_a_link_is_counted(load, tmp_path, link):
    (tmp_path / "videos").mkdir()
    (tmp_path / "copy").symlink_to("videos/a")
    (tmp_path / "folder").symlink_to("videos")
    (tmp_path / "videos/a").touch()
    path = {"copy": "copy", "folder": "folder/a"}[link]
    source = load(train="videos/a x\nb y\n", test=f"{path} x\nc y\n")
    assert warnings(source) == ["test.txt: 1 of the 2 test videos are also training videos: videos/a"]
    assert [video.path for video in source.test] == [str(tmp_path / path), str(tmp_path / "c")]


# ---- labels


def test_integers_that_were_written_as_floats_are_ids(load):
    count = 12
    floats = "".join(f"{i} {i}.0\n" for i in range(count))
    source = load(train=floats, test="".join(f"t{i} {i}\n" for i in range(count)))
    assert [video.label for video in source.train] == [video.label for video in source.test] == list(range(count))
    assert source.class_names == tuple(map(str, range(count))) and source.warnings == ()
    # What a checkpoint of ids hands to its test.
    assert [video.label for video in load(test=floats, class_names=source.class_names).test] == list(range(count))


@pytest.mark.parametrize(
    "lists, message",
    [
        ({"train": "a x\nb y\n", "test": "c 0\n"}, r"test\.txt:1: label '0' is a number, but label 'x' \(.*train\.txt:1\) is a name"),
        ({"train": "a 0\nb 1\n", "test": "c 0\nd y\n"}, r"train\.txt:1: label '0' is a number, but label 'y' \(.*test\.txt:2\) is a name"),
        ({"train": "a 0.0\nb 1.0\nc nan\n"}, r"train\.txt:1: label '0\.0' is a number, but label 'nan' \(.*train\.txt:3\) is a name"),
        ({"train": "a x\n", "test": "b 0\n", "class_names": ["x", "y"]}, r"test\.txt:1: label '0' is a number, but label 'x' \(.*train\.txt:1\)"),
        ({"train": "a 0\nb 2.5\n"}, r"train\.txt:2: label 2\.5 is not an integer"),
        ({"train": f"a 0\nb {'9' * 30}\n"}, r"train\.txt:2: label 9{30} is not an integer of up to 18 digits"),
        ({"train": "a 0\nb 1\nc 20230514\n"}, r"train\.txt:3: label 20230514 makes 20230515 classes, but the lists have only 3 different labels"),
        ({"train": "a 1.5\nb z\n", "class_names": ["None", "1.5"]}, r"train\.txt:2: label 'z' is none of the 2 classes \(None, 1\.5\)"),
    ],
)
def test_labels_that_are_not_all_names_or_all_ids_are_refused(load, lists, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(**lists)
    assert "\n" not in str(caught.value)


def test_numbers_may_be_the_names_of_classes_if_all_are(load):
    names = ["9", "5", "left"]
    source = load(train="a 9\nb left\n", test="c 5.0\n", class_names=names)
    assert [video.label for video in source.train + source.test] == [0, 2, 1]
    with pytest.raises(ValueError, match="label '0' is none of the 3 classes"):
        load(train="a 0\n", class_names=names)


# ---- encodings, in every reader


ENCODINGS = [
    ("utf-8", b""),
    ("utf-8-sig", b""),
    ("utf-16-le", codecs.BOM_UTF16_LE),
    ("utf-16-be", codecs.BOM_UTF16_BE),
    ("utf-16-le", b""),
    ("utf-16-be", b""),
    ("utf-32", b""),
]


@pytest.mark.parametrize("encoding, mark", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_are_read_in_their_encoding(tmp_path, encoding, mark, end):
    (tmp_path / "動画 é.mp4").touch()
    (tmp_path / "list.csv").write_bytes(mark + f"path,label{end}動画 é.mp4,Größe{end}".encode(encoding))
    source = videolist(root=str(tmp_path), train="list.csv", test=None)
    assert [video.path for video in source.train] == [str(tmp_path / "動画 é.mp4")] and source.class_names == ("Größe",)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"a,0\nb\0,1\n", r"list\.csv:2: the file has NUL bytes; save it as UTF-8"),
        (b"a,0\nb,\0", r"list\.csv:2: the file has NUL bytes"),
        (b"a,0\n\0\0\0\0", r"list\.csv:2: the file has NUL bytes"),
        ("a,0\nb,1\n".encode("utf-16-le")[:-1], r"list\.csv:1: the file has NUL bytes"),
        ("a,0\nb,1\n".encode("utf-32-le"), r"list\.csv:1: the file has NUL bytes"),
        (codecs.BOM_UTF16_LE + b"a", r"list\.csv: begins with the byte order mark of UTF-16, but is not UTF-16"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, data, message):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        videolist(root=str(tmp_path), train="list.csv", test=None)
