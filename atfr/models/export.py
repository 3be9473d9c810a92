"""A network as one file that runs without this package: torch.export's .pt2, or ONNX.

What is exported takes one clip of a fixed size and keeps B' a matter of the data: the clip goes
through the network's original operations, and at each SGS layer its features become B' of them.
One clip needs no packed forms, but for SlowFast's fusion, which depends on what was kept.
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

from atfr.models.backbones.slowfast import Fusion
from atfr.models.graph.tracing import Traced
from atfr.models.sgs.aggregate import aggregate, mean_times
from atfr.models.sgs.layer import SGS
from atfr.models.video_net import VideoNet

FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}  # what each format is written to
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # of a logit, in standard deviations of the logits
OPSET = 18

Bins = tuple[int, ...]
Run = Callable[[Tensor], tuple[Tensor, Bins]]  # a clip [1, 3, T, H, W] -> logits [1, classes] and B' of each layer


class ExportableNet(nn.Module):
    """`model` for one clip: [1, 3, T, H, W] -> logits [1, classes] and B' of each SGS layer, [layers] int64.

    It has the model's own modules, in evaluation mode. A dense network says T for B'. A clip whose
    features hold a NaN or an infinity gives NaN logits, where the model itself raises.

    Raises:
        ValueError: naming what cannot be exported: a layer behind another one, one without a bin
            width, the baseline `random`, or a module with a packed form of its own (but for
            SlowFast's fusion).
    """

    def __init__(self, model: VideoNet) -> None:
        super().__init__()
        self.program = _one_clip(model.eval()) if model.sgs else model.backbone.eval()
        self.sampled = bool(model.sgs)

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor]:
        if self.sampled:
            return self.program(clip)
        return self.program(clip), torch.full((1,), clip.shape[2], dtype=torch.int64, device=clip.device)


def _one_clip(model: VideoNet) -> fx.GraphModule:
    """The program of a network with SGS, for one clip: see ExportableNet."""
    for layer in model.sgs.values():
        if layer.options.scale == "absolute" and layer.width.isnan():
            raise ValueError(f"SGS after {layer.name!r} has no bin width yet: train the network, or set model.sgs.width")
        if layer.options.similarity == "random":
            raise ValueError("model.sgs.similarity=random cannot be exported: torch would export the drawing, not what was drawn")
    traced = Traced(model.backbone, model.places, root=model, before_activation=next(iter(model.sgs.values())).options.before_activation)
    if len(traced.levels) > 1:
        behind = ", ".join(traced.cuts[cut] for cuts in traced.levels[1:] for cut in cuts)
        raise ValueError(f"a network whose SGS layers follow each other cannot be exported: {behind} samples what was sampled already")
    graph, copies, times, kept, clip = fx.Graph(), {}, {}, {}, None
    for node in traced.nodes:
        if node.op == "output":
            bins = graph.call_function(torch.cat, ([kept[cut] for cut in traced.cuts],))
            graph.output((copies[node.args[0]], bins))
            break
        module = model.backbone.get_submodule(node.target) if node.op == "call_module" else None
        # The times of kept features stay as they are behind everything that does not stride along time.
        times[node] = next((times[i] for i in node.all_input_nodes if times[i] is not None), None)
        if hasattr(module, "packed_forward"):
            _check_fusion(model, module, node.target)
            slow, fast = node.args
            inputs = (graph.get_attr(traced.path(node)), copies[slow], times[slow], copies[fast], times[fast])
            fused = graph.call_function(_fuse, inputs)
            copies[node], times[node] = (graph.call_function(getitem, (fused, i)) for i in range(2))
        elif isinstance(module, nn.AdaptiveAvgPool3d) and module.output_size == (None, 1, 1):  # for which ONNX has no operation
            copies[node] = graph.call_method("mean", (copies[node.args[0]], (3, 4)), {"keepdim": True})
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = traced.path(node)
        clip = copies[node] if node.op == "placeholder" else clip
        if node in traced.cuts:
            layer = graph.get_attr("sgs." + traced.cuts[node].replace(".", "_"))
            result = graph.call_function(_keep, (layer, copies[node], clip))
            copies[node], times[node], kept[node] = (graph.call_function(getitem, (result, i)) for i in range(3))
    return fx.GraphModule(model, graph, "OneClip")


def _check_fusion(model: VideoNet, module: nn.Module, path: str) -> None:
    if not isinstance(module, Fusion):
        raise ValueError(f"{path} cannot be exported: {type(module).__name__} has a packed form of its own, which is not known here")
    if model.execution != "packed" or any(time.windows for time in model.times.values()):
        raise ValueError(f"{path} cannot be exported: between SGS and this fusion the features are not those that were kept")


def _keep(layer: SGS, x: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features [1, C, T, H, W] -> the kept ones [1, C, B', H, W], their times [B'], and B' [1]."""
    proposal = layer(x, None, clip)
    bins = proposal.lengths[0].item()  # from here on a number that the compiler knows these bounds of
    torch._check(bins >= layer.min_bins)
    torch._check(bins <= proposal.weights.shape[1])
    weights = proposal.weights.narrow(1, 0, bins)  # [1, B', T]
    times = mean_times(weights, torch.arange(x.shape[2], device=x.device)[None])
    return aggregate(x, weights), times[0], proposal.lengths


def _fuse(fusion: Fusion, slow: Tensor, slow_times: Tensor | None, fast: Tensor, fast_times: Tensor | None) -> tuple[Tensor, Tensor]:
    """`Fusion.packed_forward` for one clip, in operations of which no size has to be a plain number.

    A pathway that is not sampled has no times. Returns the fused features and their times.
    """
    slow_times, fast_times = (
        torch.arange(x.shape[2], device=x.device, dtype=torch.float32) if times is None else times for x, times in ((slow, slow_times), (fast, fast_times))
    )
    if fusion.rule == "released":
        fused = fusion.activation(fusion.norm(fusion.conv_fast_to_slow(fast)))
        length = torch.sym_max(slow.shape[2], fused.shape[2])
        slow_times = _centred(slow_times[None, None, :, None, None], length).reshape(-1)
        return torch.cat((_centred(slow, length), _centred(fused, length)), 1), slow_times
    conv, end = fusion.conv_fast_to_slow, fast.shape[2]
    (kernel, *_), (alpha, *stride) = conv.kernel_size, conv.stride
    nearest = (slow_times[:, None] * alpha - fast_times).abs().argmin(dim=1)  # [B'_slow]
    places = nearest[:, None] + torch.arange(-(kernel // 2), kernel - kernel // 2, device=fast.device)
    places = torch.where((places >= 0) & (places < end), places, end)  # a feature of zeros, beyond the last one
    windows = nn.functional.pad(fast, (0, 0, 0, 0, 0, 1)).index_select(2, places.reshape(-1))
    fused = nn.functional.conv3d(windows, conv.weight, conv.bias, (kernel, *stride))
    torch._check(fused.shape[2] == slow.shape[2])
    return torch.cat((slow, fusion.activation(fusion.norm(fused))), 1), slow_times


def _centred(x: Tensor, length: int) -> Tensor:
    """x [1, C, T, H, W] with zero features on both sides, the odd one behind: [1, C, length, H, W]."""
    front = (length - x.shape[2]) // 2
    return nn.functional.pad(x, (0, 0, 0, 0, front, length - x.shape[2] - front))


def check_format(format: str) -> None:
    """Raise ValueError unless there is such a format and the packages that it takes are installed."""
    if format not in FILES:
        raise ValueError(f"format={format!r} does not exist; choose one of {', '.join(FILES)}")
    missing = [name for name in ONNX_PACKAGES if format == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'format=onnx needs {", ".join(missing)}: pip install -e ".[onnx]", or take format=torch_export')


@torch.no_grad()
def export(model: VideoNet, clip: Tensor, path: Path, *, format: str) -> Run:
    """Write `model` for clips of the size of `clip` [1, 3, T, H, W] to `path`, and load what was written.

    The model is put into evaluation mode and must lie on the CPU.

    Raises:
        ValueError: see `check_format` and `ExportableNet`; or torch cannot export this network,
            with torch's reason.
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
        """torch.onnx has none; TopK of everything puts the first of equal values first, too."""
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
    """Without the lines in which these loggers tell of each constant that they fold or cannot."""
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
    """The line in which torch says what it cannot do: the first of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in re.sub(r"\x1b\[\d*m", "", str(error)).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


class Compared(NamedTuple):
    """One clip, run by the model and by what was exported."""

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
    own, other = [model.eval()(clip) for clip in clips.values()], [run(clip) for clip in clips.values()]
    spread = torch.cat([prediction.logits for prediction in own]).std().clamp(min=1e-6)
    return [
        Compared(name, prediction.bins[0], bins, ((logits - prediction.logits).abs().max() / spread).item())
        for name, prediction, (logits, bins) in zip(clips, own, other)
    ]


def as_table(rows: Sequence[Compared]) -> str:
    """A line for each clip, for people to read."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'clip':<{width}}  B' eager  B' exported  difference (standard deviations of a logit)"]
    for row in rows:
        own, exported = ("/".join(map(str, bins)) for bins in (row.bins, row.exported_bins))
        lines.append(f"{row.name:<{width}}  {own:>8}  {exported:>11}  {row.difference:.1e}{'' if row.equal else '  DIFFERS'}")
    return "\n".join(lines)
