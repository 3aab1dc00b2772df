"""The options of a transfer, checked once for Python, command line and files, and the clock of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast, get_args

from pydantic import BaseModel, ConfigDict

from peft_graft.config import Library
from peft_graft.errors import PlanError
from peft_graft.models.devices import check_device
from peft_graft.models.loading import DTYPES
from peft_graft.options import MAX_TOKENS, METHOD_SUMMARIES, HeadChoice, Progress


class TransferSettings(BaseModel):
    """How to transfer; the same names in Python, on the command line and in ``graft.json``.

    Attributes:
        layers: ``skip``, ``avg`` or one teacher layer for each student layer, ``0,2,4``; for a model of several stacks
            one such map for all, or one each, ``encoder=skip;decoder=0,2,4``.
        method: a key of ``methods.METHODS``; None takes the one whose graft agrees best with the teacher on held-out
            text, or without text the one that ``planning.choose_method`` takes.
        head: ``carry`` the classification head through the maps, ``fit`` it to the teacher's predictions on the text,
            ``drop`` it, or ``auto``: whichever of the first two agrees better with the teacher on held-out text.
        polish: steps of label-free training on the teacher's predictions; None is ``options.POLISH`` where method is
            None and there is text, else 0.
        max_tokens: paired tokens that the alignment sees at most.
        seed: of the order in which text is sampled.
        sites: which modules to move, by role or layer and role with wildcards (``attn.value``, ``0/*``), and by head
            (``attn.value@0+3``; a polish trains the others too); None for all.
        library: the library to write for, ``peft`` or ``adapters``; None for the module's own.
        device: of the forward passes, by its torch name; ``auto`` lets accelerate spread models over what is there.
        student_device: the same for the student, where it is another.
        dtype: of the forward passes; statistics are float64 in any case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: str = "skip"
    method: str | None = None
    head: HeadChoice = "auto"
    polish: int | None = None
    max_tokens: int = MAX_TOKENS
    seed: int = 0
    sites: tuple[str, ...] | None = None
    library: Library | None = None
    device: str = "cpu"
    student_device: str | None = None
    dtype: str = "float32"


def checked_settings(
    layers: str,
    method: str | None,
    head: str,
    max_tokens: int,
    seed: int,
    device: str,
    dtype: str,
    polish: int | None = None,
    sites: Sequence[str] | None = None,
    library: str | None = None,
    student_device: str | None = None,
) -> TransferSettings:
    """Settings whose every choice exists.

    Raises:
        PlanError: an unknown method, head choice or dtype, no tokens, or fewer than no steps.
        DeviceError: no such device.
    """
    for option, value, known in (
        ("--method", method, [None, *METHOD_SUMMARIES]),
        ("--head", head, get_args(HeadChoice)),
        ("--dtype", dtype, DTYPES),
        ("--library", library, [None, "peft", "adapters"]),
    ):
        if value not in known:
            choices = ", ".join(str(name) for name in known if name is not None)
            raise PlanError("unknown choice", where=option, expected=choices, found=value)
    if max_tokens < 1:
        raise PlanError("must be positive", where="--max-tokens", found=max_tokens)
    if polish is not None and polish < 0:
        raise PlanError("must not be negative", where="--polish", found=polish)
    check_device(device)
    if student_device is not None:
        check_device(student_device, "--student-device")
    return TransferSettings(
        layers=layers,
        method=method,
        head=cast(HeadChoice, head),
        polish=polish,
        max_tokens=max_tokens,
        seed=seed,
        sites=tuple(sites) if sites else None,
        library=Library(library) if library else None,
        device=device,
        student_device=student_device,
        dtype=dtype,
    )


class Clock:
    """Times the stages and reports them as progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage; what is entered again adds to its time."""
        if self.progress:
            self.progress(stage, 0, None)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - start, 3)
