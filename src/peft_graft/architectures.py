"""A model's layers, roles and spaces: from the table of families, or inferred from its module tree, or refused.

Whoever is refused is told the reason and what a row of the table would have to say (docs/architectures.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_graft.errors import ArchitectureError
from peft_graft.families import GATE_UP, ROW_OF_TYPE, SPACES_OF_ROLE, ArchitectureRow, LinearRole, Tap
from peft_graft.modules import EMBEDDED, GLOBAL_SPACES, LAST_OUT, POOLED_OUT, Site, Space
from peft_graft.norms import global_norm_paths, norm_paths


@dataclass(frozen=True)
class Architecture:
    """A row made concrete for one model: number of layers and the size of every space.

    Attributes:
        prefix: the attribute under which a task model keeps this base model (``bert``).
        units: for roles that share a fused linear layer, their places in its output, int64.
        norms: role of a layer norm -> its path inside the layer, or in the base model for those outside the layers.
        transposed: whether linear layers keep their weight as [in, out] (``Conv1D``).
    """

    model_type: str
    row: ArchitectureRow
    prefix: str
    num_layers: int
    sizes: Mapping[Space, int]
    inferred: bool = False
    units: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False

    def size(self, space: Space) -> int:
        """Number of units of a space.

        Raises:
            ArchitectureError: the model has no such space.
        """
        if space not in self.sizes:
            raise ArchitectureError(
                f"a {self.model_type} model of {self.num_layers} layers has no such space", where=str(space)
            )
        return self.sizes[space]

    def tap(self, space: Space) -> Tap:
        """Where to observe a space of a layer, as an absolute module path of the base model."""
        local = self.row.taps.get(space.name) or self._tap_of_linear(space.name)
        if local is None:
            raise ArchitectureError(f"a {self.model_type} model has no such space", where=str(space))
        return replace(local, path=f"{self.row.layers}.{space.layer}.{local.path}")

    def _tap_of_linear(self, name: str) -> Tap | None:
        for role, linear in self.row.linears.items():
            if linear.reads == name:
                return Tap(linear.path, "input")
            if linear.writes == name:
                return Tap(linear.path, "output", self.units.get(role))
        return None

    def path(self, site: Site) -> str:
        """The module path of a linear layer, a norm, or a bottleneck adapter's container, seen from the base model.

        Raises:
            ArchitectureError: the architecture has no such role.
        """
        if site.layer < 0 and site.role in self.norms:
            return self.norms[site.role]
        path = dict(self._places()).get(site.role)
        if path is None:
            raise ArchitectureError(
                f"{self.model_type} has no role {site.role!r}",
                where=str(site),
                fix=f"roles of this architecture: {', '.join(self.roles)}",
            )
        return f"{self.row.layers}.{site.layer}.{path}"

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles at which a module can attach inside the model."""
        return (*self.row.linears, *self.row.adapters, *self.norms)

    def _places(self) -> list[tuple[str, str]]:
        linears = [(role, linear.path) for role, linear in self.row.linears.items()]
        return [*linears, *((role, point.path) for role, point in self.row.adapters.items()), *self.norms.items()]

    def sites(self, path: str) -> tuple[list[Site], str] | None:
        """The sites of a module path, several for a fused layer, and what stands before the layers in it, or None.

        What stands before is ``bert.`` in a task model, nothing in a bare one.
        """
        for role, place in self.norms.items():
            if path == place or path == f"{self.prefix}.{place}":
                return [Site(-1, role)], path.removesuffix(place)
        match = re.fullmatch(rf"(?P<prefix>(?:.*\.)?){re.escape(self.row.layers)}\.(?P<layer>\d+)\.(?P<path>.+)", path)
        if match is None:
            return None
        roles = [role for role, place in self._places() if place == match["path"]]
        return ([Site(int(match["layer"]), role) for role in roles], match["prefix"]) if roles else None

    def fused_size(self, role: str) -> int:
        """Outputs of the fused linear layer that holds a role."""
        fused = self.row.linears[role].fused
        assert fused is not None
        return sum(len(self.units[other]) for other in fused.roles)


def describe(base: nn.Module, model_type: str, prefix: str) -> Architecture:
    """Describe a base model (no task head) from its module tree; parameters may be on the meta device.

    Args:
        base: the base model, e.g. a ``BertModel``.
        model_type: ``config.model_type``.
        prefix: ``base_model_prefix`` of its task models.

    Raises:
        ArchitectureError: the model type is not in the table and its roles cannot be inferred, or a row's path is
            missing in this model.
    """
    row = ROW_OF_TYPE.get(model_type)
    inferred = row is None
    if row is None:
        row = infer_row(base, model_type)
    layers = _submodule(base, row.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ArchitectureError(
            "the model has no list of layers where its architecture's row says",
            where=f"{model_type} {row.layers}",
            fix="load the base model with AutoModel, or correct the row in peft_graft/families.py",
        )
    sizes: dict[Space, int] = {}
    units = _units(row, layers[0], getattr(base, "config", None))
    for index, layer in enumerate(layers):
        for role, linear in row.linears.items():
            module = _submodule(layer, linear.path)
            shape = linear_shape(module)
            if shape is None:
                raise ArchitectureError(
                    "the layer has no plain linear module there",
                    where=f"{model_type} layer {index} {role}",
                    expected=f"torch.nn.Linear at {linear.path}",
                    found=type(module).__name__ if module is not None else "nothing",
                )
            sizes[Space(index, linear.reads)] = shape[0]
            sizes[Space(index, linear.writes)] = len(units[role]) if linear.fused else shape[1]
        if "layer.out" in row.taps:
            sizes[Space(index, "layer.out")] = sizes[Space(index, "ffn.down.out")]
    last = max((space for space in sizes if space.name == "ffn.down.out"), default=None)
    hidden = sizes[last] if last else getattr(getattr(base, "config", None), "hidden_size", None)
    if hidden is not None:
        sizes.update({Space(-1, name): int(hidden) for name in GLOBAL_SPACES})
        if getattr(base, "pooler", None) is None:
            sizes.pop(Space(-1, POOLED_OUT))
        if not any(form.reads == LAST_OUT for form in row.heads.values()):
            sizes.pop(Space(-1, LAST_OUT))
    words = getattr(_input_embeddings(base), "embedding_dim", None)
    if words is not None:
        sizes[Space(-1, EMBEDDED)] = int(words)
    norms = norm_paths(layers[0]) | global_norm_paths(base)
    transposed = any(type(module).__name__ == "Conv1D" for module in layers[0].modules())
    return Architecture(model_type, row, prefix, len(layers), sizes, inferred, units, norms, transposed)


def _input_embeddings(base: nn.Module) -> nn.Module | None:
    try:
        found = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, transformers' transposed ``Conv1D`` included; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        weight = module.weight  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def _units(row: ArchitectureRow, layer: nn.Module, config: Any) -> dict[str, Tensor]:
    """For every role in a fused linear layer its places in the output, in the order of heads and units in heads.

    Raises:
        ArchitectureError: the configuration's heads do not account for the layer's outputs.
    """
    found: dict[str, Tensor] = {}
    for role, linear in row.linears.items():
        if linear.fused is None or role in found:
            continue
        shape = linear_shape(_submodule(layer, linear.path))
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
                where=f"{row.model_types[0]} {linear.path}",
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


def heads_of(config: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    queries = int(config.num_attention_heads)
    pairs = int(getattr(config, "num_key_value_heads", None) or queries)
    if config.model_type == "falcon":  # one key-value head for all, or as many as it says, or as many as query heads
        pairs = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else queries
    width = getattr(config, "head_dim", None) or config.hidden_size // queries
    return queries, int(pairs), int(width)


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


# Names that model authors give to the linear layers of a transformer block; matched against the path in the layer.
_ROLE_PATTERNS = {
    "attn.query": r"(.*\.)?(query|q|q_proj|q_lin|query_proj|wq|to_q|linear_q)",
    "attn.key": r"(.*\.)?(key|k|k_proj|k_lin|key_proj|wk|to_k|linear_k)",
    "attn.value": r"(.*\.)?(value|v|v_proj|v_lin|value_proj|wv|to_v|linear_v)",
    "attn.output": r".*att.*\.(o|o_proj|out_proj|out_lin|wo|to_out|output\.dense|dense|linear_out)",
    "ffn.gate": r"(.*\.)?(gate_proj|w1_gate)",
    "ffn.up": r"(.*\.)?(up_proj|fc1|lin1|fc_in|linear1|intermediate\.dense|dense_h_to_4h)",
    "ffn.down": r"(?!.*att)(.*\.)?(down_proj|fc2|lin2|fc_out|linear2|output\.dense|dense_4h_to_h)",
}


def infer_row(base: nn.Module, model_type: str) -> ArchitectureRow:
    """Infer a row from a module tree: the one stack of like layers, and its linear layers by their usual names.

    Raises:
        ArchitectureError: no such stack, several of them, or names that fit no role or several.
    """

    def refuse(reason: str) -> ArchitectureError:
        return ArchitectureError(
            f"this architecture is not in the table and cannot be inferred: {reason}",
            where=model_type,
            fix="add a row with its layers and role paths to ROWS in peft_graft/families.py "
            "(docs/architectures.md shows how)",
        )

    stacks = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and len({type(child) for child in module}) == 1
        and sum(isinstance(inner, nn.Linear) for inner in module[0].modules()) >= 2
    ]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if len(stacks) != 1:
        raise refuse(f"found {len(stacks)} stacks of layers ({', '.join(stacks) or 'none'}), expected one")
    layer = base.get_submodule(f"{stacks[0]}.0")
    linears: dict[str, LinearRole] = {}
    for path, module in layer.named_modules():
        if linear_shape(module) is None:
            continue
        roles = [role for role, pattern in _ROLE_PATTERNS.items() if re.fullmatch(pattern, path)]
        if len(roles) > 1 or (roles and roles[0] in linears):
            raise refuse(f"{path} could be {' or '.join(roles)}, which is taken")
        if roles:
            linears[roles[0]] = LinearRole(path, *SPACES_OF_ROLE[roles[0]])
    if not {"attn.query", "attn.value"} <= linears.keys():
        raise refuse(f"no query and value projections in {stacks[0]}.0; found roles: {', '.join(linears) or 'none'}")
    return ArchitectureRow((model_type,), stacks[0], linears)
