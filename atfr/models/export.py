"""Exports a network as one file that runs without this package: torch.export's .pt2, or ONNX.

The exported program takes one clip of a fixed size, and B' depends on the data: the clip runs through the network's
original operations, and each SGS layer turns its features into B' of them. One clip needs no packed operations. A module
with a `packed_forward` is called by its `one_clip_forward(self, *pairs) -> (tensor, times)`, where each pair is an input
[1, C, B', H, W] and the times [B'] of its features.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from contextlib import contextmanager
from operator import getitem
from pathlib import Path
from typing import Callable, Iterator, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, fx, nn

from atfr.models.graph.tracing import Traced
from atfr.models.sgs.aggregate import aggregate, mean_times
from atfr.models.sgs.layer import SGS
from atfr.models.video_net import VideoNet

FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of a logit, in standard deviations of the logits
OPSET = 18

Bins = tuple[int, ...]
Run = Callable[[Tensor], tuple[Tensor, Bins]]  # a clip [1, 3, T, H, W] -> logits [1, classes] and B' of each layer


class ExportableNet(nn.Module):
    """`model` for one clip: [1, 3, T, H, W] -> logits [1, classes] and B' of each SGS layer, [layers] int64.

    It calls the model's own modules, in evaluation mode. For a dense network B' is T. A clip whose features hold a NaN or
    an infinity gives NaN logits; the model itself raises an error.

    Raises:
        ValueError: naming what cannot be exported: a layer behind another one, one without a bin
            width, the baseline `random`, or a module with a `packed_forward` and no `one_clip_forward`.
    """

    def __init__(self, model: VideoNet) -> None:
        super().__init__()
        self.program = _one_clip(model.eval()) if model.sgs else model.dense_network.eval()
        self.sampled = bool(model.sgs)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        if self.sampled:
            return self.program(clip)
        return self.program(clip), torch.full((1,), clip.shape[2], dtype=torch.int64, device=clip.device)


def _one_clip(model: VideoNet) -> fx.GraphModule:
    """Write the program of a network with SGS for one clip."""
    for layer in model.sgs.values():
        if layer.lacks_budget or (layer.has_width and layer.width.isnan()):
            raise ValueError(f"SGS after {layer.name!r} is not calibrated: train the network or call atfr.calibrate first")
        if layer.options.similarity == "random":
            raise ValueError("sgs.similarity=random cannot be exported: the exported file would draw other frames")
    traced = Traced(model.dense_network, model.locations, before_activation=next(iter(model.sgs.values())).options.before_activation)
    if len(traced.levels) > 1:
        behind = ", ".join(traced.cuts[cut] for cuts in traced.levels[1:] for cut in cuts)
        raise ValueError(f"a network whose SGS layers follow each other cannot be exported: {behind} samples features that were sampled before")
    graph, clip = fx.Graph(), None
    copies: dict[fx.Node, fx.Node] = {}
    times: dict[fx.Node, fx.Node | None] = {}  # None: of all frames
    kept: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "output":
            bins = graph.call_function(torch.cat, ([kept[cut] for cut in traced.cuts],))
            graph.output((copies[node.args[0]], bins))
            break
        module = model.dense_network.get_submodule(node.target) if node.op == "call_module" else None
        # Only a stride over time changes the times of kept features.
        times[node] = next((times[i] for i in node.all_input_nodes if times[i] is not None), None)
        if hasattr(module, "packed_forward"):
            _check_one_clip_form(model, module, node.target)
            pairs = [(copies[i], times[i]) for i in node.args]
            result = graph.call_function(_one_clip_forward, (graph.get_attr(node.target), *pairs))
            copies[node], times[node] = (graph.call_function(getitem, (result, i)) for i in range(2))
        elif isinstance(module, nn.AdaptiveAvgPool3d) and module.output_size == (None, 1, 1):  # for which ONNX has no operation
            copies[node] = graph.call_method("mean", (copies[node.args[0]], (3, 4)), {"keepdim": True})
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        clip = copies[node] if node.op == "placeholder" else clip
        if node in traced.cuts:
            layer = graph.get_attr("sgs." + traced.cuts[node].replace(".", "_"))
            result = graph.call_function(_keep, (layer, copies[node], clip))
            copies[node], times[node], kept[node] = (graph.call_function(getitem, (result, i)) for i in range(3))
    return traced.program(graph, "OneClip", {f"sgs.{key}": layer for key, layer in model.sgs.items()})


def _check_one_clip_form(model: VideoNet, module: nn.Module, path: str) -> None:
    if not hasattr(module, "one_clip_forward"):
        raise ValueError(f"{path} cannot be exported: {type(module).__name__} has a packed_forward, but no one_clip_forward")
    if model.execution != "packed" or any(time.windows for time in model.times.values()):
        raise ValueError(f"{path} cannot be exported: between SGS and {type(module).__name__} an operation over time changes which features there are")


def _one_clip_forward(module: nn.Module, *pairs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    """Call a module's one-clip form; an input that was not sampled has no times yet."""
    return module.one_clip_forward(*((x, torch.arange(x.shape[2], device=x.device, dtype=torch.float32) if times is None else times) for x, times in pairs))


def _keep(layer: SGS, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sample features [1, C, T, H, W]: the kept ones [1, C, B', H, W], their times [B'], and B' [1]."""
    proposal = layer(x, None, clip)
    bins = proposal.lengths[0].item()  # a symbol, of which torch.export has to know the bounds
    torch._check(bins >= layer.min_bins)
    torch._check(bins <= proposal.weights.shape[1])
    weights = proposal.weights.narrow(1, 0, bins)  # [1, B', T]
    times = mean_times(weights, torch.arange(x.shape[2], device=x.device)[None])
    kept = aggregate(x, weights)
    if layer.time is not None:
        index = torch.arange(bins, device=x.device)
        kept = layer.time(kept, times[0], index == 0, index == bins - 1, x.shape[2])
    return kept, times[0], proposal.lengths


def check_format(format: str) -> None:
    """Raise ValueError unless the format exists and its packages are installed."""
    if format not in FILES:
        raise ValueError(f"format={format!r} does not exist; choose one of {', '.join(FILES)}")
    missing = [name for name in ONNX_PACKAGES if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'format=onnx needs {", ".join(missing)}: pip install -e ".[onnx]", or take format=torch_export')


@torch.no_grad()
def export(model: VideoNet, clip: Tensor, path: Path, *, format: str) -> Run:
    """Write `model` for clips of the size of `clip` [1, 3, T, H, W] to `path`, and load that file.

    The model is put into evaluation mode and must be on the CPU.

    Raises:
        ValueError: see `check_format` and `ExportableNet`; or torch cannot export this network, with torch's reason.
    """
    check_format(format)
    net = ExportableNet(model).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        (_write_onnx if format == "onnx" else _write_torch_export)(net, clip, path)
    except Exception as error:  # of whatever type the part of torch that stumbled has
        choices = {(o.similarity, o.metric, o.kernel, o.embedding) for o in (layer.options for layer in model.sgs.values())}
        names = [f"similarity={s}, metric={m}, kernel={k}, embedding={e}" for s, m, k, e in choices] or ["no SGS"]
        raise ValueError(f"torch {torch.__version__} cannot export this network ({'; '.join(names)}) as {format}: {_reason(error)}") from error
    return (_read_onnx if format == "onnx" else _read_torch_export)(path)


def _write_torch_export(net: nn.Module, clip: Tensor, path: Path) -> None:
    program = torch.export.export(net, (clip,))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor found in the group")  # of weights in channels-last memory
        torch.export.save(program, path)


def _read_torch_export(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(clip: Tensor) -> tuple[Tensor, Bins]:
        with torch.no_grad():
            logits, bins = module(clip)
        return logits, tuple(bins.tolist())

    return run


def _write_onnx(net: nn.Module, clip: Tensor, path: Path) -> None:
    from onnxscript import opset18

    def stable_sort(x, stable=None, dim=-1, descending=False):
        """Sort by TopK of all values, which is stable, too; torch.onnx has no stable sort."""
        size = opset18.Gather(opset18.Shape(x), opset18.Constant(value_ints=[dim]))
        return opset18.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    with _quiet("onnxscript", "onnx_ir"):
        program = torch.onnx.export(
            net,
            (clip,),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["clip"],
            output_names=["logits", "bins"],
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        )
        program.save(path, external_data=False)  # one file


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Silence the messages of these loggers about constants that they fold or cannot fold."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(clip: Tensor) -> tuple[Tensor, Bins]:
        logits, bins = session.run(None, {"clip": clip.numpy()})
        return torch.from_numpy(logits), tuple(bins.tolist())

    return run


def _reason(error: BaseException) -> str:
    """Return the first line of the error that caused this one."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


class Compared(NamedTuple):
    """One clip, run by the model and by the exported file."""

    name: str
    bins: Bins
    exported_bins: Bins
    difference: float  # the largest of a logit, in standard deviations of the model's logits of all clips

    @property
    def equal(self) -> bool:
        return self.bins == self.exported_bins and self.difference <= TOLERANCE


@torch.no_grad()
def compare(model: VideoNet, run: Run, clips: Mapping[str, Tensor]) -> list[Compared]:
    """Run named clips [1, 3, T, H, W], one by one, by `model` and by `run`."""
    own, other = [model.eval()(clip, return_sampling=True) for clip in clips.values()], [run(clip) for clip in clips.values()]
    spread = torch.cat([logits for logits, _ in own]).std().clamp(min=1e-6)
    return [
        Compared(name, sampling.bins[0], bins, ((exported - logits).abs().max() / spread).item())
        for name, (logits, sampling), (exported, bins) in zip(clips, own, other)
    ]


def as_table(rows: Sequence[Compared]) -> str:
    """Format a line for each clip."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'clip':<{width}}  B' eager  B' exported  difference (standard deviations of a logit)"]
    for row in rows:
        own, exported = ("/".join(map(str, bins)) for bins in (row.bins, row.exported_bins))
        lines.append(f"{row.name:<{width}}  {own:>8}  {exported:>11}  {row.difference:.1e}{'' if row.equal else '  DIFFERS'}")
    return "\n".join(lines)
