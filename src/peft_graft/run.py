"""One run of a verb: who watches it, how long its stages take, and where interrupted work leaves its state."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft_graft.errors import DeviceError
from peft_graft.processes import ALONE, Processes

if TYPE_CHECKING:
    from peft_graft.record import Record

logger = logging.getLogger("peft_graft")
#: Interrupted work leaves its state beside the output, under the output's name with this ending.
UNFINISHED = ".unfinished"


class Callback:
    """Watches a run; override what you need. Whatever a callback raises ends the run.

    An exception of a callback, such as ``KeyboardInterrupt``, is a way to stop: work that can be resumed keeps its
    state.
    """

    def on_plan(self, plan: Record) -> None:
        """What the run will do and cost at the least (``outlook.StudentSummary``), before any weights are loaded."""

    def on_stage_begin(self, stage: str) -> None:
        """A stage (``loading models``, ``polishing``, ...) begins; some begin several times."""

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        """So much of a stage is done; ``total`` is None while it is not known."""

    def on_loss(self, stage: str, loss: float) -> None:
        """The loss of a stage that trains, after the step that ``on_progress`` told of."""

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """A stage ends after so many seconds."""


@dataclass
class Run:
    """One run.

    Attributes:
        callbacks: told of every stage and its progress.
        work: a folder for what an interrupted run can go on from; None keeps nothing.
        processes: those that share it.
        seconds: time of every stage so far.
    """

    callbacks: Sequence[Callback] = ()
    work: Path | None = None
    processes: Processes = ALONE
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; one that is entered again adds to its time.

        Raises:
            DeviceError: the memory did not suffice.
        """
        for callback in self.callbacks:
            callback.on_stage_begin(name)
        start = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not _is_of_memory(error):
                raise
            raise DeviceError(
                "the memory does not suffice",
                where=name,
                found=str(error).partition("\n")[0] or type(error).__name__,
                fix="give --dtype bfloat16, --gradient-checkpointing or --quantization-config, lower --max-length, "
                "--max-new-tokens or --max-tokens, or spread the models with --device-map auto",
            ) from error
        taken = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + taken, 3)
        logger.info("%s took %.1f s", name, taken)
        for callback in self.callbacks:
            callback.on_stage_end(name, taken)

    def planned(self, make: Callable[[], Record]) -> None:
        """Tell the callbacks that ask for it what will be done; it is not made for others."""
        asking = [callback for callback in self.callbacks if type(callback).on_plan is not Callback.on_plan]
        if asking:
            plan = make()
            for callback in asking:
                callback.on_plan(plan)

    def progress(self, stage: str, done: int, total: int | None = None) -> None:
        """Tell the callbacks how far a stage is."""
        for callback in self.callbacks:
            callback.on_progress(stage, done, total)

    def step(self, stage: str, done: int, total: int, loss: float) -> None:
        """Tell the callbacks of a step of training."""
        self.progress(stage, done, total)
        for callback in self.callbacks:
            callback.on_loss(stage, loss)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C, and what else ends a process in an orderly way, wait for the end of a block.

    Python gives signals to the main thread alone; in others nothing interrupts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {which: signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)}
    handled = {which: handler for which, handler in before.items() if callable(handler)}
    for which in handled:
        signal.signal(which, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for which, handler in handled.items():
            signal.signal(which, handler)
        for number in dict.fromkeys(came):
            signal.raise_signal(number)


def _is_of_memory(error: Exception) -> bool:
    """Whether memory was asked for in vain: of a GPU (``torch.OutOfMemoryError``), or of the processor's, by torch or
    for a thread."""
    signs = "out of memory", "can't allocate memory", "can't start new thread"
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
