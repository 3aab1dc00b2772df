"""Who watches a run: callbacks and the logger."""

from __future__ import annotations

import logging
import signal
from collections import Counter

import pytest
import torch

import peft_graft
from peft_graft import Callback, GraftConfig
from peft_graft.errors import DeviceError
from peft_graft.run import Run, uninterrupted


class Recorder(Callback):
    def __init__(self) -> None:
        self.open: list[str] = []
        self.ended: Counter[str] = Counter()
        self.progress: dict[str, list[tuple[int, int | None]]] = {}

    def on_stage_begin(self, stage: str) -> None:
        self.open.append(stage)

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        self.progress.setdefault(stage, []).append((done, total))

    def on_stage_end(self, stage: str, seconds: float) -> None:
        assert seconds >= 0
        assert self.open.pop() == stage
        self.ended[stage] += 1


def test_callbacks_see_every_stage_and_its_progress(world, tmp_path, caplog) -> None:
    watched = Recorder()
    with caplog.at_level(logging.INFO, logger="peft_graft"):
        graft = peft_graft.transfer(
            world / "lora", world / "narrow", text=world / "text.txt", out=tmp_path / "graft",
            config=GraftConfig(method="prune-align", polish=6), callbacks=[watched],
        )  # fmt: skip
    assert not watched.open
    assert watched.ended.keys() - graft.report.seconds.keys() == {"writing and verifying"}  # which the report is in
    assert graft.report.seconds.keys() <= watched.ended.keys()
    assert {"loading models", "polishing"} <= watched.ended.keys()
    for stage in ("aligning the models", "polishing"):
        done = [count for count, _ in watched.progress[stage]]
        assert done == sorted(done)
        assert done[-1] > 0
    assert watched.progress["polishing"][-1] == (6, 6)
    assert {f"{stage} took" in caplog.text for stage in watched.ended} == {True}


def test_what_a_callback_raises_ends_the_run_and_leaves_no_output(world, tmp_path) -> None:
    class Stop(Callback):
        def on_progress(self, stage: str, done: int, total: int | None) -> None:
            if stage == "aligning the models":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        peft_graft.transfer(
            world / "lora", world / "narrow", text=world / "text.txt", out=tmp_path / "graft",
            config=GraftConfig(method="prune-align"), callbacks=[Stop()],
        )  # fmt: skip
    assert not (tmp_path / "graft").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
        RuntimeError("can't start new thread"),
    ],
)
def test_what_does_not_fit_says_what_to_lower(error: Exception) -> None:
    with (
        pytest.raises(
            DeviceError, match=r"polishing: the memory does not suffice; found .*--gradient-checkpointing"
        ) as it,
        Run().stage("polishing"),
    ):
        raise error
    assert "\n" not in str(it.value)
    with pytest.raises(RuntimeError, match="^shapes$"), Run().stage("polishing"):
        raise RuntimeError("shapes")


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_end_of_a_block(monkeypatch, which) -> None:
    done: list[str] = []

    def stop(*_: object) -> None:
        done.append("stopped")
        raise KeyboardInterrupt

    before = signal.signal(which, stop)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(which)
            signal.raise_signal(which)
            done.append("the block")
        assert done == ["the block", "stopped"]
        assert signal.getsignal(which) is stop
    finally:
        signal.signal(which, before)
