"""The row of a model that no family declares: from its module tree, by the names that authors usually give."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from peft_graft.errors import ArchitectureError
from peft_graft.models.sizes import linear_shape
from peft_graft.models.spec import SPACES_OF_ROLE, ArchitectureRow, LinearRole, Stack

# Names that model authors give to the linear layers of a transformer block; matched against the path in the layer.
_ROLE_PATTERNS = {
    "attn.query": r"(.*\.)?(query|q|q_proj|q_lin|query_proj|wq|to_q|linear_q)",
    "attn.key": r"(.*\.)?(key|k|k_proj|k_lin|key_proj|wk|to_k|linear_k)",
    "attn.value": r"(.*\.)?(value|v|v_proj|v_lin|value_proj|wv|to_v|linear_v)",
    "attn.query_down": r"(.*\.)?q_a_proj",
    "attn.query_up": r"(.*\.)?q_b_proj",
    "attn.kv_down": r"(.*\.)?kv_a_proj(_with_mqa)?",
    "attn.kv_up": r"(.*\.)?kv_b_proj",
    "attn.output": r".*att.*\.(o|o_proj|out_proj|out_lin|wo|to_out|output\.dense|dense|linear_out)",
    "ffn.gate": r"(.*\.)?(gate_proj|w1_gate)",
    "ffn.up": r"(.*\.)?(up_proj|fc1|lin1|fc_in|linear1|intermediate\.dense|dense_h_to_4h)",
    "ffn.down": r"(?!.*att)(.*\.)?(down_proj|fc2|lin2|fc_out|linear2|output\.dense|dense_4h_to_h)",
}

#: Whichever of these roles a layer has, it attends by a query and a value.
_QUERY, _VALUE = ("attn.query", "attn.query_up"), ("attn.value", "attn.kv_up")


def infer_row(base: nn.Module, model_type: str) -> ArchitectureRow:
    """Infer a row from a module tree: the one stack of like layers, and its linear layers by their usual names.

    Raises:
        ArchitectureError: no such stack, several of them, or names that fit no role or several.
    """

    def refuse(reason: str) -> ArchitectureError:
        return ArchitectureError(
            f"this architecture is not known and cannot be inferred: {reason}",
            where=model_type,
            fix="declare its layers and role paths with register_architecture (docs/extending.md shows how)",
        )

    stacks = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(sum(isinstance(inner, nn.Linear) for inner in child.modules()) >= 2 for child in module)
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        raise refuse(f"found {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'}), expected one")
    layers = list(base.get_submodule(stacks[0]).children())
    linears: dict[str, LinearRole] = {}
    found = []
    for index, layer in enumerate(layers):
        try:
            found.append(_roles(layer))
        except ValueError as error:
            raise refuse(f"in {stacks[0]}.{index}, {error}") from error
        for role, path in found[-1].items():
            known = linears.setdefault(role, LinearRole(path, *SPACES_OF_ROLE[role]))
            if known.path != path:
                raise refuse(f"{role} is {known.path} in some layers and {path} in others")
    if not any(role.startswith("attn.") for role in linears):
        names = [path for path, module in layers[0].named_modules() if linear_shape(module)]
        raise refuse(f"no query and value projections in {stacks[0]}.0, whose linear layers are {', '.join(names)}")
    linears = {
        role: replace(linear, optional=any(role not in own for own in found)) for role, linear in linears.items()
    }
    # An encoder or a decoder: it decides which stack of an encoder-decoder it corresponds to.
    causal = any(getattr(module, "is_causal", False) for layer in layers for module in layer.modules())
    return ArchitectureRow((model_type,), (Stack(stacks[0], linears, kind="decoder" if causal else "encoder"),))


def _roles(layer: nn.Module) -> dict[str, str]:
    """Role -> path in a layer; those of experts have none.

    A layer without query and value mixes tokens in another way, and what it does that with has no role either.

    Raises:
        ValueError: a path fits several roles, or one that another path has.
    """
    found: dict[str, str] = {}
    for path, module in layer.named_modules():
        if linear_shape(module) is None or "expert" in path:
            continue
        roles = [role for role, pattern in _ROLE_PATTERNS.items() if re.fullmatch(pattern, path)]
        if len(roles) > 1 or (roles and roles[0] in found):
            raise ValueError(f"{path} could be {' or '.join(roles)}, which is taken")
        if roles:
            found[roles[0]] = path
    attends = all(found.keys() & {*names} for names in (_QUERY, _VALUE))
    return {role: path for role, path in found.items() if attends or not role.startswith("attn.")}
