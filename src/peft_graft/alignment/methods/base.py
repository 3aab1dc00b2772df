"""What a method is, and the registry that every method's file adds itself to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from peft_graft.alignment.maps import SpaceMap
from peft_graft.alignment.moments import Moment, PairedStatistics
from peft_graft.config import METHOD_SUMMARIES
from peft_graft.models.spaces import VOCABULARY
from peft_graft.modules.base import Axis, Module

Diagnostics = dict[str, float]
#: (fit, held-out pairs) -> map and what to report about it.
Solver = Callable[[PairedStatistics, PairedStatistics], tuple[SpaceMap, Diagnostics]]


@dataclass(frozen=True)
class Method:
    """One way of finding the map between two spaces from statistics of paired activations.

    Attributes:
        name: as the user types it.
        solve: statistics to a map and its diagnostics; None for a method that needs no text.
        moments: what ``solve`` needs beside the cross moment (``moments_for`` says for which direction).
        holds_out: whether ``solve`` chooses by held-out pairs.
        automatic: whether ``auto`` tries it.
        fits_layers: the maps carry the head alone; the modules are fitted so that the student's layers move as the
            teacher's do (``distill.fit_layers``).
        moves_nothing: the modules begin as untrained ones, and the maps only say how large they are.
        writes_through_input: LoRA's output rows are mapped with the map of its input space (published shortcut).
    """

    name: str
    solve: Solver | None = None
    moments: tuple[Moment, ...] = ("cross",)
    holds_out: bool = False
    automatic: bool = False
    fits_layers: bool = False
    moves_nothing: bool = False
    writes_through_input: bool = False

    @property
    def summary(self) -> str:
        """One line for help pages and reports."""
        return METHOD_SUMMARIES[self.name]

    @property
    def is_built_in(self) -> bool:
        """Whether it is this package's own, and so computes the same wherever this version runs."""
        return self.solve is None or str(self.solve.__module__).startswith(f"{__package__}.")

    @property
    def needs_text(self) -> bool:
        """Whether the method aligns on text."""
        return self.solve is not None

    def moments_for(self, directions: Collection[str]) -> tuple[Moment, ...]:
        """The moments that maps of these directions alone need.

        Reading regresses on the student's units and needs their moment, everything else on the teacher's.
        """
        sides = {"student" if direction == "read" else "teacher" for direction in directions}
        return tuple(moment for moment in self.moments if moment == "cross" or moment in sides)


#: Every registered method by name; filled by the files of ``alignment.methods`` and by ``register_method``.
METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    summary: str | None = None,
    moments: Iterable[Moment] = ("cross",),
    holds_out: bool = False,
    automatic: bool = False,
) -> Callable[[Solver], Solver]:
    """Register the decorated function as a method.

    Args:
        name: what users type after ``--method``.
        summary: one line for help pages; the built-in methods have theirs in ``config.METHOD_SUMMARIES``.
        moments: see ``Method``.
        holds_out: see ``Method``.
        automatic: see ``Method``.

    Raises:
        ValueError: the name is taken, or the method has no summary.

    Example:
        >>> @register_method("first-units", summary="student unit i is teacher unit i")
        ... def first_units(fit, held_out):
        ...     teacher, student = len(fit.teacher_mean), len(fit.student_mean)
        ...     return Selection(torch.arange(student).where(torch.arange(student) < teacher, -1), teacher), {}
    """

    def add(solve: Solver) -> Solver:
        add_method(Method(name, solve, tuple(moments), holds_out, automatic), summary)
        return solve

    return add


def add_method(method: Method, summary: str | None = None) -> None:
    """Put a method into the registry."""
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    if summary is not None:
        METHOD_SUMMARIES[method.name] = summary
    elif method.name not in METHOD_SUMMARIES:
        raise ValueError(f"the method {method.name!r} needs a summary")
    METHODS[method.name] = method


def automatic_methods() -> list[Method]:
    """What ``auto`` tries, in the order of the help page."""
    return [METHODS[name] for name in METHOD_SUMMARIES if METHODS[name].automatic]


def map_methods(methods: Iterable[Method]) -> dict[str, Method]:
    """Method by name -> the method whose maps it uses, which is another one for methods that fit layers."""
    return {method.name: METHODS["prune-align"] if method.fits_layers else method for method in methods}


def map_axis(method: Method, module: Module, axis: Axis) -> str:
    """The name of the space whose map moves this axis: its own, or the input's under the published shortcut."""
    if method.writes_through_input and axis.direction == "write" and "A" in module.tensors:
        read = module.tensors["A"].axes[1]
        assert read is not None
        return axis.space if VOCABULARY in (read.space, axis.space) else read.space
    return axis.space
