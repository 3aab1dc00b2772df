"""What a caller may have changed in torch, and how this package finds it and leaves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def undisturbed(verb: Callable[_P, _T]) -> Callable[_P, _T]:
    """A verb that may be called where gradients are off or another dtype is the default, and that leaves torch's
    random numbers as if it had not been called."""

    @wraps(verb)
    def called(*args: _P.args, **options: _P.kwargs) -> _T:
        with torch.inference_mode(False), torch.enable_grad(), _in_float32(), _generators_kept():
            return verb(*args, **options)

    return called


@contextmanager
def _in_float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _generators_kept() -> Iterator[None]:
    state = torch.get_rng_state()
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
