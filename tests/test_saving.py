"""Saving in the background: what is written is the state as it was given, in order, and an error comes to light."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from atfr.engine.run import checkpoint
from atfr.engine.run.checkpointer import MOST_PENDING, Checkpointer, copied

STATE = {"config": {}, "choices": {}, "class_names": ["a"]}


@pytest.fixture
def held(monkeypatch):
    """Writing waits for this event."""
    event, write = threading.Event(), checkpoint.save

    def slowly(*arguments, **options):
        assert event.wait(timeout=60)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slowly)
    yield event
    event.set()


def test_what_is_written_is_the_state_as_it_was_given_and_nobody_waits_for_it(tmp_path, held):
    weight, momentum = torch.zeros(3), {"state": {0: {"momentum_buffer": torch.ones(2)}}, "groups": [{"params": [0]}]}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({**STATE, "model": {"weight": weight}, "optimizer": momentum}, tmp_path / "last.pt")
    weight += 1  # training goes on
    momentum["state"][0]["momentum_buffer"] += 1
    momentum["groups"][0]["params"].append(1)
    assert not (tmp_path / "last.pt").exists()
    held.set()
    checkpointer.wait()
    checkpointer.close()
    state = checkpoint.load(tmp_path / "last.pt")
    assert state["model"]["weight"].tolist() == [0, 0, 0]
    assert state["optimizer"] == {"state": {0: {"momentum_buffer": pytest.approx(torch.ones(2))}}, "groups": [{"params": [0]}]}


def test_states_are_written_in_order_and_only_so_many_wait_in_memory(tmp_path, held):
    checkpointer = Checkpointer(tmp_path)
    for step in range(MOST_PENDING):
        checkpointer.save({**STATE, "model": {}, "step": step}, tmp_path / "last.pt", keep=4)
    more = threading.Thread(target=lambda: checkpointer.save({**STATE, "model": {}, "step": MOST_PENDING}, tmp_path / "last.pt", keep=4))
    more.start()
    more.join(timeout=0.2)
    assert more.is_alive()  # it waits for the first to be written
    held.set()
    more.join(timeout=60)
    checkpointer.close()
    assert [checkpoint.load(checkpoint.earlier(tmp_path / "last.pt", number))["step"] for number in range(MOST_PENDING + 1)] == [2, 1, 0]


@pytest.mark.parametrize("seen_by", ["check", "save", "wait"])
def test_a_state_that_could_not_be_written_is_an_error_of_the_next_step(tmp_path, seen_by):
    (tmp_path / "folder").write_text("in the way")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({**STATE, "model": {}}, tmp_path / "folder" / "last.pt")
    deadline = time.monotonic() + 60
    with pytest.raises(OSError, match="folder"):
        while time.monotonic() < deadline:
            if seen_by == "save":
                checkpointer.save({**STATE, "model": {}}, tmp_path / "other.pt")
            else:
                getattr(checkpointer, seen_by)()
            time.sleep(0.01)
    checkpointer.close()


def test_an_error_that_nobody_saw_is_told_of_when_something_else_ends_the_run(tmp_path, caplog):
    (tmp_path / "folder").write_text("in the way")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({**STATE, "model": {}}, tmp_path / "folder" / "last.pt")
    checkpointer.close()
    assert "folder" in caplog.text


def test_a_copy_shares_no_memory_and_keeps_what_is_no_tensor():
    value = {"a": [torch.arange(3), (1, "x", None)], "b": {"c": torch.tensor(2.0)}}
    other = copied(value)
    assert other["a"][1] == (1, "x", None) and other["a"][0].equal(value["a"][0])
    assert other["a"][0].data_ptr() != value["a"][0].data_ptr() and other["b"]["c"].data_ptr() != value["b"]["c"].data_ptr()
