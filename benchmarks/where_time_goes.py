"""What the time of packed execution is spent on, by kind of operation, beside the dense network's.

    python benchmarks/where_time_goes.py [--models x3d-S slow-R50] [--batch 8] [--output FILE]

Runs the trunk operation by operation: the original ones on all T features (dense), and the packed ones
for clips that all keep T (packed T) and for B' spread evenly from 1 to T (packed uniform). `linear` is
dense x the share of features that the uniform clips keep: what uniform would cost if nothing were lost.
The stem, which comes before SGS, is the same in all. `trunk as one clip` runs the original operations on one
clip as long as all uniform ones with one feature between them: what the trunk would cost if every
operation shared gaps that stand from the sampling to the head, instead of moving features at each
operation that needs them. Medians in ms.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from adaptive_speed import OPTIONS, SUBJECTS, distributions
from torch import fx, nn

from atfr.models.graph.tracing import Traced
from atfr.utils.malloc import keep_freed_memory


class Timed(fx.Interpreter):
    """Runs a program and notes how long each operation took."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.seconds: dict[fx.Node, list[float]] = defaultdict(list)

    def run_node(self, node: fx.Node) -> object:
        began = time.perf_counter()
        result = super().run_node(node)
        self.seconds[node].append(time.perf_counter() - began)
        return result

    def by_kind(self) -> dict[str, float]:
        kinds: dict[str, float] = defaultdict(float)
        for node, values in self.seconds.items():
            kinds[self._kind(node)] += median(values) * 1e3
        return kinds

    def _kind(self, node: fx.Node) -> str:
        path = node.target if node.op == "call_module" else None
        if node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr":
            path = node.args[0].target
        if path is None:
            return getattr(node.target, "__name__", str(node.target))
        module = self.fetch_attr(path)
        if not isinstance(module, nn.Conv3d):
            return type(module).__name__
        size = "x".join(map(str, module.kernel_size))
        return f"Conv3d {size}{' depthwise' if module.groups > 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    keep_freed_memory()
    lines = [line for name in arguments.models for line in table(name, arguments.batch, arguments.rounds)]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


@torch.inference_mode()
def table(name: str, batch: int, rounds: int) -> list[str]:
    model = SUBJECTS[name].build(OPTIONS).eval()
    clips = torch.randn(batch, *SUBJECTS[name].clip).contiguous(memory_format=torch.channels_last_3d)
    features = model.run_stem(clips)
    frames = features[0].shape[2]
    uniform = dict(distributions(batch, frames, 1, None))["uniform"]
    dense, whole, mixed = Timed(Traced(model.dense_network, model.locations).plain_trunk()), Timed(model.packed_trunk), Timed(model.packed_trunk)
    one_clip = features[0].new_zeros(1, features[0].shape[1], sum(uniform) + batch - 1, *features[0].shape[3:]).contiguous(memory_format=torch.channels_last_3d)
    stem, shared = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        dense.module(one_clip)
        shared.append(time.perf_counter() - began)
        began = time.perf_counter()
        model.run_stem(clips)
        stem.append(time.perf_counter() - began)
        dense.run(features[0])  # behind it is the clip, which the sampling layer embeds
        whole.run(*features, [(frames,) * batch])
        mixed.run(*features, [uniform])
    columns = dense.by_kind(), whole.by_kind(), mixed.by_kind()
    share = sum(uniform) / (batch * frames)
    kinds = sorted({kind for column in columns for kind in column}, key=lambda kind: -max(column.get(kind, 0) for column in columns))
    rows = [("stem", [median(stem) * 1e3] * 3), ("all of the trunk", [sum(column.values()) for column in columns])]
    rows += [(kind, [column.get(kind, 0.0) for column in columns]) for kind in kinds[:12]]
    lines = [f"{name}, batch {batch}", f"{'':<28}{'dense':>9}{'packed T':>10}{'uniform':>9}{'linear':>9}"]
    for kind, (one, two, three) in rows:
        lines.append(f"{kind:<28}{one:>9.1f}{two:>10.1f}{three:>9.1f}{one * (1 if kind == 'stem' else share):>9.1f}")
    return [*lines, f"{'trunk as one clip':<28}{'':>19}{median(shared) * 1e3:>9.1f}", ""]


if __name__ == "__main__":
    main()
