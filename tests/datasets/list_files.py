"""Lists of videos, and files for them, that several tests write."""

from __future__ import annotations

import os

K400 = """label,youtube_id,time_start,time_end,split,is_cc
abseiling,0wR5jVB-WPk,417,427,val,0
"air drumming",-5ScotRN_I4,1,11,val,1
"massaging person's head",x_y,0,10,val,0
"""


def listed(videos, root):
    return [(os.path.relpath(video.path, root), video.label) for video in videos]


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def write(root, **files):
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)
