"""Which teacher layers serve each layer of the student."""

from __future__ import annotations

from collections.abc import Sequence

from peft_graft.config import AUTO
from peft_graft.errors import PlanError
from peft_graft.models.spec import Stack

#: For every student layer the teacher layers whose modules make up its module.
LayerMap = tuple[tuple[int, ...], ...]


def layer_map(spec: str, teacher_layers: int, student_layers: int) -> LayerMap:
    """Which teacher layers serve each student layer of one stack.

    With n teacher and m student layers, student layer l owns the window [floor(l n / m), floor((l + 1) n / m)) of
    teacher layers. ``skip`` takes the window's first layer (k l for k = n / m, arXiv 2403.18804), ``avg``
    the mean of all its layers. A student deeper than the teacher has empty windows; those take layer
    floor(l n / m), so teacher layers repeat in order.

    Args:
        spec: ``skip``, ``avg``, or one teacher layer for each student layer: ``0,2,4``; ``auto`` is ``skip`` as long as
            nobody has looked at the weights.

    Raises:
        PlanError: an unknown word, a wrong number of layers, or a layer that the teacher lacks.
    """
    n, m = teacher_layers, student_layers
    if spec in (AUTO, "skip", "avg"):
        starts = [layer * n // m for layer in range(m)]
        ends = [max((layer + 1) * n // m, start + 1) for layer, start in enumerate(starts)]
        return tuple(
            tuple(range(start, end)) if spec == "avg" else (start,) for start, end in zip(starts, ends, strict=True)
        )
    try:
        chosen = [int(part) for part in spec.split(",")]
    except ValueError:
        raise PlanError(
            "not a layer map", where=f"--layers {spec}", expected="auto, skip, avg, or numbers such as 0,2,4"
        ) from None
    if len(chosen) != m:
        raise PlanError(
            "the layer map has the wrong length",
            where=f"--layers {spec}",
            expected=f"{m} numbers, one teacher layer for each student layer",
            found=len(chosen),
        )
    bad = [layer for layer in chosen if not 0 <= layer < n]
    if bad:
        raise PlanError(
            "the teacher has no such layer", where=f"--layers {spec}", expected=f"0 to {n - 1}", found=bad[0]
        )
    return tuple((layer,) for layer in chosen)


def layer_maps(spec: str, stacks: Sequence[tuple[Stack, Stack]]) -> dict[str, str]:
    """A layer map for every stack of the student, by its name: the same for all, or ``encoder=skip;decoder=0,2``.

    Raises:
        PlanError: a stack that the models do not share, or one that is left out.
    """
    names = [second.name for _, second in stacks]
    if "=" not in spec:
        return dict.fromkeys(names, spec)
    found = {stack.strip(): part.strip() for stack, _, part in (part.partition("=") for part in spec.split(";"))}
    if found.keys() != set(names):
        raise PlanError(
            "the layer maps do not name the stacks", where=f"--layers {spec}",
            expected=", ".join(names) if any(names) else "one map without a name", found=", ".join(found),
        )  # fmt: skip
    return found
