"""Optimizers and schedules, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from composed_configs import composed
from omegaconf import OmegaConf
from run_tools import run_tool, small_job
from torch import nn

from atfr.cli.builders import clip_settings
from atfr.cli.config import build, with_resolved_sgs
from atfr.engine.optim import adamw, cosine, load_optimizer, multistep, sgd, start_from_zero, step

BETAS = (0.9, 0.99)
NAN, INF = math.nan, math.inf


class Net(nn.Module):
    """Structured like a VideoNet: the modules of a network that ends in its classifier, and SGS with weights after them."""

    def __init__(self) -> None:
        super().__init__()
        self._network = (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)),)
        for name, module in self.dense_network.named_children():
            self.add_module(name, module)
        self.sgs = nn.Linear(3, 3)

    @property
    def dense_network(self) -> nn.Sequential:
        return self._network[0]

    def forward(self, x):
        return self.dense_network[2](self.sgs(self.dense_network[:2](x)))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_every_parameter_takes_the_step_of_torchs_optimizer_with_its_rate_and_decay(kind):
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    if kind == "sgd":
        optimizer = sgd(ours, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, head_lr=10)
        alone = lambda p, lr, decay: torch.optim.SGD([p], lr=lr, momentum=0.9, weight_decay=decay, nesterov=True)  # noqa: E731
    else:
        optimizer = adamw(ours, lr=0.1, betas=BETAS, weight_decay=0.01, head_lr=10)
        alone = lambda p, lr, decay: torch.optim.AdamW([p], lr=lr, betas=BETAS, weight_decay=decay)  # noqa: E731
    singles = [alone(p, 1.0 if name.startswith("2.") else 0.1, 0.01 if p.dim() > 1 else 0.0) for name, p in theirs.named_parameters()]
    for _ in range(3):
        x = torch.randn(8, 4)
        for model in (ours, theirs):
            model.zero_grad()
            model(x).square().mean().backward()
        for each in (optimizer, *singles):
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, msg=name)


def test_without_head_lr_the_head_has_no_groups_of_its_own():
    assert len(sgd(Net(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True).param_groups) == 2


def test_after_the_warm_up_the_step_schedules_are_torchs():
    def reference(schedule):
        factors = []
        for _ in range(100):
            factors.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return factors

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = reference(torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[60, 85], gamma=0.2))
    got = [multistep(warmup=0.0, start_factor=0.1, milestones=[0.6, 0.85], gamma=0.2)(i, 100) for i in range(100)]
    assert got == pytest.approx(expected)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    expected = reference(torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.2))
    got = [step(warmup=0.0, start_factor=0.1, every=0.3, gamma=0.2)(i, 100) for i in range(100)]
    assert got == pytest.approx(expected)
    assert [step(warmup=0.1, start_factor=0.5, every=0.3, gamma=0.2)(i, 100) for i in (0, 5, 10, 29, 30)] == pytest.approx([0.5, 0.75, 1, 1, 0.2])


def test_the_cosine_after_the_warm_up_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
    falls = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80, eta_min=0.05)
    expected, schedule = [], torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, falls], milestones=[20])
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [cosine(warmup=0.2, start_factor=0.1, end_factor=0.05)(i, 100) for i in range(100)] == pytest.approx(expected)


def test_a_cosine_from_the_start_is_that_of_slowfast():
    """From its paper: base * 0.5 * (cos(n / n_max * pi) + 1), after a linear warm-up that ends on this curve."""
    total, warm, base = 196, 34, 0.1
    curve = [base * 0.5 * (math.cos(n / total * math.pi) + 1) for n in range(total)]
    expected = [0.01 + (curve[warm] - 0.01) * n / warm for n in range(warm)] + curve[warm:]
    got = [base * cosine(warmup=warm / total, start_factor=0.1, end_factor=0.0, from_start=True)(n, total) for n in range(total)]
    assert got == pytest.approx(expected) and max(got) < 0.095


@pytest.mark.parametrize(
    "group,key,values",
    [
        *((f"optimizer={kind}", f"optimizer.{name}", (-0.1, NAN, INF)) for kind in ("sgd", "adamw") for name in ("lr", "weight_decay", "head_lr")),
        ("optimizer=sgd", "optimizer.momentum", (-0.1, 1.0, NAN, 0)),  # 0: with nesterov
        ("optimizer=adamw", "optimizer.betas", ([0.9], [0.9, 1.0], [-0.1, 0.9], [NAN, 0.9])),
        *((f"schedule={kind}", "schedule.warmup", (-0.1, 1.0, NAN)) for kind in ("cosine", "multistep", "step")),
        *((f"schedule={kind}", "schedule.start_factor", (-0.1, NAN, INF)) for kind in ("cosine", "multistep", "step")),
        ("schedule=cosine", "schedule.end_factor", (-0.1, NAN, INF)),
        *((f"schedule={kind}", "schedule.gamma", (0, -0.1, 1.1, NAN)) for kind in ("multistep", "step")),
        ("schedule=multistep", "schedule.milestones", ([0.6, 1.5], [0], [NAN])),
        ("schedule=step", "schedule.every", (0, 30, NAN)),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key(group, key, values):
    part, config = group.split("=")[0], composed(group)
    extra = {"model": Net()} if part == "optimizer" else {}
    build(config[part], part, **extra)
    for value in values:
        OmegaConf.update(config, key, value)
        with pytest.raises(ValueError, match=key):
            build(config[part], part, **extra)


@pytest.mark.parametrize(
    "key,values",
    [
        *((f"trainer.{name}", (-1, NAN)) for name in ("timeout_s", "workers", "batch_size", "skip_nonfinite", "label_smoothing")),
        *((f"trainer.{name}", (0, -1, NAN, INF)) for name in ("mixup", "cutmix", "clip_norm", "ema")),
        *((f"dataset.clip.{name}", (0, -1, NAN, INF)) for name in ("fps", "fallback_fps")),
        *((f"dataset.clip.{name}", (-0.1, 1.1, NAN)) for name in ("flip", "erasing")),
        ("dataset.clip.train_scale", ([0, 1], [0.5, NAN], [0.5, 2])),
        ("dataset.clip.color_jitter", ([0.4, NAN, 0.4, 0.1], [0.4, 0.4, -1, 0.1], [INF, 0, 0, 0])),
        ("dataset.clip.mean", ([0.4, NAN, 0.4],)),
        ("dataset.clip.std", ([0.2, NAN, 0.2], [0.2, 0, 0.2], [INF, 1, 1])),
        *((f"model.sgs.{name}", (0, -1, NAN, INF)) for name in ("width", "gflops", "keep_ratio")),
        ("model.sgs.cost_exponent", (-0.1, NAN, 1.5)),
        ("model.sgs.gflops_range", ([0, 1], [NAN, 1], [0.2, INF])),
    ],
)
def test_other_values_out_of_range_are_refused_with_their_name(key, values):
    (part, _, name), config = key.rpartition("."), composed()
    for value in values:
        OmegaConf.update(config, key, value)
        with pytest.raises(ValueError, match=name):
            clip_settings(config) if part == "dataset.clip" else with_resolved_sgs(config.model) if part == "model.sgs" else build(config[part], part)


def test_a_dropout_out_of_range_is_refused():
    for value in ("-0.1", "1.0", "nan"):
        outcome = run_tool("flops", f"model.dropout={value}")
        assert outcome.code == 1 and outcome.err.startswith("error: model.dropout must be at least 0 and below 1"), outcome.err


def test_a_network_trains_with_another_rate_for_its_head(small_videos, tmp_path):
    more = ("optimizer=adamw", "optimizer.head_lr=10", "trainer.test=false", "trainer.max_steps=1")
    outcome = run_tool("train", *small_job(small_videos, tmp_path, *more))
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_that_starts_from_zero_makes_the_same_steps(nesterov):
    steps = []
    for start in (lambda optimizer: None, start_from_zero):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
        start(optimizer)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        steps.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize("saved,own", [(True, None), (None, True)], ids=["GPU to CPU", "CPU to GPU"])
def test_a_state_from_another_device_leaves_it_to_this_one_whether_the_step_is_fused(saved, own):
    def after_a_step(fused: bool | None) -> torch.optim.Optimizer:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)  # torch fuses on CPUs, too
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        return optimizer

    state, optimizer = after_a_step(saved).state_dict(), after_a_step(own)
    load_optimizer(optimizer, state)
    assert [group["fused"] for group in optimizer.param_groups] == [own]
    optimizer.step()
    torch.testing.assert_close([s["step"].item() for s in optimizer.state.values()], [2.0] * len(optimizer.state))
