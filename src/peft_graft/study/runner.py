"""Running the cells of a study: in this process or on Ray, each finished cell kept, whatever happens to the others."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from peft_graft.cluster import Tasks
from peft_graft.environment import hardware, versions
from peft_graft.errors import GraftError
from peft_graft.run import Callback, Run
from peft_graft.study.cell import Cell
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import cells_of
from peft_graft.study.spec import Study

State = Literal["done", "failed", "busy"]
#: Seconds between two looks at the cells that another run of the study works on.
_POLL = 2.0


@dataclass
class Outcome:
    """What became of a study's cells: ids by state; ``blocked`` ones need a cell that failed."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)


class Executor(Protocol):
    """Where cells are done."""

    def submit(self, cell: Cell) -> None:
        """Start, or queue, a cell."""

    def wait(self) -> tuple[Cell, State]:
        """The next cell that has ended, and how."""

    @property
    def free(self) -> int:
        """How many more cells can be started now."""


class Here:
    """Cells one after another in this process."""

    def __init__(self, out: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.folder, self.callbacks = StudyFolder(out), callbacks
        self._queue: list[Cell] = []

    @property
    def free(self) -> int:
        """One at a time."""
        return 1 - len(self._queue)

    def submit(self, cell: Cell) -> None:
        """Queue a cell."""
        self._queue.append(cell)

    def wait(self) -> tuple[Cell, State]:
        """Do the queued cell."""
        cell = self._queue.pop()
        return cell, execute(cell, self.folder, self.callbacks)


class OnRay:
    """Cells on a Ray cluster; those of a worker that dies are started again elsewhere.

    Args:
        address: of the cluster, or ``local`` to use this machine. cpus, gpus: that one cell takes.
    """

    def __init__(self, out: Path, address: str, cpus: float, gpus: float) -> None:
        self._folder = StudyFolder(out)
        self._tasks = Tasks(
            address,
            _on_worker,
            of="cell",
            cpus=cpus,
            gpus=gpus,
            shared=(str(out), max(1, int(cpus))),
            lost=self._failed,
        )

    @property
    def free(self) -> int:
        """Cells that fit beside those that run."""
        return self._tasks.slots - self._tasks.running

    def submit(self, cell: Cell) -> None:
        """Hand a cell to the cluster."""
        self._tasks.start(cell, cell)

    def wait(self) -> tuple[Cell, State]:
        """The next cell that a worker has ended."""
        return self._tasks.next()

    def _failed(self, cell: Cell, error: GraftError) -> State:
        """Of a cell over which workers died."""
        self._folder.keep_failure(_described(cell, _failure(error), time.perf_counter()))
        return "failed"


def _on_worker(out: str, threads: int, cell: Cell) -> State:
    torch.set_num_threads(threads)
    return execute(cell, StudyFolder(Path(out)))


# ---- the loop --------------------------------------------------------------------------------------------------------


def run_study(
    study: Study, out: Path, executor: Executor, *, only: str | None = None, callbacks: Sequence[Callback] = ()
) -> Outcome:
    """Do every cell that is not done yet, each after those that it needs.

    An interruption loses the cells that were running, no others.

    Raises:
        StudyError: ``only`` matches nothing, or ``out`` cannot be used.
    """
    cells, folder, run = cells_of(study, only), StudyFolder(out), Run(callbacks)
    folder.prepare({**study.model_dump(mode="json"), "cells": list(cells_of(study))})
    outcome = Outcome()
    waiting = dict(cells)
    running: set[str] = set()
    elsewhere: set[str] = set()  # cells that another run of the study works on
    while waiting or running:
        for name, cell in list(waiting.items()):
            if folder.is_done(name):
                outcome.done.append(name)
                del waiting[name]
            elif set(cell.needed) & {*outcome.failed, *outcome.blocked}:
                outcome.blocked.append(name)
                del waiting[name]
            elif executor.free > 0 and set(cell.needed) <= set(outcome.done) and name not in elsewhere:
                executor.submit(cell)
                running.add(name)
                del waiting[name]
        run.progress("cells", len(outcome.done), len(cells))
        if not running:
            if elsewhere:  # there is nothing else to do
                time.sleep(_POLL)
                elsewhere.clear()
            continue
        cell, state = executor.wait()
        running.discard(cell.id)
        if state == "busy":
            waiting[cell.id] = cell
            elsewhere.add(cell.id)
        else:
            (outcome.done if state == "done" else outcome.failed).append(cell.id)
    run.progress("cells", len(outcome.done), len(cells))
    return outcome


def execute(cell: Cell, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> State:
    """Do one cell and keep its result or its error; nothing when it is done already or another process works on it."""
    if folder.is_done(cell.id):
        return "done"
    with folder.claimed(cell.id) as mine:
        if not mine:
            return "busy"
        if folder.is_done(cell.id):
            return "done"
        start = time.perf_counter()
        try:
            found = cell.run(folder, callbacks)
        except Exception as error:  # whatever it is, the other cells go on, and this one says why
            folder.keep_failure(_described(cell, _failure(error), start))
            return "failed"
        folder.keep(_described(cell, {"result": found}, start))
        shutil.rmtree(folder.work(cell.id), ignore_errors=True)
        return "done"


def estimate(cells: Mapping[str, Cell], folder: StudyFolder) -> tuple[dict[str, int], float | None]:
    """Cells left by kind, and the seconds that they will take one after another, from the finished ones of their kind.

    The time is None while a kind has no finished cell to go by.
    """
    left: dict[str, int] = {}
    known: dict[str, list[float]] = {}
    for name, cell in cells.items():
        if folder.is_done(name):
            known.setdefault(cell.kind, []).append(float(folder.record(name)["seconds"]))
        else:
            left[cell.kind] = left.get(cell.kind, 0) + 1
    if not set(left) <= set(known):
        return left, None
    return left, sum(count * statistics.fmean(known[kind]) for kind, count in left.items())


def _failure(error: Exception) -> dict[str, str]:
    return {
        "error": f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def _described(cell: Cell, found: Mapping[str, Any], start: float) -> dict[str, Any]:
    record = {**cell.record(), **found}
    with contextlib.suppress(GraftError, RuntimeError, AssertionError):  # a failure may be of the device itself
        record["hardware"] = hardware(cell.config.device)
    return {**record, "seconds": round(time.perf_counter() - start, 2), "versions": versions(), "finished": time.time()}
