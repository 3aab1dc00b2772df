"""Sizes of linear layers, of heads, and of the spaces of a layer and of a whole model, from a module tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.errors import ArchitectureError
from peft_graft.models.spaces import FIRST_OUT, GLOBAL_SPACES, LAST_OUT, POOLED_OUT, Site, Space
from peft_graft.models.spec import GATE_UP, ArchitectureRow, Stack


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, transformers' transposed ``Conv1D`` included; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        weight = module.weight  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    queries = int(config.num_attention_heads)
    pairs = int(getattr(config, "num_key_value_heads", None) or queries)
    if config.model_type == "falcon":  # one key-value head for all, or as many as it says, or as many as query heads
        pairs = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else queries
    if config.model_type in ("gpt_bigcode", "persimmon"):
        pairs = 1 if getattr(config, "multi_query", False) else queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return queries, int(pairs), int(width)


def head_counts(config: Any) -> tuple[int, int]:
    """Query heads and key-value heads, (0, 0) for a model whose configuration says neither."""
    return heads_of(config)[:2] if getattr(config, "num_attention_heads", None) else (0, 0)


def layer_sizes(
    stack: Stack, model_type: str, index: int, layer: nn.Module, units: Mapping[str, Tensor]
) -> tuple[dict[Space, int], set[Site]]:
    """The sizes of one layer's spaces, and the places that it lacks.

    Raises:
        ArchitectureError: a role of the row has no linear layer there.
    """
    sizes: dict[Space, int] = {}
    absent: set[Site] = set()
    for role, linear in stack.linears.items():
        module = submodule(layer, linear.path)
        shape = linear_shape(module)
        if shape is None and linear.optional:
            absent.add(Site(index, stack.full(role)))
            continue
        if shape is None:
            raise ArchitectureError(
                "the layer has no plain linear module there",
                where=f"{model_type} layer {index} {stack.full(role)}",
                expected=f"torch.nn.Linear at {linear.path}",
                found=type(module).__name__ if module is not None else "nothing",
            )
        sizes[Space(index, stack.full(linear.reads))] = shape[0]
        sizes[Space(index, stack.full(linear.writes))] = len(units[role]) if linear.fused else shape[1]
    for name in stack.taps:  # all of the residual stream
        sizes[Space(index, stack.full(name))] = sizes[Space(index, stack.full("ffn.down.out"))]
    return sizes, absent


def global_sizes(
    row: ArchitectureRow, depths: Mapping[str, int], sizes: Mapping[Space, int], base: nn.Module
) -> dict[Space, int]:
    """The sizes of the whole model's outputs; nothing for two towers with an output each."""
    last = row.stacks[-1]
    if len(row.stacks) > 1 and last.kind != "decoder":
        return {}
    written = [Space(depths[last.name] - 1, last.full(name)) for name in ("ffn.down.out", "attn.output.out")]
    projected = (part for path, part in base.named_modules() if path.endswith("project_out"))  # small models of OPT
    sizes_out = (shape[1] for part in projected if (shape := linear_shape(part)) is not None)
    hidden = next(sizes_out, None) or next((sizes[space] for space in written if space in sizes), None)
    hidden = hidden or getattr(getattr(base, "config", None), "hidden_size", None)
    if hidden is None:
        return {}
    found = {Space(-1, name): int(hidden) for name in GLOBAL_SPACES}
    read = {form.reads for form in row.heads.values()}
    if getattr(base, "pooler", None) is None:
        found.pop(Space(-1, POOLED_OUT))
    if LAST_OUT not in read:
        found.pop(Space(-1, LAST_OUT))
    if FIRST_OUT not in read and len(row.stacks) > 1:
        found.pop(Space(-1, FIRST_OUT))
    return found


def fused_units(stack: Stack, model_type: str, layer: nn.Module, config: Any) -> dict[str, Tensor]:
    """For every role in a fused linear layer its places in the output, in the order of heads and units in heads.

    Raises:
        ArchitectureError: the configuration's heads do not account for the layer's outputs.
    """
    found: dict[str, Tensor] = {}
    for role, linear in stack.linears.items():
        if linear.fused is None or role in found:
            continue
        shape = linear_shape(submodule(layer, linear.path))
        if shape is None:
            continue  # refused by name where sizes are taken
        if linear.fused.roles == GATE_UP:
            halves = torch.arange(shape[1]).chunk(2)
            found.update(zip(linear.fused.roles, halves, strict=True))
            continue
        queries, pairs, width = heads_of(config)
        if (queries + 2 * pairs) * width != shape[1]:
            raise ArchitectureError(
                "the heads of the configuration do not account for the fused projection",
                where=f"{model_type} {linear.path}",
                expected=f"{(queries + 2 * pairs) * width} outputs ({queries} + 2 x {pairs} heads of {width})",
                found=shape[1],
            )
        if linear.fused.layout == "stacked":
            parts = torch.split(torch.arange(shape[1]), [queries * width, pairs * width, pairs * width])
        else:
            groups = torch.arange(shape[1]).view(pairs, queries // pairs + 2, width)
            parts = (groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten())
        found.update(zip(linear.fused.roles, parts, strict=True))
    return found


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None where there is none."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None
