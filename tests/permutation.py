"""Copies of any described model that compute the same with their units in another order."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from peft_graft.models.loading import wrap_model
from peft_graft.models.sizes import heads_of
from peft_graft.models.spaces import Site, Space

#: Spaces whose units are the residual stream's.
STREAM = ("attn.in", "ffn.in", "layer.out", "attn.output.out", "ffn.down.out", "cross.in", "cross.memory",
          "cross.output.out")  # fmt: skip
#: Spaces between the projections of a latent attention, left as they are; so are its heads.
LATENT = ("attn.query_down.out", "attn.query_latent", "attn.kv_down.out", "attn.kv_latent", "attn.kv_up.out")
#: Families whose attention treats its heads by their number.
BY_NUMBER = ("bloom", "mpt", "t5", "mt5", "umt5", "mpnet")


def permuted(model: Any, seed: int = 3) -> tuple[Any, Tensor]:
    """A copy of a bare model with the residual stream, key-value groups, values' units and FFN units in another order.

    Every tensor axis of the stream's size outside the linear layers of the description is taken for the stream's, so
    no other size in the model may be the same. Queries' and keys' units stay in order within a head: rotary embeddings
    treat them by their number.

    Returns:
        The copy, and for each of its hidden units the original's, int64.
    """
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    architecture = wrap_model(other).architecture
    hidden = architecture.hidden_size
    stream = torch.randperm(hidden, generator=generator)
    orders: dict[Space, Tensor] = {}
    inside: dict[int, str] = {}
    with torch.no_grad():
        for stack in architecture.row.stacks:
            for layer in range(architecture.depths[stack.name]):
                orders.update(_orders(architecture, stack, layer, other.config, stream, generator))
        seen: set[int] = set()
        for role, linear in architecture.row.linears.items():
            for layer in range(architecture.depth(role)):
                if not architecture.has(Site(layer, role)):
                    continue
                module = other.get_submodule(f"{architecture.row.stack(role).layers}.{layer}.{linear.path}")
                columns, rows = orders[Space(layer, linear.reads)], orders[Space(layer, linear.writes)]
                weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
                units = architecture.units.get(role)
                units = torch.arange(len(weight)) if units is None else units
                if id(module) not in seen:
                    weight.copy_(weight[:, columns])
                seen.add(id(module))
                weight[units] = weight[units[rows]]
                inside[id(module.weight)] = role
                if getattr(module, "bias", None) is not None:
                    module.bias[units] = module.bias[units[rows]]
                    inside[id(module.bias)] = role
        for name, parameter in other.named_parameters():
            if id(parameter) in inside:
                continue
            if name.endswith(
                "conv.in_proj.weight"
            ):  # LFM2's: three vectors of the stream's size, of which no role is known
                parameter.copy_(parameter[:, stream].unflatten(0, (3, hidden))[:, stream].flatten(0, 1))
                continue
            own = next((part for part in ("q_norm", "k_norm") if part in name), None)
            if own:  # of all heads at once, or of one
                layer = int(name.split("layers.")[1].split(".")[0])
                order = orders[Space(layer, "attn.query.out" if own == "q_norm" else "attn.key.out")]
                if len(parameter) == len(order):
                    parameter.copy_(parameter[order])
                continue
            for axis, size in enumerate(parameter.shape):
                if size == hidden:
                    parameter.copy_(parameter.index_select(axis, stream))
    return other, stream


def _orders(architecture, stack, layer: int, config, stream: Tensor, generator) -> dict[Space, Tensor]:
    found: dict[Space, Tensor] = {}
    for linear in stack.linears.values():
        for name in (linear.reads, linear.writes):
            space = Space(layer, stack.full(name))
            if space not in architecture.sizes:  # a layer without experts among others with some
                continue
            if name.endswith(STREAM):
                found[space] = stream
            elif name.endswith(("ffn.up.out", "ffn.gate.out", "ffn.mid")):
                start = name[: name.rindex("ffn.")]
                alike = [Space(layer, stack.full(start + end)) for end in ("ffn.up.out", "ffn.gate.out", "ffn.mid")]
                known = next((found[each] for each in alike if each in found), None)
                found[space] = torch.randperm(architecture.size(space), generator=generator) if known is None else known
            elif "router" in name or name.endswith(LATENT):
                found[space] = torch.arange(architecture.size(space))
    for block in ("attn", "cross"):
        spaces = [Space(layer, stack.full(f"{block}.{end}")) for end in ("query.out", "context")]
        if f"{block}.kv_up" in stack.linears:
            found.update({space: torch.arange(architecture.size(space)) for space in spaces})
        elif f"{block}.query" in stack.linears and spaces[0] in architecture.sizes:
            spaces = [Space(layer, stack.full(f"{block}.{end}")) for end in
                      ("query.out", "key.out", "value.out", "context")]  # fmt: skip
            found.update(zip(spaces, _heads(architecture, spaces, config, generator), strict=True))
    return found


def _heads(architecture, spaces, config, generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if hasattr(config, "d_kv"):
        queries, groups, width = config.num_heads, config.num_heads, config.d_kv
    elif hasattr(config, "d_model") and hasattr(config, "encoder_attention_heads"):
        queries = groups = config.encoder_attention_heads
        width = config.d_model // queries
    else:
        queries, groups, width = heads_of(config)
    assert architecture.size(spaces[0]) == queries * width
    assert architecture.size(spaces[2]) == groups * width
    each = queries // groups
    plain = config.model_type in BY_NUMBER
    group_order = torch.arange(groups) if plain else torch.randperm(groups, generator=generator)
    in_group = torch.arange(each) if plain else torch.randperm(each, generator=generator)
    inner = torch.randperm(width, generator=generator)
    heads = (group_order[:, None] * each + in_group).flatten()
    in_order = torch.arange(width)

    def units(order: Tensor, within: Tensor) -> Tensor:
        return (order[:, None] * width + within).flatten()

    return units(heads, in_order), units(group_order, in_order), units(group_order, inner), units(heads, inner)
