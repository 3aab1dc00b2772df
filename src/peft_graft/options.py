"""What a user may choose, and the defaults: without torch, so that ``peft-graft --help`` answers at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

#: (stage, done, total or None) -> None
Progress = Callable[[str, int, int | None], None]
#: Paired tokens that an alignment sees at most by default.
MAX_TOKENS = 50_000
#: Steps of the polish by default.
POLISH = 1000
#: What was interrupted leaves its state beside the output, under its name with this ending.
UNFINISHED = ".unfinished"
HeadChoice = Literal["auto", "carry", "fit", "drop"]
#: Every method of ``methods.METHODS`` in a line.
METHOD_SUMMARIES: Mapping[str, str] = {
    "copy": "weights unchanged; for a student that shares the teacher's spaces",
    "prune-align": "correlate, assign, prune and reorder; every axis in its own space",
    "ridge": "regression between the spaces, one map for reading and one for writing, shrunk by held-out text",
    "procrustes": "the best rotation of one space onto the other, with one scale",
    "functional": "LoRA fitted layer by layer to move the student's layers as the teacher's move; the head as by "
    "prune-align",
    "prune-align-published": "prune-align with LoRA's output rows pruned by its input's indices, as in the "
    "paper's code",
}
