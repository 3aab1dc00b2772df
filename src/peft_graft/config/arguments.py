"""The names of a verb's arguments in Python."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from peft_graft.config.base import Config, nearest
from peft_graft.errors import PlanError

_P = ParamSpec("_P")
_T = TypeVar("_T")


def known_arguments(config: type[Config]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """A verb that says what an unknown argument should have been.

    Args:
        config: of the verb, whose fields are often taken for arguments.

    Raises:
        PlanError: there is no argument of that name.
    """

    def checking(verb: Callable[_P, _T]) -> Callable[_P, _T]:
        known = inspect.signature(verb).parameters

        @wraps(verb)
        def checked(*args: _P.args, **options: _P.kwargs) -> _T:
            if unknown := next((name for name in options if name not in known), None):
                is_choice = unknown in config.model_fields
                raise PlanError(
                    f"{verb.__name__} has no such argument",
                    where=unknown,
                    expected=", ".join(known),
                    fix=f'write config={{"{unknown}": ...}}' if is_choice else nearest(unknown, known),
                )
            return verb(*args, **options)

        return checked

    return checking
