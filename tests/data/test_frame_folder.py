"""Folders of images: which of them are the frames, in which order, and what is read of them."""

import os

import numpy as np
import pytest
from PIL import Image
from torchvision.io import decode_image
from video_files import write_jpgs

from atfr.data.types import VideoError
from atfr.data.video import decode
from atfr.data.video.frame_folder import FrameFolder


def read_clip(*arguments, **options):
    return decode.read_clip(*arguments, **options).frames


def chosen(*indices):
    return lambda num_frames, fps: np.array(indices)


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
        ([f"cover_drive_{number:04}.jpg" for number in range(20)] + ["readme.png"], "cover_drive_# (20), readme (1)"),
        (["preview_1.jpg", "preview_2.jpg", "notes.jpg"], "preview_# (2), notes (1)"),
        ([f"cam{camera}_{number:04}.jpg" for camera in (1, 2) for number in range(1, 11)], "sequence of frames: cam1_# (10), cam2_# (10); leave"),
        ([f"cam{camera}.{number:04}.jpg" for camera in (1, 2) for number in range(1, 11)], "cam1.# (10), cam2.# (10)"),
        ([f"{number}_cam{camera}.jpg" for camera in (1, 2) for number in (9, 10)], "10_cam# (2), 9_cam# (2)"),
        (["cam1_01.jpg", "cam1_02.jpg", "cam10_01.jpg", "cam10_02.jpg"], "cam10_# (2), cam1_# (2)"),
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
        ["0.5.png", "1.0.png", "1.5.png", "2.0.png"],  # seconds
        ["frame_0.00.png", "frame_0.50.png", "frame_1.00.png", "frame_1.50.png"],
        ["img_1_t0.jpg", "img_2_t0.jpg", "img_3_t1.jpg"],
        ["1_720p.jpg", "10_720p.jpg"],
        ["b2.jpg", "b10.jpg"],
        ["x_001.jpg", "x_002.jpg", "x_010.jpg"],
        ["img_1a.jpg", "img_10a.jpg"],
        ["1 x 09.jpg", "1 x 10.JPG", "02 x 1.jpeg"],
        ["only.bmp"],
    ],
)
def test_images_whose_names_differ_in_numbers_only_are_one_sequence_in_the_order_of_their_values(tmp_path, names):
    touch(tmp_path, names)
    assert FrameFolder(str(tmp_path)).files == names


@pytest.mark.parametrize("ending", ["png", "bmp", "webp"])
def test_frames_may_be_of_other_formats_than_jpg(tmp_path, ending):
    for number in range(3):
        Image.new("RGB", (64, 48), (20 * number, 90, 200)).save(tmp_path / f"{number}.{ending}", lossless=True)
    clip = read_clip(str(tmp_path), lambda num_frames, fps: np.arange(num_frames))
    assert clip.shape == (3, 48, 64, 3)
    assert np.array_equal(clip[:, 0, 0], [[0, 90, 200], [20, 90, 200], [40, 90, 200]])


def test_pixels_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((48, 64), 4000, np.uint16)).save(tmp_path / "1.png")
    with pytest.raises(VideoError, match=r"frame 1\.png: it has more than 8 bits per channel; convert the frames to 8-bit images"):
        read_clip(str(tmp_path), lambda num_frames, fps: [0])


def test_a_folder_of_jpgs_is_read_in_the_order_of_its_numbers(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (12, 48, 64, 3), dtype=np.uint8)
    path = write_jpgs(tmp_path / "frames", frames)
    seen = []
    clip, decoder, *_ = decode.read_clip(path, lambda num_frames, fps: seen.append((num_frames, fps)) or np.array([10, 0, 1, 1]))
    assert seen == [(12, None)] and decoder == "frames" and clip.dtype == np.uint8
    for frame, number in zip(clip, (11, 1, 2, 2), strict=True):  # img_10 comes after img_9, not after img_1
        expected = decode_image(os.path.join(path, f"img_{number}.jpg")).permute(1, 2, 0).numpy()
        assert np.abs(frame.astype(int) - expected).max() <= 2


def test_frames_of_a_folder_are_scaled_and_coloured_alike(tmp_path):
    path = write_jpgs(tmp_path / "frames", np.full((3, 96, 128, 3), 90, dtype=np.uint8))
    Image.new("L", (200, 100), 90).save(os.path.join(path, "img_3.jpg"))  # gray, and of another size
    clip = read_clip(path, chosen(0, 2), short_side=24)
    assert clip.shape == (2, 24, 32, 3) and np.abs(clip.astype(int) - 90).max() <= 2


def test_frames_of_a_folder_are_scaled_as_pillow_scales_them(tmp_path):
    path = write_jpgs(tmp_path / "frames", np.random.default_rng(0).integers(0, 256, (3, 96, 128, 3), dtype=np.uint8))
    clip = read_clip(path, chosen(2, 0), short_side=57)
    for frame, number in zip(clip, (3, 1), strict=True):
        expected = Image.open(os.path.join(path, f"img_{number}.jpg")).resize((76, 57), Image.Resampling.BILINEAR)
        assert np.abs(frame.astype(int) - np.asarray(expected)).max() <= 1


def test_only_the_frames_wanted_are_opened_and_a_bad_one_is_named(tmp_path):
    path = write_jpgs(tmp_path / "frames", np.zeros((4, 48, 64, 3), dtype=np.uint8))
    whole = (tmp_path / "frames" / "img_2.jpg").read_bytes()
    (tmp_path / "frames" / "img_2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "frames" / "img_3.jpg").write_text("no picture")
    assert read_clip(path, chosen(0, 3)).shape == (2, 48, 64, 3)
    for position, name in ((1, "img_2.jpg"), (2, "img_3.jpg")):
        with pytest.raises(VideoError, match=f"cannot read {path}: frame {name}: "):
            read_clip(path, chosen(0, position))
