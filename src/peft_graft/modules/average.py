"""The mean of the modules of one window of layers (AVG, arXiv 2403.18804)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_graft.errors import PlanError
from peft_graft.modules.base import Module


def check_widths(modules: Sequence[Module]) -> None:
    """Refuse modules whose tensors cannot be added.

    Raises:
        PlanError: they differ in inner width.
    """
    if len({module.width for module in modules}) > 1:
        raise PlanError(
            "modules of different rank or bottleneck cannot be averaged",
            where=str(modules[0].site),
            found=", ".join(f"{module.site}: {module.width}" for module in modules),
            fix="choose layers with --layers skip or an explicit list",
        )


def average(modules: Sequence[Module]) -> Module:
    """True mean of the modules of one window, tensor by tensor.

    Raises:
        PlanError: see ``check_widths``.
    """
    first = modules[0]
    if len(modules) == 1:
        return first
    check_widths(modules)
    aligned = [module.in_terms_of(first) for module in modules]
    mean = {
        name: torch.stack([module.tensors[name].values.double() for module in aligned]).mean(0).to(tensor.values.dtype)
        for name, tensor in first.tensors.items()
    }
    return first.with_values(mean)
