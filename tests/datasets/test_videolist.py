"""Lists of videos: every form they come in, and what is said about a list that is wrong."""

import os

import pytest

from atfr.data.datasets.videolist import videolist
from atfr.data.types import Video

PATHS = ("run/a.mp4", "run/b c.mp4", "walk/d, e.mp4")


@pytest.fixture
def root(tmp_path):
    """A folder with three (empty) videos."""
    for path in PATHS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def load(root, text, name="list.csv", **options):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return videolist(root=str(root), **{"train": name, "test": None, **options})


def listed(source):
    return [(os.path.relpath(video.path, source.notes["root"]), video.label) for video in source.train]


FORMS = {
    "comma": 'run/a.mp4,0\nrun/b c.mp4,0\n"walk/d, e.mp4",1\n',
    "comma, header": 'path,label\nrun/a.mp4,0\nrun/b c.mp4,0\n"walk/d, e.mp4",1\n',
    "comma, more columns": 'label,group,relative_path\n0,x,run/a.mp4\n0,x,run/b c.mp4\n1,y,"walk/d, e.mp4"\n',
    "comma, blanks": 'run/a.mp4, 0\nrun/b c.mp4 ,0\n"walk/d, e.mp4" , 1 \n',
    "space": "run/a.mp4 0\nrun/b c.mp4 0\nwalk/d, e.mp4 1\n",
    "space, comma in the first path": "walk/d, e.mp4 1\nrun/a.mp4 0\nrun/b c.mp4 0\n",
    "space, quotes": 'run/a.mp4 0\n"run/b c.mp4" 0\n"walk/d, e.mp4" 1\n',
    "tab": "run/a.mp4\t0\nrun/b c.mp4\t0\nwalk/d, e.mp4\t1\n",
    "tabs that align the labels": "run/a.mp4\t\t0\nrun/b c.mp4\t0\nwalk/d, e.mp4\t1\n",
    "tab, header": "label\tgroup\tfilename\n0\t\trun/a.mp4\n0\tx\trun/b c.mp4\n1\ty\twalk/d, e.mp4\n",
    "semicolon": "run/a.mp4;0\nrun/b c.mp4; 0\nwalk/d, e.mp4;1\n",
    "semicolon, header": "video_id;label\nrun/a.mp4;0\nrun/b c.mp4;0\nwalk/d, e.mp4;1\n",
    "semicolon, names with blanks and commas": "run/a.mp4;Go, and run\nrun/b c.mp4;Go, and run\nwalk/d, e.mp4;Walk slowly\n",
    "space, header": "path label\nrun/a.mp4 0\nrun/b c.mp4 0\nwalk/d, e.mp4 1\n",
    "space, header of three columns": "path frames label\nrun/a.mp4 9 0\nrun/b c.mp4 9 0\nwalk/d, e.mp4 9 1\n",
    "space, header with frames last": "path label frames\nrun/a.mp4 0 9\nrun/b c.mp4 0 9\nwalk/d, e.mp4 1 9\n",
    "frames": "run/a.mp4 250 0\nrun/b c.mp4 9 0\nwalk/d, e.mp4 100 1\n",
    "index column": ",path,label\n0,run/a.mp4,0\n1,run/b c.mp4,0\n2,\"walk/d, e.mp4\",1\n",
    "names": 'run/a.mp4,run\nrun/b c.mp4,run\n"walk/d, e.mp4",walk\n',
    "names with spaces": 'run/a.mp4,"a, run"\nrun/b c.mp4,"a, run"\n"walk/d, e.mp4",go walk\n',
    "names in quotes after a space": 'run/a.mp4 "go run"\n"run/b c.mp4" "go run"\n"walk/d, e.mp4" "go walk"\n',
    "comments, blank lines": '# made by hand\n\nrun/a.mp4,0\n\n# more\nrun/b c.mp4,0\n"walk/d, e.mp4",1',
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_list_gives_the_same_videos(root, form):
    source = load(root, FORMS[form])
    assert sorted(listed(source)) == [("run/a.mp4", 0), ("run/b c.mp4", 0), ("walk/d, e.mp4", 1)]
    assert len(source.class_names) == 2


def test_lists_of_frame_folders_are_told_from_paths_that_end_in_a_number(tmp_path):
    for folder in ("frames/v1", "frames/v 2", "take 1", "take 2"):
        (tmp_path / folder).mkdir(parents=True)
    assert listed(load(tmp_path, "frames/v1 45 0\nframes/v 2 9 1\n")) == [("frames/v1", 0), ("frames/v 2", 1)]
    assert listed(load(tmp_path, "take 1 0\ntake 2 1\n")) == [("take 1", 0), ("take 2", 1)]
    assert listed(load(tmp_path, "take 1 45 0\ntake 2 9 1\n")) == [("take 1", 0), ("take 2", 1)]
    with pytest.raises(FileNotFoundError, match=r"/frames/v3 does not exist \(1 of 1 videos"):
        load(tmp_path, "frames/v3 45 0\n")


@pytest.mark.parametrize(
    "columns, refused",
    [
        (lambda k: (1 + k % 5, 40 + 7 * k), True),
        (lambda k: (1 + k % 5, 40 + 7 * (k % 12)), True),
        (lambda k: (40 + 7 * k, 1 + k % 5), False),
        (lambda k: (40 + k % 2, 1 + k), False),  # clips of nearly the same length, many classes
        (lambda k: (1 + k % 5, k), False),  # a class 0
    ],
)
def test_a_list_of_labels_before_frames_is_refused(tmp_path, columns, refused):
    (tmp_path / "v").mkdir()
    text = "".join("v {} {}\n".format(*columns(k)) for k in range(24))
    if refused:
        with pytest.raises(ValueError, match=r"list\.csv: the columns seem to be path, label, frames; add the header 'path label frames'$"):
            load(tmp_path, text)
        assert [label for _, label in listed(load(tmp_path, "path label frames\n" + text))] == [columns(k)[0] for k in range(24)]
    else:
        assert [label for _, label in listed(load(tmp_path, text))] == [columns(k)[1] for k in range(24)]


def test_folders_that_are_named_by_an_id_have_names_with_blanks(tmp_path):
    for folder in ("1", "20"):
        (tmp_path / folder).mkdir()
    source = load(tmp_path, "1;Swiping Left\n20;Drumming Fingers\n")
    assert listed(source) == [("1", 1), ("20", 0)] and source.class_names == ("Drumming Fingers", "Swiping Left")


@pytest.mark.parametrize("separator", [" ", ",", "\t"])
def test_a_line_that_begins_with_a_hash_is_a_video_if_it_has_a_label_and_its_file_exists(tmp_path, separator):
    for name in ("#2_Gum.avi", "a.avi", "b.avi"):
        (tmp_path / name).touch()
    rows = ("#2_Gum.avi|0", "# made by hand", "a.avi|0", "#b.avi|1", "# b.avi|1", "#2_Gum.avi", "#9_Gum.avi|1")
    text = "\n".join(rows).replace("|", separator)
    assert listed(load(tmp_path, text)) == [("#2_Gum.avi", 0), ("a.avi", 0)]
    assert listed(load(tmp_path, "#2_Gum.avi 0\n")) == [("#2_Gum.avi", 0)]


def test_paths_may_start_at_the_home_folder_and_have_names_of_any_bytes(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    odd = os.fsencode(root) + b"/caf\xe9 \xe5\x8b\x95.mp4"
    with open(odd, "wb"):
        pass
    source = load(root, b"~/run/a.mp4 0\ncaf\xe9 \xe5\x8b\x95.mp4 1\n")
    assert [os.fsencode(video.path) for video in source.train] == [os.fsencode(root / "run/a.mp4"), odd]


def test_a_link_that_leads_nowhere_is_a_missing_video(root):
    (root / "dangling.mp4").symlink_to(root / "gone.mp4")
    (root / "link.mp4").symlink_to(root / "run/a.mp4")
    text = "dangling.mp4 0\nlink.mp4 0\n"
    with pytest.raises(FileNotFoundError, match=r"dangling\.mp4 does not exist \(1 of 2 .*; it is a symbolic link to .*gone\.mp4, which does not exist"):
        load(root, text)
    source = load(root, text, allow_missing=True)
    assert listed(source) == [("link.mp4", 0)] and source.missing == {"train": (str(root / "dangling.mp4"),)}


@pytest.mark.parametrize(
    "path, instead",
    [
        ("RUN/a.mp4", "/run"),
        ("run/b_c.mp4", "/run/b c.mp4"),
        ("run/A.webm", "/run/a.mp4"),
        ("run/x/a.mp4", "/run, but no x in it"),
        ("videos/a.mp4", ", but no videos in it"),
    ],
)
def test_the_message_about_a_missing_file_names_what_is_there(root, path, instead):
    with pytest.raises(FileNotFoundError) as caught:
        load(root, f"{path},0\n")
    assert str(caught.value).endswith(f"; there is {root}{instead}")


def test_classes_are_the_sorted_names_of_the_training_list(root):
    (root / "test.csv").write_text("run/a.mp4,walk\n")
    source = load(root, "run/a.mp4,walk\nrun/b c.mp4,run\n", test="test.csv")
    assert source.class_names == ("run", "walk")
    assert [video.label for video in source.train] == [1, 0]
    assert [video.label for video in source.test] == [1]


def test_given_class_names_fix_the_order(root):
    source = load(root, "run/a.mp4,walk\nrun/b c.mp4,run\n", class_names=["walk", "swim", "run"])
    assert source.class_names == ("walk", "swim", "run")
    assert [video.label for video in source.train] == [0, 2]


def test_ids_count_the_classes_of_all_lists_unless_told_how_many(root):
    (root / "test.csv").write_text("run/a.mp4,7\n")
    assert len(load(root, "run/a.mp4,2\n", test="test.csv").class_names) == 8
    assert len(load(root, "run/a.mp4,2\n", test="test.csv", num_classes=10).class_names) == 10


def test_a_source_for_testing_only_needs_no_training_list(root):
    (root / "test.txt").write_text("run/a.mp4 1\n")
    source = videolist(root=str(root), train=None, test="test.txt", num_classes=3)
    assert source.train == () and source.test == source.val == (Video(str(root / "run/a.mp4"), 1),)
    assert source.class_names == ("0", "1", "2")


def test_the_test_list_validates_unless_there_is_a_list_for_that(root):
    (root / "test.csv").write_text("run/a.mp4,0\n")
    (root / "val.csv").write_text("run/b c.mp4,0\n")
    assert load(root, "run/a.mp4,0\n", test="test.csv").notes["validation"] == "test list"
    source = load(root, "run/a.mp4,0\n", test="test.csv", val="val.csv")
    assert source.val == (Video(str(root / "run/b c.mp4"), 0),)
    assert source.notes["videos"] == {"train": 1, "val": 1, "test": 1}


def test_lists_are_found_from_the_working_directory_first(root, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "list.csv").write_text(f"{root}/run/a.mp4,0\n")
    (root / "list.csv").write_text("run/b c.mp4,0\n")
    (root / "only_in_root.csv").write_text("run/b c.mp4,0\n")
    monkeypatch.chdir(elsewhere)
    source = videolist(root=str(root), train="list.csv", test="only_in_root.csv")
    assert source.notes["lists"] == {"train": str(elsewhere / "list.csv"), "test": str(root / "only_in_root.csv")}
    assert source.train[0].path == str(root / "run/a.mp4")


WRONG = {
    "empty": ("# nothing\n\n", {}, r"list\.csv: the list is empty$"),
    "header only": ("path,label\n", {}, r"list\.csv: the list is empty \(it has only a header\)"),
    "no label": ("run/a.mp4,0\nb.mp4\n", {}, r"list\.csv:2: expected 'path,label' or 'path label', found 'b.mp4'"),
    "blank label": ("run/a.mp4,0\n\nrun/b.mp4,\n", {}, r"list\.csv:3: the label is missing in 'run/b.mp4,'"),
    "blank path": ("run/a.mp4,0\n,3\n", {}, r"list\.csv:2: the path is missing in ',3'"),
    "three columns": ("run/a.mp4,0,1\n", {}, r"list\.csv:1: expected 'path,label' .*; for more columns, add a header that names them"),
    "no frames": ("run/a.mp4 9 0\nrun/a.mp4 0 1\n", {}, r"list\.csv:2: expected 'path frames label', found 'run/a.mp4 0 1'; if .* add the header"),
    "frames in some rows": ("run/a.mp4 9 0\nrun/a.mp4 9 0\nrun/a.mp4 1\n", {}, r"list\.csv:3: expected 'path frames label', found 'run/a.mp4 1'"),
    "part of a video": ("run/a.mp4 1 45 0\n", {}, r"list\.csv:1: 'run/a.mp4 1 45 0' ends in 3 numbers; expected 'path label' or 'path frames label'"),
    "unknown header": ("recording,gesture\nrun/a.mp4,0\n", {}, r"list\.csv:1: 'recording,gesture' seems to be a header: name its columns path and"),
    "unknown header, spaces": ("recording gesture\nrun/a.mp4 0\n", {"allow_missing": True}, r"list\.csv:1: 'recording gesture' seems to be a header"),
    "id too large": ("run/a.mp4,5\n", {"num_classes": 5}, r"list\.csv:1: label 5 is outside the 5 classes \(0 to 4\)"),
    "id negative": ("run/a.mp4,-1\nrun/a.mp4,1", {}, r"list\.csv:1: label -1 is outside the 2 classes \(0 to 1\)"),
    "too few names": ("run/a.mp4,run\n", {"num_classes": 4}, r"num_classes is 4, but the training list names 1"),
    "names twice": ("run/a.mp4,run\n", {"class_names": ["run", "run"]}, r"class_names: class 'run' appears more than once"),
    "counts differ": ("run/a.mp4,run\n", {"class_names": ["run"], "num_classes": 2}, r"class_names: 1 class, but num_classes is 2"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_list_that_is_wrong_is_refused_in_one_line_that_says_where(root, fault):
    text, options, message = WRONG[fault]
    with pytest.raises(ValueError, match=message) as caught:
        load(root, text, **options)
    assert "\n" not in str(caught.value)


def test_a_test_label_that_was_never_trained_is_refused(root):
    (root / "test.csv").write_text("run/a.mp4,run\nrun/a.mp4,swim\n")
    with pytest.raises(ValueError, match=r"test\.csv:2: label 'swim' is none of the 1 classes \(run\)"):
        load(root, "run/a.mp4,run\n", test="test.csv")


def test_names_without_a_training_list_need_class_names(root):
    (root / "test.csv").write_text("run/a.mp4,run\n")
    with pytest.raises(ValueError, match=r"test\.csv:1: the labels are names \('run'\).*give class_names"):
        videolist(root=str(root), train=None, test="test.csv")
    assert videolist(root=str(root), train=None, test="test.csv", class_names=["run"]).test[0].label == 0


def test_no_list_at_all_is_refused(root):
    with pytest.raises(ValueError, match="neither a train nor a test list"):
        videolist(root=str(root), train=None, test=None)


def test_missing_files_are_named_together_with_the_way_out(root, monkeypatch):
    monkeypatch.chdir(root / "run")
    hint = {"prepare_hint": "run scripts/prepare.sh first"}
    with pytest.raises(FileNotFoundError, match=r"root /no/such is not a folder; run scripts/prepare\.sh first$"):
        videolist(root="/no/such", train="a.csv", test=None, **hint)
    with pytest.raises(FileNotFoundError) as caught:
        videolist(root=str(root), train="gone.csv", test=None, **hint)
    assert str(caught.value) == (
        f"dataset videolist: the train list gone.csv does not exist (looked for {root}/run/gone.csv and"
        f" {root}/gone.csv); run scripts/prepare.sh first"
    )
    with pytest.raises(FileNotFoundError) as caught:
        load(root, "run/a.mp4,0\nrun/x.mp4,0\nfly/y.mp4,0\n", **hint, train=str(root / "list.csv"))
    assert str(caught.value) == (
        f"{root}/list.csv: {root}/run/x.mp4 does not exist (2 of 3 videos are missing; root is {root});"
        " run scripts/prepare.sh first"
    )


def test_a_folder_in_place_of_a_list_is_told_what_a_list_is(root):
    with pytest.raises(IsADirectoryError, match=r"the train list run is a folder \(.*/run\), and a file is wanted; write a list with a line path,label for each video"):
        videolist(root=str(root), train="run", test=None)


def test_the_root_stands_for_the_folder_of_whoever_wrote_the_list(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.mp4").touch()
    (tmp_path / "list.txt").write_text("/home/somebody/videos/x/a.mp4 0\n")
    for prefix in ("/home/somebody/videos", "/home/somebody/videos/"):
        source = videolist(root=str(tmp_path), train=None, test="list.txt", strip_prefix=prefix)
        assert [video.path for video in source.test] == [str(tmp_path / "x/a.mp4")]
    (tmp_path / "list.txt").write_text("/old/x/a.mp4 0\n\nx/a.mp4 0\n/other/x/a.mp4 0\n")
    with pytest.raises(ValueError, match=r"list\.txt:3: x/a\.mp4 does not begin with dataset\.strip_prefix=/old"):
        videolist(root=str(tmp_path), train=None, test="list.txt", strip_prefix="/old")
