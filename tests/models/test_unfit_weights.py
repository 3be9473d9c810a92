"""Files of weights that fit in part, belong to another network, or cannot be read."""

from __future__ import annotations

import pickle

import pytest
import torch
from pytorchvideo.models.x3d import create_x3d
from source_networks import (
    dense,
    source_slow,
    source_x3d,
)
from torchvision.models import video

from atfr.models.backbones.x3d import x3d
from atfr.models.pretrained.load import load_pretrained


def test_a_tensor_of_another_shape_is_skipped_with_both_shapes(tmp_path):
    state = source_x3d().state_dict()
    state["blocks.0.conv.conv_t.weight"] = torch.zeros(12, 3, 1, 5, 5)
    state["blocks.9.weight"] = torch.zeros(2)
    state["blocks.5.proj.weight"] = state["blocks.5.proj.weight"][:, :, None, None, None]  # as a convolution has it
    torch.save(state, tmp_path / "file")
    report = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file")
    shape = list(x3d(size="tiny", num_classes=5).dense_network.state_dict()["blocks.0.conv.conv_t.weight"].shape)
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons == {"blocks.0.conv.conv_t.weight": f"shape [12, 3, 1, 5, 5], {shape} in this network", "blocks.9.weight": "no such tensor in this network"}
    assert [entry.name for entry in report.new] == ["blocks.0.conv.conv_t.weight"]


@pytest.mark.parametrize("build,names", [(lambda: video.mc3_18(), "stem.0.weight"), (lambda: source_slow(), "blocks.0.conv.weight")])
def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path, build, names):
    torch.save(build().state_dict(), tmp_path / "file")
    model = x3d(size="tiny", num_classes=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"is of another network: .*the file holds {names}.*the network has blocks.0.conv.conv_t.weight.*model.size") as error:
        load_pretrained(model, tmp_path / "file")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_of_a_deeper_network_is_noted(tmp_path):
    deeper = create_x3d(model_num_class=5, width_factor=1.0, depth_factor=2.2)
    torch.save(deeper.state_dict(), tmp_path / "file")
    report = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file")
    assert not report.new and "tensors that this network has no place for: is it of another model.size?" in report.notes[0]
    torch.save(x3d(size="tiny", num_classes=5).dense_network.state_dict(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"first difference: blocks.1.res_blocks.1.branch2.conv_a.weight is missing there"):
        load_pretrained(dense(deeper), tmp_path / "file")


def test_the_table_is_short_however_many_tensors_do_not_fit(tmp_path):
    state = source_x3d().state_dict()
    for name in [name for name in state if name.startswith("blocks.4.")]:
        state[name] = torch.zeros(*state[name].shape, 3) if state[name].dim() else state[name]
    torch.save(state, tmp_path / "file")
    table = load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "file").as_table()
    assert len(table.splitlines()) <= 8 and max(map(len, table.splitlines())) < 300 and "for other such reasons" in table


class Shouting:
    def __reduce__(self):
        return print, ("code from the file runs",)


def write_whole_model(path):
    torch.save(video.mc3_18(), path)


def write_code(path):
    torch.save({"model_state": {"a": torch.zeros(1)}, "extra": Shouting()}, path)


def write_cut(path):
    torch.save({"model_state": source_x3d().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:5000])


def write_cut_legacy(path):
    torch.save({"model_state": source_x3d().state_dict()}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:5000])


def write_caffe2(path):
    path.write_bytes(pickle.dumps({"blobs": {}}))


def write_no_tensors(path):
    torch.save({"epoch": 3, "model": {"name": "x3d"}}, path)


@pytest.mark.parametrize(
    "write,message",
    [
        (write_whole_model, "is not read: besides tensors it holds torchvision.models.video.resnet.VideoResNet"),
        (write_code, "besides tensors it holds .*print, which could run code"),
        (write_cut, "cannot be read: it is damaged"),
        (write_cut_legacy, "cannot be read: it is damaged"),
        (write_caffe2, "was not written by torch.save .*Caffe2"),
        (lambda path: path.write_bytes(b""), "was not written by torch.save"),
        (write_no_tensors, "holds no weights: it has the keys epoch, model"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, capsys, write, message):
    path = tmp_path / "weights"
    write(path)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(x3d(size="tiny", num_classes=5), path)
    assert "\n" not in str(error.value) and f"model.weights={path}" in str(error.value)
    assert "code from the file runs" not in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model.weights={tmp_path}/nowhere.pyth"):
        load_pretrained(x3d(size="tiny", num_classes=5), tmp_path / "nowhere.pyth")
