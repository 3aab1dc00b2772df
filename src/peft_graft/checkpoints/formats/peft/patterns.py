"""Patterns of peft's configurations: regular expressions by which an option differs from layer to layer.

peft searches them one after the other for every layer. Here names are looked up, whatever their number, and expressions
get so much time together: some take longer than anyone can wait.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Generic, TypeVar

import regex

from peft_graft.errors import CheckpointError, reason

#: Seconds of a processor for all expressions of a module, and how long one of them may be.
SECONDS, _LONGEST = 3.0, 1_000
#: A name as people write it, or as ``re.escape`` does.
_NAME = re.compile(r"(?:[\w-]|\.|\\\W)+")
_V = TypeVar("_V")


class Patterns(Generic[_V]):
    """Values by pattern; a path has the first one whose pattern matches all of it, or all after one of its dots.

    Args:
        values: by pattern. where: what errors name.
    """

    def __init__(self, values: Mapping[str, _V], where: str) -> None:
        self._where, self._seconds = where, SECONDS
        self._expressions: list[tuple[int, str, _V]] = []
        # A dot stands for any character: names of one length with dots at the same places are looked up together.
        self._names: dict[int, dict[tuple[int, ...], dict[str, tuple[int, _V]]]] = {}
        for order, (pattern, value) in enumerate(values.items()):
            if _NAME.fullmatch(pattern):
                dots, name = _dots(pattern)
                self._names.setdefault(len(name), {}).setdefault(dots, {}).setdefault(name, (order, value))
            else:
                self._expressions.append((order, pattern, value))

    def at(self, path: str, default: _V) -> _V:
        """The value at a module's path.

        Raises:
            CheckpointError: an expression is none, or they take too long.
        """
        began = time.process_time()
        order, found = min(self._named(path), key=lambda one: one[0], default=(None, default))
        for (earlier, _, value), expression in zip(self._expressions, self._compiled, strict=True):
            if order is not None and earlier > order:
                break
            try:
                if expression.match(path, timeout=max(1e-3, self._seconds - (time.process_time() - began))):
                    found = value
                    break
            except TimeoutError as error:
                raise self._too_long() from error
        self._seconds -= time.process_time() - began
        if self._seconds < 0:
            raise self._too_long()
        return found

    def _named(self, path: str) -> Iterator[tuple[int, _V]]:
        starts = [0, *(place + 1 for place, letter in enumerate(path) if letter == ".")]
        for end in (path[start:] for start in starts):
            for dots, names in self._names.get(len(end), {}).items():
                letters = list(end)
                for place in dots:
                    letters[place] = "."
                if (found := names.get("".join(letters))) is not None:
                    yield found

    @cached_property
    def _compiled(self) -> list[regex.Pattern[str]]:
        found = []
        began = time.process_time()
        for _, pattern, _ in self._expressions:
            if len(pattern) > _LONGEST or time.process_time() - began > self._seconds:
                raise self._too_long()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    re.compile(pattern)  # the other library knows expressions that this one does not
                    found.append(regex.compile(rf"(.*\.)?({pattern})$"))
            except (re.error, regex.error, RecursionError, OverflowError) as error:
                raise CheckpointError(
                    f"a pattern of the configuration is no regular expression ({reason(error)})",
                    where=self._where,
                    found=pattern,
                    fix="write the layer's path in its place",
                ) from error
        return found

    def _too_long(self) -> CheckpointError:
        return CheckpointError(
            "the configuration's patterns of layers take too long to search",
            where=self._where,
            expected=f"regular expressions of {_LONGEST:,} characters at most, which take {SECONDS:g} s together",
            found=self._expressions[0][1],
            fix="write the layers' paths in their place",
        )


def _dots(pattern: str) -> tuple[tuple[int, ...], str]:
    """The places of the dots that stand for any character, and the name without escapes."""
    dots: list[int] = []
    letters: list[str] = []
    escaped = False
    for letter in pattern:
        if letter == "\\" and not escaped:
            escaped = True
            continue
        if letter == "." and not escaped:
            dots.append(len(letters))
        letters.append(letter)
        escaped = False
    return tuple(dots), "".join(letters)
