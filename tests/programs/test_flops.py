"""tools/flops.py: its table and its JSON."""

from __future__ import annotations

import json

from run_tools import run_tool


def test_flops_prints_a_table_and_json():
    clip = ("~experiment", "model.size=tiny", "dataset=synthetic", "dataset.clip.frames=4", "dataset.clip.crop_size=32")
    outcome = run_tool("flops", *clip, "json=true")
    values = json.loads(outcome.out.strip().splitlines()[-1])
    assert values.keys() == {"params", "dense_gflops", "gflops_by_bins"} and len(values["gflops_by_bins"]) == 4
    outcome = run_tool("flops", *clip, "model.sgs.num_bins=2", "json=true")
    assert list(json.loads(outcome.out.strip().splitlines()[-1])["gflops_by_bins"]) == ["1", "2"]
    outcome = run_tool("flops", *clip, "model=x3d")
    assert "dense GFLOPs" in outcome.out and "one multiply-add = one FLOP" in outcome.out
