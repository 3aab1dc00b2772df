"""The options of a transfer, checked once for Python, command line and files, and the clock of its stages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

from peft_graft.alignment import METHODS
from peft_graft.errors import PlanError
from peft_graft.models import DTYPES, check_device

#: (stage, done, total or None) -> None
Progress = Callable[[str, int, int | None], None]
HeadChoice = Literal["carry", "drop"]


class TransferSettings(BaseModel):
    """How to transfer; the same names in Python, on the command line and in ``graft.json``.

    Attributes:
        layers: ``skip``, ``avg`` or one teacher layer for each student layer, ``0,2,4``.
        method: a key of ``alignment.METHODS``; None lets ``planning.choose_method`` take one.
        head: ``carry`` the classification head or ``drop`` it.
        max_tokens: paired tokens that the alignment sees at most.
        seed: of the order in which text is sampled.
        device, dtype: of the forward passes; statistics are float64 in any case.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    layers: str = "skip"
    method: str | None = None
    head: HeadChoice = "carry"
    max_tokens: int = 50_000
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"


def checked_settings(
    layers: str, method: str | None, head: str, max_tokens: int, seed: int, device: str, dtype: str
) -> TransferSettings:
    """Settings whose every choice exists.

    Raises:
        PlanError: an unknown method, head choice or dtype, or no tokens.
        DeviceError: no such device.
    """
    for option, value, known in (
        ("--method", method, [None, *METHODS]),
        ("--head", head, get_args(HeadChoice)),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            choices = ", ".join(str(name) for name in known if name is not None)
            raise PlanError("unknown choice", where=option, expected=choices, found=value)
    if max_tokens < 1:
        raise PlanError("must be positive", where="--max-tokens", found=max_tokens)
    check_device(device)
    return TransferSettings(
        layers=layers,
        method=method,
        head="drop" if head == "drop" else "carry",
        max_tokens=max_tokens,
        seed=seed,
        device=device,
        dtype=dtype,
    )


class Clock:
    """Times the stages and reports them as progress."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time one stage."""
        if self.progress:
            self.progress(stage, 0, None)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)
