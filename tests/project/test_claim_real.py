"""The studies on real videos: their statistics against loops, and the runs that they ask for."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from run_tools import ROOT

from atfr.cli.config import build, with_resolved_sgs
from atfr.models.factory import create_model
from atfr.models.sgs.config import SGSConfig
from atfr.models.sgs.functional import sampling_weights
from atfr.models.sgs.layer import SGS

sys.path.insert(0, str(ROOT / "studies" / "claim"))
import avletters  # noqa: E402
import claim_picture  # noqa: E402
import claim_report  # noqa: E402
import claim_rows  # noqa: E402
import jhmdb  # noqa: E402
import jhmdb_choice  # noqa: E402
import jhmdb_tuned  # noqa: E402


def test_holm_rejects_as_in_his_example_and_nothing_behind_the_first_that_holds():
    # Four hypotheses at 0.05: bounds 0.0125, 0.0167, 0.025, 0.05 in the order of their probabilities.
    assert claim_report.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert claim_report.holm([0.02, 0.001, 0.02]) == [True, True, True] and claim_report.holm([]) == []


def row(method: str, right: str, seed: int = 0) -> claim_rows.Predictions:
    return claim_rows.Predictions("" if method == "dense" else "stem", method, 0 if method == "dense" else 4, seed, 4.0, 0.5, right)


def test_a_difference_and_its_error_are_those_of_a_loop_over_groups():
    rng = np.random.default_rng(0)
    one, other, groups = rng.integers(0, 2, 60).astype(float), rng.integers(0, 2, 60).astype(float), rng.integers(0, 7, 60)
    mean = sum(a - b for a, b in zip(one, other)) / 60
    sums = [sum(a - b - mean for a, b, g in zip(one, other, groups) if g == group) for group in range(7)]
    error = math.sqrt(7 / 6 * sum(value**2 for value in sums)) / 60
    assert claim_report.paired(one, other, groups) == pytest.approx((100 * mean, 100 * error))


def test_the_table_averages_seeds_and_compares_those_that_both_methods_have():
    groups = np.array([0, 0, 1, 1])
    rows = [row("dense", "1111"), row("uniform", "1010"), row("atfr", "1110"), row("atfr", "0000", seed=1)]
    lines = claim_report.paired_table(rows, groups).splitlines()[2:]
    cells = {cell[2]: cell for line in lines if (cell := [part.strip() for part in line.split("|")[1:-1]])}
    assert cells["dense"][6:] == ["100.0", "", "", ""]
    assert cells["atfr"][3] == "2" and cells["atfr"][6] == "37.5"
    assert cells["atfr"][7].startswith("-25.0 ±") and cells["atfr"][8].startswith("+25.0 ±") and cells["atfr"][9] == ""


def test_rows_are_read_as_they_were_saved(tmp_path):
    rows = {one.key: one for one in (row("dense", "0110"), row("atfr", "1111", seed=2))}
    claim_rows.write_rows(tmp_path / "rows.csv", claim_rows.Predictions, list(rows.values()))
    assert claim_rows.saved_predictions(tmp_path / "rows.csv") == rows
    assert claim_rows.saved_predictions(tmp_path / "none.csv") == {}


def test_the_regression_predicts_classes_that_a_line_separates_in_folds_it_has_not_seen():
    labels = torch.arange(3).repeat(20)
    x = torch.eye(3)[labels] + 0.05 * torch.randn(60, 3)
    folds = torch.arange(60) // 20
    with torch.inference_mode():
        assert jhmdb.predictions(x.clone(), labels, folds).equal(labels)
        unknown = torch.where(folds == 0, 2, labels % 2)  # class 2 is in fold 0 alone
        assert not (jhmdb.predictions(x, unknown, folds)[folds == 0] == 2).any()


@pytest.mark.parametrize("method", avletters.METHODS)
def test_every_method_on_avletters_is_a_training_that_the_configs_know(method):
    command = avletters.Job("speakers", method, 0 if method == "dense" else 4, 1, 2).command(Path("videos"))
    overrides = [word for word in command[2:] if not word.startswith("trainer.output_dir")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides)
    assert config.dataset.test.endswith("speakers_2_test.csv") and config.trainer.seed == 1
    model = with_resolved_sgs(config.model)
    if method == "dense":
        assert model.get("sgs") is None
        return
    options = build(model.sgs, "model.sgs")
    assert isinstance(options, SGSConfig)
    assert options.keep_ratio == 0.25 or options.num_bins == 4
    assert options.time_embedding == ("time" in method) and (options.kernel == "middle") == ("middle" in method or "glance" in method)


@pytest.mark.parametrize("location", jhmdb.KEPT)
@pytest.mark.parametrize("method", jhmdb.METHODS)
def test_every_method_on_jhmdb_is_a_layer(location, method):
    kept = jhmdb.KEPT[location][0]
    options = jhmdb.options_of(location, method, kept, at=location)
    assert options.locations == (location,) and options.gflops is None
    assert kept in (options.num_bins, round((options.keep_ratio or 0) * (32 if location == "input" else 16))) or method == "reference"


@pytest.mark.parametrize("fixed", ["uniform", "stride"])
def test_as_many_features_are_those_that_the_fixed_method_keeps_at_each_number(fixed):
    method = f"{fixed}-as-many"
    layer = SGS(3, replace(jhmdb.METHODS[method], embed_from="features", width=0.5), name="stem")
    x = torch.randn(8, 3, 1, 4, 4) + torch.randn(8, 3, 16, 4, 4).cumsum(dim=2) * torch.linspace(0, 1, 8)[:, None, None, None, None]
    (proposal,) = jhmdb.decided(layer, method, x, x).proposals
    (content,) = jhmdb.decided(layer, "atfr", x, x).proposals
    assert proposal.lengths.equal(content.lengths) and len(set(proposal.lengths.tolist())) > 2 and not proposal.weights.equal(content.weights)
    for weights, kept in zip(proposal.weights, proposal.lengths.tolist()):
        expected, _ = sampling_weights(torch.zeros(1, 16, 1), num_bins=kept, similarity=fixed, kernel="mean")
        torch.testing.assert_close(weights[:kept], expected[0])
        assert not weights[kept:].any()


def test_numbers_by_content_are_held_against_the_same_numbers_in_every_order():
    rng = np.random.default_rng(0)
    hits, numbers, groups = {number: rng.integers(0, 2, 6).astype(float) for number in jhmdb.NUMBERS}, np.array([2, 2, 5, 3, 9, 5]), np.array([0, 0, 1, 1, 2, 2])
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in jhmdb.table_of_numbers(hits, numbers, groups).splitlines()[2:]]
    right = [hits[number][clip] for clip, number in enumerate(numbers)]
    orders = [[hits[number][clip] for clip, number in enumerate(order)] for order in permutations(numbers.tolist())]
    assert [float(cells[2]) for cells in shown] == pytest.approx([*(100 * hits[k].mean() for k in jhmdb.NUMBERS), 100 * np.mean(right), 100 * np.mean(orders)], abs=0.051)
    mean, error = claim_report.paired(np.array(right), np.mean(orders, axis=0), groups)
    assert shown[-2][3] == f"{mean:+.1f} ± {error:.1f}"


def test_an_embedding_that_learns_is_trained_anew_for_each_fold_on_the_others(monkeypatch):
    folds, labels, trained = torch.arange(9) % 3, torch.arange(9) % 2, []
    model = create_model("i3d_inception", 5, sgs=jhmdb.options_of("stem", "glance-equal", 5, at="stem"))
    (layer,) = model.sgs.values()
    first = layer.embedding.look[0].weight

    def train(embedding, pooled, labels, clips):
        trained.append((clips.tolist(), first.sum().item()))
        torch.nn.init.constant_(first, len(trained))

    def features(*_):
        return torch.nn.functional.one_hot(folds * 2 + labels, 6) * first[0, 0, 0, 0].item(), [(clip,) for clip in range(9)]

    monkeypatch.setattr(jhmdb, "train_embedding", train)
    monkeypatch.setattr(jhmdb, "features_behind", features)
    monkeypatch.setattr(jhmdb, "mean_cost", lambda model, data, bins: float(sum(kept for (kept,) in bins)))
    row = jhmdb.run(model, [], jhmdb.Clips(torch.zeros(9, 3, 2, 16, 16, dtype=torch.uint8), labels, folds, np.arange(9)), "stem", "glance-equal", 5)
    assert [clips for clips, _ in trained] == [[1, 2, 4, 5, 7, 8], [0, 2, 3, 5, 6, 8], [0, 1, 3, 4, 6, 7]]
    assert len({start for _, start in trained}) == 1 and row.gflops == 36 and row.bins == 4 and len(row.right) == 9


def test_the_embedding_on_jhmdb_learns_to_tell_the_classes_of_its_clips():
    torch.manual_seed(0)
    labels = torch.arange(32) % 2
    clips = torch.full((32, 3, 8, 16, 16), 100, dtype=torch.uint8)
    clips[labels == 1, 0, 4:] = 200  # half of the clips turn red
    embedding = SGS(3, jhmdb.options_of("input", "glance", 4, at="input"), name="input", num_classes=2).embedding
    pooled = embedding.pool(jhmdb.normalised(clips))
    jhmdb.train_embedding(embedding, pooled, labels, torch.arange(24))
    with torch.inference_mode():
        z = embedding(pooled)
        step = (z[:, 4] - z[:, 3]).norm(dim=1)
        logits, _ = embedding.glance(z[24:], torch.ones(8, 8, dtype=torch.bool))
    assert logits.argmax(dim=1).equal(labels[24:])
    assert step[labels == 1].min() > 5 * step[labels == 0].max()


def test_the_trained_blocks_go_on_where_the_frozen_layers_end():
    model = create_model("i3d_inception", 5, sgs=jhmdb.options_of("input", "atfr", 16, at="input")).eval()
    still = torch.randint(0, 255, (3, 3, 1, 64, 64), dtype=torch.uint8).expand(-1, -1, 32, -1, -1).clone()
    still[1:, :, 16:] += torch.randint(0, 20, (2, 3, 16, 64, 64), dtype=torch.uint8)
    data = jhmdb.Clips(still, torch.zeros(3), torch.zeros(3), np.arange(3))
    features = jhmdb_tuned.frozen_features(model, data, "input", "atfr", 16)
    with torch.inference_mode():
        logits, sampling = model(jhmdb.normalised(data.clips), return_sampling=True)
        blocks = torch.nn.Sequential(*(model.get_submodule(name) for name in jhmdb_tuned.TRAINED))
        found = jhmdb_tuned.logits(blocks, model.head, features.of_clips, torch.arange(3))
    assert len({one.shape[1] for one in features.of_clips}) > 1 and features.bins == pytest.approx(np.mean(sampling.bins))
    torch.testing.assert_close(found, logits, rtol=0, atol=0.01 * float(logits.std()))


def test_each_fold_is_predicted_by_blocks_that_were_trained_on_the_others(monkeypatch):
    features = [torch.randn(4, 1 + clip % 2, 2, 2) for clip in range(9)]
    folds, trained = torch.arange(9) % 3, []
    monkeypatch.setattr(jhmdb_tuned, "TRAINED", ("block",))
    monkeypatch.setattr(jhmdb_tuned, "train", lambda blocks, classifier, features, labels, clips: trained.append(clips))
    network = torch.nn.ModuleDict({"block": torch.nn.Identity(), "head": torch.nn.Linear(4, 400)})
    found = jhmdb_tuned.predictions(network, features, jhmdb.Clips(torch.empty(0), torch.arange(9) % 2, folds, np.arange(9)), seed=0)
    assert [sorted(folds[clips].unique().tolist()) for clips in trained] == [[1, 2], [0, 2], [0, 1]]
    torch.manual_seed(0)
    classifier = torch.nn.Linear(4, 2)
    assert found.tolist() == [int(classifier(one.mean(dim=(1, 2, 3))).argmax()) for one in features]


def test_the_lists_leave_each_speaker_or_repetition_out_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos = [avletters.Video(f"A/A{number}_{speaker}.mp4", "A", speaker, fold) for number in (1, 2, 3) for fold, speaker in enumerate(("Kate", "Yi", "Bill"))]
    for protocol, part in (("speakers", "_Yi"), ("repetitions", "A2")):
        avletters.write_lists(videos, protocol)
        test, train = ((tmp_path / avletters.LISTS / f"{protocol}_1_{split}.csv").read_text().splitlines()[1:] for split in ("test", "train"))
        assert len(test) == 3 and all(part in line for line in test)
        assert len(train) == 6 and not set(test) & set(train)


def test_the_picture_knows_every_method_that_it_has_a_row_of_and_the_error_over_groups(tmp_path):
    for rows in (claim_rows.saved_predictions(claim_picture.ROOT / f"studies/claim/{name}.csv").values() for name in ("avletters", "jhmdb_tuned")):
        assert rows and all(claim_picture.style_of(row.method) or row.method == "stride-as-many" for row in rows)
    assert claim_picture.style_of("atfr-middle-time") == "atfr-middle" and claim_picture.style_of("atfr-0.4") == "atfr"
    assert [claim_picture.style_of(name) for name in ("equal-6", "atfr-middle-time-equal", "glance-equal-7")] == ["equal", "equal", "glance-equal"]
    assert claim_picture.style_of("glance-mean-0.36") == "glance" and not any(map(claim_picture.style_of, ("warm", "strides-4", "stride-as-many")))
    (point,) = claim_picture.real([row("stride", "1100"), row("stride", "1000", seed=1)], np.array([0, 0, 1, 1]))
    assert point[:4] == ("stride", "stem", 0.5, 37.5) and point.error == pytest.approx(37.5)  # the groups have 75 and 0 % right
    generated = claim_picture.generated([r for r in claim_rows.saved() if r.data.startswith("distractors")])
    assert {point.method for point in generated} >= {"dense", "glance-0.36", "uniform-6"}
    claim_picture.draw([generated, [point], [point]], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_point_far_below_the_others_does_not_squeeze_them():
    points = [claim_picture.Point("m", "", 0.5, top1, 1.0) for top1 in (100.0, 16.0, 90.0, 85.0)]
    drawn, below = claim_picture.apart(points)
    assert [point.top1 for point in drawn] == [85, 90, 100] and [point.top1 for point in below] == [16]
    assert claim_picture.apart(points[2:]) == (points[:1:-1], [])


def test_the_points_of_a_method_are_one_curve_from_the_cheapest_on_and_locations_are_apart():
    points = [claim_picture.Point(*values, 50.0, 1.0) for values in (("stride-6", "", 0.5), ("stride-4", "", 0.3), ("atfr", "stem", 0.5), ("atfr", "input", 0.5))]
    assert [[p.gflops for p in curve] for curve in claim_picture.curves(points)] == [[0.3, 0.5], [0.5], [0.5]]


def test_each_way_to_choose_half_of_the_frames_is_a_cut_into_parts_and_its_middles():
    cuts = jhmdb_choice.random_cuts(3)
    frames = jhmdb_choice.middles(cuts)
    assert frames[:, 0].eq(torch.arange(0, 32, 2)).all()
    assert not cuts[0, 1].equal(cuts[0, 2]) and not cuts[0, 1].equal(cuts[1, 1])
    for cut, middle in zip(cuts.flatten(0, 1).tolist(), frames.flatten(0, 1).tolist()):
        parts = [list(range(begin, end)) for begin, end in zip(cut, cut[1:])]
        assert sum(parts, []) == list(range(32)) and len(parts) == 16
        assert middle == [part[(len(part) - 1) // 2] for part in parts]


def test_the_variance_within_parts_is_that_of_a_loop_over_them():
    z, cuts = torch.randn(2, 32, 5), jhmdb_choice.random_cuts(2)
    for clip, costs in enumerate(jhmdb_choice.within_bins(z, cuts)):
        for cut, cost in zip(cuts[clip].tolist(), costs):
            parts = [z[clip, begin:end] for begin, end in zip(cut, cut[1:])]
            assert cost == pytest.approx(sum(float((part - part.mean(dim=0)).square().sum()) for part in parts), abs=1e-3)


def test_features_of_chosen_frames_are_those_of_each_clip_and_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(jhmdb_choice, "FEATURES", tmp_path)
    model = torch.nn.Module()
    model.head = torch.nn.Identity()
    ran = []
    model.forward = lambda x: ran.append(len(x)) or model.head(x.mean(dim=(3, 4)).flatten(1))
    data = jhmdb.Clips(torch.randint(0, 255, (4, 3, 32, 2, 2), dtype=torch.uint8), torch.zeros(4), torch.zeros(4), np.arange(4))
    frames = jhmdb_choice.middles(jhmdb_choice.random_cuts(4))
    jhmdb_choice.features(model, data, frames[:2], "ways")
    found = jhmdb_choice.features(model, data, frames, "ways")
    assert ran == [12] * 4
    for clip in range(4):
        for way in range(12):
            alone = jhmdb.normalised(data.clips[clip])[:, frames[clip, way]].mean(dim=(2, 3)).flatten()
            torch.testing.assert_close(found[clip, way], alone, rtol=0, atol=1e-3)  # kept in half precision


def test_the_oracle_of_numbers_spends_half_where_it_brings_features_nearer():
    torch.manual_seed(0)
    needs = torch.arange(40) % 2 == 0  # these lose much with few frames, the others nothing
    dense = torch.randn(40, 1, 6)
    even = {number: dense + needs[:, None, None] * (32 - number) / 32 * torch.randn(40, 1, 6) for number in jhmdb_choice.NUMBERS}
    data = jhmdb.Clips(torch.empty(0), torch.arange(40) % 4 // 2, torch.arange(40) // 20, np.arange(40))
    *equal, oracle = jhmdb_choice.of_how_many(even, data)
    assert [choice.frames for choice in equal] == [4, 8, 32]
    assert oracle.frames <= 16 and oracle.distance < (even[16] - dense).square().mean() / 2


def test_merge_costs_of_a_fold_are_learned_without_it(monkeypatch):
    monkeypatch.setattr(jhmdb_choice, "EPOCHS", 1)
    folds = torch.arange(6) % 3
    data = jhmdb.Clips(torch.randint(0, 255, (6, 3, 32, 16, 16), dtype=torch.uint8), torch.zeros(6), folds, np.arange(6))
    distance, cuts = torch.rand(6, 12) + 0.1, jhmdb_choice.random_cuts(6)
    found, fitted = jhmdb_choice.learned_costs(distance, cuts, data)
    distance[folds == 1] = torch.nan  # of fold 1, on which the embedding for fold 1 must not depend
    again, spoilt = jhmdb_choice.learned_costs(distance, cuts, data)
    assert again[folds == 1].equal(found[folds == 1]) and found.isfinite().all() and fitted.isfinite().all()
    assert again[folds != 1].isnan().all() and spoilt.isnan().any()


def test_choices_are_averaged_compared_and_taken_where_their_cost_is_least(monkeypatch):
    monkeypatch.setattr(jhmdb_choice, "predictions", lambda x, labels, folds: x.argmax(dim=1))
    monkeypatch.setattr(jhmdb_choice, "WAYS", 3)
    data = jhmdb.Clips(torch.empty(0), torch.tensor([0, 1]), torch.arange(2), np.arange(2))
    ways = torch.eye(2)[torch.tensor([[0, 0, 1], [0, 1, 1]])]  # [N, ways, D]: what each way is taken for
    distance = torch.tensor([[0.5, 0.9, 0.1], [0.5, 0.9, 0.4]])
    second, random, by_cost, oracle = jhmdb_choice.of_which(ways, distance, {"cost": torch.tensor([[3.0, 1.0, 2.0]] * 2)}, data)
    assert (second.hits.tolist(), random.hits.tolist()) == ([1, 0], [0.5, 1])
    assert (by_cost.hits.tolist(), oracle.hits.tolist()) == ([1, 1], [0, 1])
    assert (random.distance, by_cost.distance, oracle.distance) == pytest.approx((0.575, 0.9, 0.25))
    lines = jhmdb_choice.table([second, by_cost], data).splitlines()
    assert lines[2].endswith("| 0.50 | 50.0 |  |") and lines[3].endswith("| 0.90 | 100.0 | +50.0 ± 50.0 |")
