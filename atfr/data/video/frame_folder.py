"""Read videos that are folders of images, one per frame."""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

from atfr.data.types import VideoError
from atfr.data.video.readers import ReadResult, one_line, resized, scaled_size

_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_DIGITS = str.maketrans("123456789", "000000000")
_NUMBER = re.compile(r"[0-9]+")
_NUMBER_OR_DECIMAL = re.compile(r"(?<![A-Za-z0-9.])[0-9]+\.[0-9]+(?![0-9.])|[0-9]+")  # 12.5 is a time, cam1.0001 is not
_MORE_COMPANIONS = 2  # one kind of companion may have this many more images than the frames
# Words in the names of images that tools write next to the frames; _AXES only if a name has no other word.
_COMPANIONS = {"flow", "flowx", "flowy", "flows", "mask", "masks", "depth", "seg", "thumb", "thumbs", "thumbnail", "thumbnails", "cover", "poster", "preview"}
_AXES = {"x", "y", "u", "v"}


class FrameFolder:
    """The images of a folder, sorted by the numbers in their names (img_2 before img_10).

    Names must differ only in numbers. Of several sequences, such as img_1.jpg and flow_x_1.jpg, the one that is not a
    known companion of frames is read. Only requested frames are opened. The rate is unknown.
    """

    name = "frames"
    index = None
    fps: float | None = None
    times: np.ndarray | None = None

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            # Names that begin with a dot, such as ._img_1.jpg, are system files.
            files = [file for file in os.listdir(path) if file.lower().endswith(_ENDINGS) and not file.startswith(".")]
        except OSError as error:
            raise VideoError(path, error.strerror or str(error)) from error
        if not files:
            raise VideoError(path, "it is a folder without jpg, png, bmp or webp files")
        # If all names have digits at the same positions, as in img_00001.jpg, alphabetical order is numerical order.
        alike = len(set("/".join(files).translate(_DIGITS).split("/"))) == 1
        self.files = sorted(files) if alike else self._sequence(files)
        self._check_one_number_varies()
        self.num_frames = len(self.files)

    def _sequence(self, files: Sequence[str]) -> list[str]:
        """Return the frames among the files, in order."""
        sequences = Counter(map(_pattern, files))
        frames = [pattern for pattern in sequences if not _is_companion(pattern)] if len(sequences) > 1 else list(sequences)
        # There are about as many companions as frames. If there are many more, they are probably the frames.
        if len(frames) != 1 or max(sequences.values()) > sequences[frames[0]] + min(_MORE_COMPANIONS, sequences[frames[0]] - 1):
            raise self._not_one_sequence(sequences)
        found = sorted((file for file in files if _pattern(file) == frames[0]), key=_numbers)
        for one, other in zip(found, found[1:]):
            if _numbers(one) == _numbers(other):
                raise VideoError(self.path, f"{min(one, other)} and {max(one, other)} are the same frame; leave only one of them in the folder")
        return found

    def _check_one_number_varies(self) -> None:
        """Raise VideoError if no number differs in all names, as in cam1_01.jpg, cam1_02.jpg, cam2_01.jpg, cam2_02.jpg."""
        start = len(os.path.commonprefix([self.files[0], self.files[-1]]).rstrip(string.digits))
        if len(_NUMBER.findall(os.path.splitext(self.files[0])[0][start:])) < 2:  # the usual case, checked quickly
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

    def read(self, wanted: list[int], short_side: int | None, *, seek: bool = True) -> ReadResult:
        size: tuple[int, int] | None = None
        pictures = []
        for position in wanted:
            picture, size = self._open(self.files[position], short_side, size)
            pictures.append(picture)
        if size is None:
            return {}, None  # no frame is wanted
        alike = len({picture.shape for picture in pictures}) == 1  # otherwise images differ in size
        groups = [pictures] if alike else [[picture] for picture in pictures]
        return dict(zip(wanted, (frame for group in groups for frame in resized(np.stack(group), size)))), None

    def _open(self, file: str, short_side: int | None, size: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
        """Open a frame: return uint8 [H, W, 3], at least as large as the size that follows: `size`, or by `short_side`."""
        from PIL import Image

        try:
            with Image.open(os.path.join(self.path, file)) as image:
                if image.mode.startswith(("I", "F")):  # depth maps, which would become white
                    raise VideoError(self.path, f"frame {file}: it has more than 8 bits per channel; convert the frames to 8-bit images")
                size = size or scaled_size(*image.size, short_side)
                image.draft("RGB", size)  # libjpeg decodes at 1/2, 1/4 or 1/8 if that is large enough
                # convert("RGB") copies even RGB images.
                return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), size
        except (OSError, SyntaxError, ValueError) as error:
            raise VideoError(self.path, f"frame {file}: {one_line(error)}") from error


def _pattern(file: str) -> str:
    """Replace each number in a name by #, and remove the suffix."""
    return _NUMBER.sub("#", os.path.splitext(file)[0])


def _numbers(file: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(os.path.splitext(file)[0])]


def _with_hash(stem: str, index: int) -> str:
    """Replace one of the numbers in a name by #."""
    number = list(_NUMBER_OR_DECIMAL.finditer(stem))[index]
    return f"{stem[: number.start()]}#{stem[number.end() :]}"


def _is_companion(pattern: str) -> bool:
    words = set(re.findall(r"[a-z]+", pattern.lower()))
    return bool(words & _COMPANIONS or words and words <= _AXES)
