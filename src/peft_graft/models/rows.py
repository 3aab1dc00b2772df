"""Shorthand for rows of the table of families: linear layers, adapter points, the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from peft_graft.models.spec import (
    LINEAR_ROLES,
    SPACES_OF_ROLE,
    AdapterPoint,
    ArchitectureRow,
    Experts,
    Fused,
    HeadForm,
    Kind,
    LinearRole,
    Stack,
    Tap,
)
from peft_graft.models.tasks import Task


def linears(*fused: tuple[str, Fused], **paths: str) -> dict[str, LinearRole]:
    """The linear layers of a row: role -> path, and (path, ``Fused``) for those that hold several roles."""
    roles = {name.replace("_", ".", 1): LinearRole(path, *SPACES_OF_ROLE[name.replace("_", ".", 1)])
             for name, path in paths.items()}  # fmt: skip
    roles |= {role: LinearRole(path, *SPACES_OF_ROLE[role], how) for path, how in fused for role in how.roles}
    return {role: roles[role] for role in LINEAR_ROLES if role in roles}


def optional(found: Mapping[str, LinearRole]) -> dict[str, LinearRole]:
    """The same linear layers where some models, or some layers, do without them."""
    return {role: replace(linear, optional=True) for role, linear in found.items()}


def adapter_points(attention: str, output: str) -> dict[str, AdapterPoint]:
    """Where AdapterHub puts bottleneck adapters: the paths of the containers after the two blocks of a layer."""
    return {
        "attn.adapter": AdapterPoint(attention, "attn.output.out", "attn.stream", "layer.in"),
        "ffn.adapter": AdapterPoint(output, "ffn.down.out", "layer.out", "attn.stream"),
    }


def post_norm(query: str, up: str, last: str) -> dict[str, Tap]:
    """Where the residual stream shows in layers that norm it after each block: what the blocks read, and the last."""
    return {"layer.in": Tap(query, "input"), "attn.stream": Tap(up, "input"), "layer.out": Tap(last, "output")}


def pre_norm(first: str, second: str) -> dict[str, Tap]:
    """The same in layers that norm it before each block: what the norms read, and what the layer gives."""
    return {"layer.in": Tap(first, "input"), "attn.stream": Tap(second, "input"), "layer.out": Tap("", "output")}


def crossing(taps: Mapping[str, Tap], cross: Tap) -> dict[str, Tap]:
    """The stream of decoder layers that also attend to an encoder, after which the feed-forward block sees it."""
    return {**taps, "attn.stream": cross, "cross.stream": taps["attn.stream"]}


def crossing_points(attention: str, cross: str, output: str) -> dict[str, AdapterPoint]:
    """AdapterHub's bottleneck adapters in such layers."""
    points = adapter_points(attention, output)
    return {
        **points,
        "cross.adapter": AdapterPoint(cross, "cross.output.out", "cross.stream", "attn.stream"),
        "ffn.adapter": replace(points["ffn.adapter"], parallel="cross.stream"),
    }


def row(
    *model_types: str,
    layers: str,
    linears: Mapping[str, LinearRole],
    kind: Kind = "encoder",
    heads: Mapping[Task, HeadForm] = MappingProxyType({}),
    lm_head: str = "lm_head",
    taps: Mapping[str, Tap] = MappingProxyType({}),
    adapters: Mapping[str, AdapterPoint] = MappingProxyType({}),
    experts: Experts | None = None,
) -> ArchitectureRow:
    """A row of one stack of layers."""
    stack = Stack(layers, dict(linears), taps=dict(taps), adapters=dict(adapters), kind=kind, experts=experts)
    return ArchitectureRow(model_types, (stack,), heads=dict(heads), lm_head=lm_head)


#: A row of one stack of decoder layers.
decoder_row = partial(row, kind="decoder")


#: Where AdapterHub puts bottleneck adapters in the layers of most models.
LAYER_ADAPTERS = adapter_points("attention_adapters.adapters", "output_adapters.adapters")
