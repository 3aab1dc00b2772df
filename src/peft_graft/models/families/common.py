"""What rows of the table of families are written with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from peft_graft.models.spec import LINEAR_ROLES, SPACES_OF_ROLE, AdapterPoint, Fused, LinearRole, Tap


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


#: The linear layers of BART's layers, and of many after it.
BART_LAYER = linears(
    attn_query="self_attn.q_proj",
    attn_key="self_attn.k_proj",
    attn_value="self_attn.v_proj",
    attn_output="self_attn.out_proj",
    ffn_up="fc1",
    ffn_down="fc2",
)
