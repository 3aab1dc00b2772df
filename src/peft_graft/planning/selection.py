"""Which parts of a module to move: roles, layers, experts, heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.errors import PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.sizes import head_counts
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Module

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HEADS = "@"
#: Which of a model's numbers of heads a role has: those of queries, or those of keys and values.
_OF_QUERIES, _OF_PAIRS = ("query", "output"), ("key", "value")


def at_sites(
    checkpoint: PeftCheckpoint, patterns: Sequence[str] | None, architecture: Architecture, config: PretrainedConfig
) -> PeftCheckpoint:
    """The checkpoint with the modules at some of its sites alone.

    Args:
        patterns: roles, or layers and roles, with wildcards: ``attn.value``, ``ffn.*``, ``0/*``; behind ``@`` heads,
            ``0/attn.value@0+3``, counted for keys and values as these have them. None for all.
        architecture, config: the teacher's.

    Raises:
        PlanError: a pattern that matches none of the checkpoint's sites, heads that the model does not have, or of a
            module that has none.
    """
    if patterns is None:
        return checkpoint
    chosen: list[tuple[str, set[int] | None]] = []  # a pattern may come again, with other heads
    for pattern in patterns:
        name, heads, numbers = pattern.partition(_HEADS)
        chosen.append((name, _numbers(pattern, numbers) if heads else None))
    names = {site: (site.role, f"{site.layer}/{site.role}") for site in checkpoint.modules}
    for pattern, _ in chosen:
        if not any(fnmatchcase(name, pattern) for pair in names.values() for name in pair):
            raise PlanError(
                "the module has no such site",
                where=f"--sites {pattern}",
                expected=f"{', '.join(checkpoint.roles)}, in layers {', '.join(map(str, checkpoint.layers))}",
                fix="name roles, or LAYER/ROLE, with * for any",
            )
    kept: dict[Site, Module] = {}
    for site, module in checkpoint.modules.items():
        found = [part for pattern, part in chosen if any(fnmatchcase(name, pattern) for name in names[site])]
        if None in found:
            kept[site] = module
        elif found:
            kept[site] = _of_heads(
                module, set().union(*(part for part in found if part)), architecture, head_counts(config)
            )
    return replace(checkpoint, modules=kept)


def _numbers(pattern: str, text: str) -> set[int]:
    try:
        return {int(number) for number in text.split("+")}
    except ValueError as error:
        raise PlanError(
            "heads are numbers", where=f"--sites {pattern}", expected="such as attn.value@0+3", found=text
        ) from error


def _of_heads(module: Module, chosen: set[int], architecture: Architecture, heads: tuple[int, int]) -> Module:
    """The module with all but some heads switched off: their rows of B, for what reads them their columns of A."""
    site = module.site
    role = (architecture.row.stack(site.role).local(site.role) or "").rpartition(".")[2]
    attention = role in _OF_QUERIES + _OF_PAIRS and any(_has_heads(axis.space) for axis in module.axes)
    if not attention or not module.has_units_of_heads:
        raise PlanError(
            "heads can be chosen of a plain LoRA, or of IA3's factors, at an attention's projections",
            where=str(site),
            fix="choose whole sites",
        )
    number = heads[0] if role in _OF_QUERIES else heads[1]
    if not number or max(chosen) >= number or min(chosen) < 0:
        raise PlanError(
            "the model has no such head" if number else "the model's configuration names no heads",
            where=str(site),
            expected=f"0 to {number - 1}" if number else None,
            found=", ".join(map(str, sorted(chosen))),
        )
    neutral = module.neutral().tensors
    values = {}
    for name, tensor in module.tensors.items():
        inside = next((at for at, axis in enumerate(tensor.axes) if axis and _has_heads(axis.space)), None)
        if inside is None:
            values[name] = tensor.values
            continue
        units = torch.arange(tensor.values.shape[inside]) * number // tensor.values.shape[inside]
        mine = torch.isin(units, torch.tensor(sorted(chosen)))
        shape = [-1 if at == inside else 1 for at in range(tensor.values.ndim)]
        axis = tensor.axes[inside]
        reads = axis is not None and axis.direction == "read"
        other = torch.zeros_like(tensor.values) if reads else neutral[name].values
        values[name] = torch.where(mine.view(shape), tensor.values, other)
    return module.with_values(values)


def _has_heads(space: str) -> bool:
    """Whether the units of a space are those of heads."""
    return space.endswith((".query.out", ".key.out", ".value.out", ".context"))
