"""Progress in Python: a bar of tqdm for the stage that runs, in notebooks as in terminals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from peft_graft.errors import PlanError
from peft_graft.run import Callback


class ProgressCallback(Callback):
    """Shows a bar for the stage that runs now.

    It watches the verbs in notebooks and terminals where they are given no ``callbacks``; ``callbacks=[]`` is silent.
    ``huggingface_hub.utils.disable_progress_bars()`` and its variable ``HF_HUB_DISABLE_PROGRESS_BARS`` turn it off too.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def on_stage_begin(self, stage: str) -> None:
        """Show the stage."""
        self.on_progress(stage, 0, None)

    def on_progress(self, stage: str, done: int, total: int | None) -> None:
        """Move the stage's bar."""
        if self._bar is None or stage != self._stage:
            from tqdm.auto import tqdm

            self.close()
            self._bar, self._stage = tqdm(desc=stage, total=total, leave=False), stage
        if done < self._bar.n:
            self._bar.reset(total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        self._bar.refresh()

    def on_stage_end(self, stage: str, seconds: float) -> None:
        """Take the stage's bar away."""
        if stage == self._stage:
            self.close()

    def close(self) -> None:
        """Take away the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def watchers(given: Sequence[Callback] | Callback | None) -> Sequence[Callback]:
    """Who watches a run: what a user gave; where nothing was said ``ProgressCallback``, if someone is there to see it.

    Raises:
        PlanError: these are no callbacks.
    """
    if given is None:
        return [ProgressCallback()] if _is_seen() else []
    if isinstance(given, Callback):
        return [given]
    if not isinstance(given, list | tuple) or not all(isinstance(one, Callback) for one in given):
        raise PlanError(
            "these do not watch a run",
            where="callbacks",
            expected="a list of peft_graft.Callback",
            found=type(given).__name__ if not isinstance(given, list | tuple) else _kinds(given),
        )
    return given


def _kinds(given: Sequence[object]) -> str:
    return ", ".join(one.__name__ if isinstance(one, type) else type(one).__name__ for one in given)


def _is_seen() -> bool:
    """Whether this runs in a notebook or a terminal, where bars are not turned off."""
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    in_notebook = "ipykernel" in sys.modules
    return (in_notebook or sys.stderr.isatty()) and not are_progress_bars_disabled()
