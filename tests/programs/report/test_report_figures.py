"""The figures of the page: a point for each run, and the Pareto front."""

from __future__ import annotations

import random
import re

import pytest

from atfr.models.sgs.functional import BASELINES
from atfr.report.compare import FIXED, pareto


def test_the_pareto_front_is_that_of_a_naive_loop():
    rng = random.Random(0)
    for _ in range(50):
        points = [(rng.randrange(8) / 4, float(rng.randrange(8))) for _ in range(rng.randrange(1, 20))]

        def beaten(point):
            return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

        front = pareto(points)
        assert sorted(front) == [index for index, point in enumerate(points) if not beaten(point)]
        assert [points[index] for index in front] == sorted(points[index] for index in front)


def test_the_front_and_what_it_buys_are_in_the_page(shown):
    front = next(rows for rows in shown[0].tables if rows[0][-1][0].startswith("More top-1"))[1:]
    assert [row[1][0] for row in front] == ["atfr gflops=0.3", "atfr gflops=0.5", "atfr gflops=0.7", "dense"]
    assert front[2][4][1] == pytest.approx(100 * (0.028 / 0.021 - 1))
    assert front[3][5][1] == pytest.approx(80.5 - 79.75)


def test_each_run_is_a_labelled_point_in_both_figures(shown):
    titles = re.findall(r"<title>(\d) ([^<]+): top-1 ([\d.]+)[^<]*?, ([\d.]+)[^<]* (GFLOPs|ms)</title>", shown[1])
    for unit in ("GFLOPs", "ms"):
        assert {int(number) for number, *_, of in titles if of == unit} == {1, 2, 3, 4, 5, 6}
    dense = {unit: float(cost) for _, label, _, cost, unit in titles if label == "dense"}
    assert dense == {"GFLOPs": 0.04, "ms": pytest.approx(1000 / 21.5, rel=1e-3)}
    assert "Pareto front" in shown[0].text and "% of the dense network" in shown[0].text
    for label in ("1 dense", "2 atfr gflops=0.7", "4 uniform gflops=0.5", "uniform: the same B' for all clips"):
        assert label in shown[0].text


def test_baselines_have_their_own_symbols():
    assert set(FIXED) == set(BASELINES) - {"none"}
