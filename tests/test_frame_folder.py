"""Folders of images: which of them are the frames."""

import numpy as np
import pytest
from PIL import Image

from atfr.data.decode import read_clip
from atfr.data.frame_folder import FrameFolder
from atfr.data.records import VideoError


def touch(folder, names):
    for name in names:
        (folder / name).touch()


FRAMES = ["img_9.jpg", "img_10.jpg", "img_11.jpg"]


@pytest.mark.parametrize(
    "beside",
    [
        ["flow_x_9.jpg", "flow_y_9.jpg", "flow_x_10.jpg", "flow_y_10.jpg", "flow_x_11.jpg"],
        ["x_9.jpg", "y_9.jpg"],
        ["flowx9.png", "flowy9.png"],
        ["img_9_mask.png", "depth_9.png"],
        ["thumbnail.jpg", "cover.webp"],
        ["._img_9.jpg", ".DS_Store", "notes.txt", "img_9.txt"],
    ],
)
def test_what_tools_write_beside_the_frames_is_no_frame(tmp_path, beside):
    touch(tmp_path, FRAMES + beside)
    assert FrameFolder(str(tmp_path)).files == FRAMES


@pytest.mark.parametrize(
    "names, message",
    [
        (["left_1.jpg", "left_2.jpg", "right_1.jpg"], r"not one sequence of frames: left_# (2), right_# (1); leave only the frames in the folder"),
        (["flow_x_1.jpg", "flow_y_1.jpg"], "flow_x_# (1), flow_y_# (1)"),
        (["img_1.jpg", "img_2.jpg", "holiday.jpg"], "img_# (2), holiday (1)"),
        ([f"{letter}.jpg" for letter in "abcdefg"], "a (1), b (1), c (1), d (1), e (1), ...;"),
        (["img_1.jpg", "img_1.png", "img_2.jpg"], "img_1.jpg and img_1.png are the same frame; leave only one of them in the folder"),
        (["img_1.jpg", "img_01.jpg", "img_2.jpg"], "img_01.jpg and img_1.jpg are the same frame"),
        (["notes.txt"], "it is a folder without jpg, png, bmp or webp files"),
    ],
)
def test_a_folder_that_is_not_one_sequence_of_frames_is_refused_with_what_is_in_it(tmp_path, names, message):
    touch(tmp_path, names)
    with pytest.raises(VideoError) as caught:
        FrameFolder(str(tmp_path))
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ["img_1.jpg", "img_3.jpg", "img_10.jpg"],  # numbers may be missing
        ["img_1.jpg", "img_2.png", "img_3.JPEG"],
        ["v_Dive_g01_c02_1.jpg", "v_Dive_g01_c02_10.jpg"],
        ["flow_x_1.jpg", "flow_x_10.jpg"],
        ["12.5.png", "12.25.png"],
        ["only.bmp"],
    ],
)
def test_images_whose_names_differ_in_numbers_only_are_one_sequence(tmp_path, names):
    touch(tmp_path, names)
    assert FrameFolder(str(tmp_path)).files == names


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_frames_may_be_of_other_formats_than_jpg(tmp_path, ending):
    for number in range(3):
        Image.new("RGB", (64, 48), (20 * number, 90, 200)).save(tmp_path / f"{number}.{ending}", lossless=True)
    clip = read_clip(str(tmp_path), lambda num_frames, fps: np.arange(num_frames)).frames
    assert clip.shape == (3, 48, 64, 3)
    assert np.array_equal(clip[:, 0, 0], [[0, 90, 200], [20, 90, 200], [40, 90, 200]])


def test_pixels_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((48, 64), 4000, np.uint16)).save(tmp_path / "1.png")
    with pytest.raises(VideoError, match=r"frame 1\.png: its pixels have more than 8 bits"):
        read_clip(str(tmp_path), lambda num_frames, fps: [0])
