"""Saving in the background: states are written in order, as they were at the call, and an error is raised."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from atfr.engine.run import checkpoint
from atfr.engine.run.checkpointer import MOST_PENDING, Checkpointer

STATE = {"config": {}, "choices": {}, "class_names": ["a"]}


@pytest.fixture
def held(monkeypatch):
    """An event that every write waits for."""
    event, write = threading.Event(), checkpoint.save

    def slowly(*arguments, **options):
        assert event.wait(timeout=60)
        write(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save", slowly)
    yield event
    event.set()


def test_the_state_at_the_call_is_written_without_waiting_for_it(tmp_path, held):
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


def test_states_are_written_in_order_and_few_of_them_wait_in_memory(tmp_path, held):
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


@pytest.mark.parametrize("call", ["check", "save", "wait"])
def test_a_state_that_could_not_be_written_is_an_error_at_the_next_call(tmp_path, call):
    (tmp_path / "folder").write_text("in the way")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({**STATE, "model": {}}, tmp_path / "folder" / "last.pt")
    deadline = time.monotonic() + 60
    with pytest.raises(OSError, match="folder"):
        while time.monotonic() < deadline:
            if call == "save":
                checkpointer.save({**STATE, "model": {}}, tmp_path / "other.pt")
            else:
                getattr(checkpointer, call)()
            time.sleep(0.01)
    checkpointer.close()


def test_an_error_that_was_not_raised_is_logged_when_the_run_ends(tmp_path, caplog):
    (tmp_path / "folder").write_text("in the way")
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save({**STATE, "model": {}}, tmp_path / "folder" / "last.pt")
    checkpointer.close()
    assert "folder" in caplog.text
