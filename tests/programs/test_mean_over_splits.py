"""The mean over splits: its figures, and the runs that it refuses."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest
import yaml
from run_tools import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import mean_over_splits  # noqa: E402

TOP1, BALANCED, GFLOPS = (80.0, 83.5, 79.25), (78.0, 83.0, 79.0), (1.5, 1.75, 1.625)


def run(folder, split, change=None):
    """A run folder of one split; `change` may edit its results and its config."""
    protocol = {"dataset": "ucf101", "views": 10, "model": {"size": "S"}, "official_split": split, "lists": {"test": f"testlist0{split}.txt"}}
    protocol |= {"videos": {"test": 100 + split}, "decoders": {"pyav": 100 + split}, "checkpoint": f"{folder}/best.pt", "commit": "abc"}
    results = {"top1": TOP1[split - 1], "mean_class_accuracy": BALANCED[split - 1], "gflops": {"mean": GFLOPS[split - 1]}, "protocol": protocol}
    config = {"dataset": {"name": "ucf101", "split": split}, "trainer": {"seed": 0, "output_dir": str(folder)}}
    if change:
        change(results, config)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(copy.deepcopy(results)))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return mean_over_splits.read(folder)


def test_the_table_has_each_split_in_order_and_the_mean_with_the_deviation_of_a_sample(tmp_path):
    lines = mean_over_splits.table([run(tmp_path / str(split), split) for split in (3, 1, 2)]).splitlines()
    assert [line.split()[0] for line in lines] == ["split", "1", "2", "3", "mean"]
    assert lines[1].split() == ["1", "80", "78", "1.5"]
    expected = " ".join(f"{np.mean(values):.4g} ± {np.std(values, ddof=1):.2g}" for values in (TOP1, BALANCED, GFLOPS))
    assert " ".join(lines[-1].split()) == f"mean of 3 {expected}"


REFUSED = {
    "other views": (lambda results, config: results["protocol"].update(views=3), "views is 10 and 3 in the protocol"),
    "another model": (lambda results, config: results["protocol"]["model"].update(size="M"), "model.size is 'S' and 'M' in the protocol"),
    "another seed": (lambda results, config: config["trainer"].update(seed=1), "trainer.seed is 0 and 1 in the config"),
    "the same split": (lambda results, config: results["protocol"].update(official_split=1), "1 and .*2 are both of split 1"),
    "no splits": (lambda results, config: results["protocol"].pop("official_split"), "2 is of dataset ucf101, which has no official splits"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_runs_that_differ_in_more_than_the_split_are_refused(tmp_path, fault):
    change, message = REFUSED[fault]
    with pytest.raises(ValueError, match=message):
        mean_over_splits.table([run(tmp_path / "1", 1), run(tmp_path / "2", 2, change)])


def test_one_run_has_no_mean(tmp_path):
    with pytest.raises(ValueError, match="at least two runs"):
        mean_over_splits.table([run(tmp_path / "1", 1)])
