"""Videos that come as a folder of images, one per frame."""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.readers import Found, one_line, resized, scaled_size

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_DIGITS = str.maketrans("123456789", "000000000")
_NUMBER = re.compile(r"[0-9]+")
_NUMBER_OR_DECIMAL = re.compile(r"(?<![A-Za-z0-9.])[0-9]+\.[0-9]+(?![0-9.])|[0-9]+")  # 12.5 is a time, cam1.0001 is not
_MORE_COMPANIONS = 2  # images of one kind of companion that there may be more than frames
# Words in the names of images that tools write beside the frames; the axes only where a name has no other word.
_COMPANIONS = {"flow", "flowx", "flowy", "flows", "mask", "masks", "depth", "seg", "thumb", "thumbs", "thumbnail", "thumbnails", "cover", "poster", "preview"}
_AXES = {"x", "y", "u", "v"}


class FrameFolder:
    """The images of a folder in the order of the numbers in their names (img_2 before img_10).

    Their names must be alike but for the numbers. Where there are several sequences of names, as in img_1.jpg and
    flow_x_1.jpg, the one that is not a known companion of the frames is read.
    Only the frames that are asked for are opened. The files do not tell the rate, so `fps` and `times` are None.
    """

    name = "frames"
    index = None
    fps: float | None = None
    times: np.ndarray | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Names that begin with a dot are of the system, such as ._img_1.jpg.
            files = [file for file in os.listdir(path) if file.lower().endswith(_ENDINGS) and not file.startswith(".")]
        except OSError as error:
            raise VideoError(path, error.strerror or str(error)) from error
        if not files:
            raise VideoError(path, "it is a folder without jpg, png, bmp or webp files")
        # Where digits stand in the same places in all names, as in img_00001.jpg, order by letters is order by number.
        alike = len(set("/".join(files).translate(_DIGITS).split("/"))) == 1
        self.files = sorted(files) if alike else self._sequence(files)
        self._check_one_number_varies()
        self.num_frames = len(self.files)

    def _sequence(self, files: Sequence[str]) -> list[str]:
        """The frames among the files, in order."""
        sequences = Counter(map(_pattern, files))
        frames = [pattern for pattern in sequences if not _is_companion(pattern)] if len(sequences) > 1 else list(sequences)
        # Companions are about as many as the frames. If they are many more, they are the frames, beside some other image.
        if len(frames) != 1 or max(sequences.values()) > sequences[frames[0]] + min(_MORE_COMPANIONS, sequences[frames[0]] - 1):
            raise self._not_one_sequence(sequences)
        found = sorted((file for file in files if _pattern(file) == frames[0]), key=_numbers)
        for one, other in zip(found, found[1:]):
            if _numbers(one) == _numbers(other):
                raise VideoError(self.path, f"{min(one, other)} and {max(one, other)} are the same frame; leave only one of them in the folder")
        return found

    def _check_one_number_varies(self) -> None:
        """Raise VideoError if no number in the names is different in each, as in cam1_01.jpg, cam1_02.jpg, cam2_01.jpg, cam2_02.jpg."""
        start = len(os.path.commonprefix([self.files[0], self.files[-1]]).rstrip(string.digits))
        if len(_NUMBER.findall(os.path.splitext(self.files[0])[0][start:])) < 2:  # the usual case, decided quickly
            return
        stems = [os.path.splitext(file)[0] for file in self.files]
        columns = list(zip(*(_NUMBER_OR_DECIMAL.findall(stem) for stem in stems)))
        varying = [number for number, column in enumerate(columns) if len(set(column)) > 1]
        if len(varying) > 1 and all(len(set(columns[number])) < len(stems) for number in varying):
            raise self._not_one_sequence(Counter(_with_hash(stem, varying[-1]) for stem in stems))

    def _not_one_sequence(self, sequences: Counter[str]) -> VideoError:
        most = sorted(sequences.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{pattern} ({count})" for pattern, count in most[:5]) + (", ..." if len(most) > 5 else "")
        return VideoError(self.path, f"its images are not one sequence of frames: {shown}; leave only the frames in the folder")

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
                if image.mode.startswith(("I", "F")):  # depth maps, which would come out white
                    raise VideoError(self.path, f"frame {file}: it has more than 8 bits per channel; convert the frames to 8-bit images")
                size = size or scaled_size(*image.size, short_side)
                image.draft("RGB", size)  # libjpeg decodes at 1/2, 1/4 or 1/8 where that is still large enough
                # Converting makes a copy even of what is RGB.
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), size
        except (OSError, SyntaxError, ValueError) as error:
            # The message has the file's name without its folder at best.
            raise VideoError(self.path, f"frame {file}: {one_line(error)}") from error


def _pattern(file: str) -> str:
    """The name with # for each number, without what a file's format says."""
    return _NUMBER.sub("#", os.path.splitext(file)[0])


def _numbers(file: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(os.path.splitext(file)[0])]


def _with_hash(stem: str, place: int) -> str:
    """The name with # for one of its numbers."""
    number = list(_NUMBER_OR_DECIMAL.finditer(stem))[place]
    return f"{stem[: number.start()]}#{stem[number.end() :]}"


def _is_companion(pattern: str) -> bool:
    words = set(re.findall(r"[a-z]+", pattern.lower()))
    return bool(words & _COMPANIONS or words and words <= _AXES)
