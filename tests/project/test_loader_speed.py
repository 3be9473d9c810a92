"""benchmarks/loader_speed.py: what the loader is measured against does the same work."""

from __future__ import annotations

import runpy

import numpy as np
from run_tools import ROOT


def test_the_bare_libraries_read_the_frames_that_our_reader_reads_at_the_same_size(tmp_path):
    benchmark = runpy.run_path(str(ROOT / "benchmarks/loader_speed.py"))
    files = benchmark["write_forms"](tmp_path, 1, 90, None)
    assert len(files) == 4
    wanted = 8 + 6 * np.arange(benchmark["CLIP"].frames)
    for form, (video,) in files.items():
        bare, ours = (
            benchmark[settings].read(video.path, lambda num_frames, fps: wanted, short_side=200, key=()).frames.astype(int)
            for settings in ("BARE", "CLIP")
        )
        assert bare.shape == ours.shape == (len(wanted), 200, 266, 3), form
        assert np.abs(bare - ours).max() <= (1 if form == "jpg" else 0), form
        assert np.abs(ours[1:] - ours[:-1]).max() > 10, "frames that are alike tell nothing"
