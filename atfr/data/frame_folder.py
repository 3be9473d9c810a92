"""Videos that come as a folder of jpg files, one a frame."""

from __future__ import annotations

import os
import re

import numpy as np

from atfr.data.readers import Found, one_line, resized, scaled_size
from atfr.data.records import VideoError

_ENDINGS = (".jpg", ".jpeg")
_DIGITS = str.maketrans("123456789", "000000000")


class FrameFolder:
    """The jpg files of a folder in the order of their names, numbers in them by value (img_2 before img_10).

    Only the frames that are asked for are opened. How fast they were taken is nowhere written, so `fps` is None.
    """

    name = "frames"
    fps: float | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            files = [file for file in os.listdir(path) if file.lower().endswith(_ENDINGS) and not file.startswith(".")]
        except OSError as error:
            raise VideoError(path, error.strerror or str(error)) from error
        if not files:
            raise VideoError(path, "it is a folder without jpg files")
        # Where digits stand in the same places in all names, as in img_00001.jpg, order by letters is order by value.
        alike = len(set("/".join(files).translate(_DIGITS).split("/"))) == 1
        self.files = sorted(files, key=None if alike else _by_number)
        self.num_frames = len(files)

    def read(self, wanted: list[int], short_side: int | None, *, leap: bool = True) -> Found:
        size: tuple[int, int] | None = None
        pictures = []
        for position in wanted:
            picture, size = self._open(self.files[position], short_side, size)
            pictures.append(picture)
        alike = len({picture.shape for picture in pictures}) == 1  # or else they are of several cameras
        groups = [pictures] if alike else [[picture] for picture in pictures]
        return dict(zip(wanted, (frame for group in groups for frame in resized(np.stack(group), size)))), None

    def _open(self, file: str, short_side: int | None, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
        """uint8 [H, W, 3], not much larger than the (width, height) that follows: `size`, or what `short_side` makes of the frame's own."""
        from PIL import Image

        try:
            with Image.open(os.path.join(self.path, file)) as image:
                size = size or scaled_size(*image.size, short_side)
                image.draft("RGB", size)  # libjpeg decodes at 1/2, 1/4 or 1/8 where that is still large enough
                # Converting makes a copy even of what is RGB.
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), size
        except (OSError, SyntaxError, ValueError) as error:
            # The message has the file's name without its folder at best.
            raise VideoError(self.path, f"frame {file}: {one_line(error)}") from error


def _by_number(file: str) -> tuple[list[tuple[int, str]], str]:
    """A key to sort by: runs of digits by value, then the name itself where 1 and 01 are equal."""
    parts = re.split(r"([0-9]+)", file)
    return [(int(part), "") if i % 2 else (-1, part) for i, part in enumerate(parts)], file
