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
from peft_graft.models.families.table import ROWS_OF_TYPE
from peft_graft.models.norms import global_norm_paths, norm_paths
from peft_graft.models.spaces import EMBEDDED, FIRST_OUT, GLOBAL_SPACES, LAST_OUT, POOLED_OUT, VOCABULARY, Site, Space
from peft_graft.models.spec import (
    EMBED_ROLE,
    GATE_UP,
    INVERTIBLE_ROLE,
    LM_HEAD_ROLE,
    PREFIX_ROLE,
    SPACES_OF_ROLE,
    ArchitectureRow,
    LinearRole,
    Stack,
    Tap,
    expert_of,
    of_expert,
)
from peft_graft.models.tasks import Task


@dataclass(frozen=True)
class Architecture:
    """A row made concrete for one model: number of layers and the size of every space.

    Attributes:
        row: without the roles that the model lacks, with a role for each of its experts.
        prefix: the attribute under which a task model keeps this base model (``bert``).
        depths: number of layers of every stack, by its name, which is empty for a stack alone.
        units: for roles that share a fused linear layer, their places in its output, int64.
        absent: places that a layer lacks although others have them, such as the experts of a dense layer.
        norms: role of a layer norm outside the layers -> its path in the base model.
        vocabulary: role of word embeddings -> their path in the base model; of the output layer, in a language model.
        embed_scale: what the model multiplies its word embeddings by.
        transposed: whether linear layers keep their weight as [in, out] (``Conv1D``).
    """

    model_type: str
    row: ArchitectureRow
    prefix: str
    depths: Mapping[str, int]
    sizes: Mapping[Space, int]
    inferred: bool = False
    units: Mapping[str, Tensor] = field(default_factory=dict)
    absent: frozenset[Site] = frozenset()
    norms: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    vocabulary: Mapping[str, str] = field(default_factory=dict)
    embed_scale: float = 1.0

    @property
    def num_layers(self) -> int:
        """Number of layers of all stacks."""
        return sum(self.depths.values())

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, of the last stack where there are several."""
        return self.sizes[Space(0, self.row.stacks[-1].full("attn.in"))]

    def depth(self, name: str) -> int:
        """Number of layers of the stack that a role or space belongs to."""
        return self.depths[self.row.stack(name).name]

    def position(self, site: Site) -> int:
        """Where a site's layer comes in the order in which the model computes all its layers."""
        own = self.row.stack(site.role)
        before = self.row.stacks[: self.row.stacks.index(own)]
        return sum(self.depths[stack.name] for stack in before) + site.layer

    def has(self, site: Site) -> bool:
        """Whether the model has this place."""
        known = {*self._places(), *([PREFIX_ROLE] if len(self.row.stacks) == 1 else [])}
        return site.role in known and 0 <= site.layer < self.depth(site.role) and site not in self.absent

    def start(self, task: Task) -> str:
        """What stands before the paths of the base model in a model of this task: ``bert.``, or nothing."""
        return "" if task in self.row.flat_tasks or not self.prefix else f"{self.prefix}."

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
        stack = next((stack for stack in self.row.stacks if stack.local(space.name) is not None), self.row.stacks[0])
        local = stack.taps.get(stack.local(space.name) or "") or self._tap_of_linear(space)
        if local is None:
            raise ArchitectureError(f"a {self.model_type} model has no such space", where=str(space))
        layer, expert = f"{stack.layers}.{space.layer}", None
        if stack.experts and expert_of(space.name) is not None:
            expert = f"{layer}.{stack.experts.block}", f"{layer}.{stack.experts.path}.{expert_of(space.name)}"
        return replace(local, path=f"{layer}.{local.path}" if local.path else layer, expert=expert)

    def _tap_of_linear(self, space: Space) -> Tap | None:
        for role, linear in self.row.linears.items():
            if Site(space.layer, role) in self.absent:
                continue
            if linear.reads == space.name:
                return Tap(linear.path, "input")
            if linear.writes == space.name:
                return Tap(linear.path, "output", self.units.get(role))
        return None

    def path(self, site: Site) -> str:
        """The module path of a linear layer, a norm, or a bottleneck adapter's container, seen from the base model.

        Raises:
            ArchitectureError: the architecture has no such role.
        """
        if site.layer < 0 and site.role in self._outside_layers:
            return self._outside_layers[site.role]
        path = self._places().get(site.role)
        if path is None:
            raise ArchitectureError(
                f"{self.model_type} has no role {site.role!r}",
                where=str(site),
                fix=f"roles of this architecture: {', '.join(self.roles)}",
            )
        return f"{self.row.stack(site.role).layers}.{site.layer}.{path}"

    @property
    def roles(self) -> tuple[str, ...]:
        """All roles at which a module can attach inside the model."""
        return (*self._places(), *self._outside_layers)

    @property
    def _outside_layers(self) -> dict[str, str]:
        # Of a model with one stack; the library's name for it.
        invertible = {INVERTIBLE_ROLE: "invertible_adapters"} if self.row.adapters and len(self.row.stacks) == 1 else {}
        return {**self.norms, **self.vocabulary, **invertible}

    def _places(self) -> dict[str, str]:
        """Role -> path inside the layer, for all roles of all stacks."""
        return {stack.full(role): path for stack in self.row.stacks for role, path in stack.places.items()}

    def sites(self, path: str) -> tuple[list[Site], str] | None:
        """The sites of a module path, several for a fused layer, and what stands before the layers in it, or None.

        What stands before is ``bert.`` in a task model, nothing in a bare one.
        """
        for role, place in self._outside_layers.items():
            if path == place or (path == f"{self.prefix}.{place}" and role != LM_HEAD_ROLE):
                return [Site(-1, role)], path.removesuffix(place)
        for stack in self.row.stacks:
            pattern = rf"(?P<prefix>(?:.*\.)?){re.escape(stack.layers)}\.(?P<layer>\d+)\.(?P<path>.+)"
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            roles = [role for role, place in stack.places.items() if place == match["path"]]
            if roles:
                return [Site(int(match["layer"]), stack.full(role)) for role in roles], match["prefix"]
        return None

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
    rows = ROWS_OF_TYPE.get(model_type, [])
    inferred = not rows
    row = next((row for row in rows if _fits(row, base)), rows[0]) if rows else infer_row(base, model_type)
    stacks: list[Stack] = []
    depths: dict[str, int] = {}
    sizes: dict[Space, int] = {}
    units: dict[str, Tensor] = {}
    absent: set[Site] = set()
    for stack in row.stacks:
        layers = _submodule(base, stack.layers)
        if not isinstance(layers, nn.ModuleList):
            raise ArchitectureError(
                "the model has no list of layers where its architecture's row says",
                where=f"{model_type} {stack.layers}",
                fix="load the base model with AutoModel, or correct the row in peft_graft/families.py",
            )
        stack = _concrete(stack, layers)
        stacks.append(stack)
        depths[stack.name] = len(layers)
        own = _units(stack, model_type, layers[0], getattr(base, "config", None))
        units.update({stack.full(role): places for role, places in own.items()})
        for index, layer in enumerate(layers):
            found, missing = _sizes(stack, model_type, index, layer, own)
            sizes.update(found)
            absent |= missing
    row = replace(row, stacks=tuple(stacks))
    sizes.update(_global_sizes(row, depths, sizes, base))
    vocabulary: dict[str, str] = {}
    words, embed_scale = _input_embeddings(base), 1.0
    if isinstance(words, nn.Embedding) and row.reads_text:  # the stacks of an encoder-decoder share them
        sizes[Space(-1, EMBEDDED)] = words.embedding_dim
    if isinstance(words, nn.Embedding) and len(stacks) == 1:
        sizes[Space(-1, VOCABULARY)] = words.num_embeddings
        vocabulary[EMBED_ROLE] = next(path for path, module in base.named_modules() if module is words)
        if stacks[0].kind == "decoder":
            vocabulary[LM_HEAD_ROLE] = row.lm_head
        factor = getattr(words, "embed_scale", 1.0)  # Gemma 3 multiplies inside its class
        embed_scale = 1.0 if isinstance(factor, Tensor) and factor.is_meta else float(factor)
    norms = global_norm_paths(base) if len(stacks) == 1 else {}
    transposed = any(type(module).__name__ == "Conv1D" for module in base.modules())
    return Architecture(
        model_type, row, prefix, depths, sizes, inferred, units, frozenset(absent), norms, transposed, vocabulary,
        embed_scale,
    )  # fmt: skip


def _fits(row: ArchitectureRow, base: nn.Module) -> bool:
    """Whether the model has its layers where the row says."""
    return all(isinstance(_submodule(base, stack.layers), nn.ModuleList) for stack in row.stacks)


def _input_embeddings(base: nn.Module) -> nn.Module | None:
    try:
        found = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _concrete(stack: Stack, layers: nn.ModuleList) -> Stack:
    """The stack with the paths that this model has, and a role for every expert's part."""
    linears: dict[str, LinearRole] = {}

    def present(path: str) -> bool:
        return any(_submodule(layer, path) is not None for layer in layers)

    for role, linear in stack.linears.items():
        if linear.elsewhere and not present(linear.path):
            linear = replace(linear, path=linear.elsewhere, elsewhere=None)
        if not linear.optional or present(linear.path):
            linears[role] = linear
    if stack.experts:
        lists = [_submodule(layer, stack.experts.path) for layer in layers]
        numbers = max((len(experts) for experts in lists if isinstance(experts, nn.ModuleList)), default=0)
        for number in range(numbers):
            inside = of_expert(f"expert.{number}", stack.experts.linears, f"{stack.experts.path}.{number}")
            linears |= {role: replace(linear, optional=True) for role, linear in inside.items()}
    # One name means different norms in the encoder of BART and in OPT: where there are several stacks, rows say it.
    norms = stack.norms if stack.name else norm_paths(layers[0])
    return replace(stack, linears=linears, norms=norms)


def _sizes(
    stack: Stack, model_type: str, index: int, layer: nn.Module, units: Mapping[str, Tensor]
) -> tuple[dict[Space, int], set[Site]]:
    """The sizes of one layer's spaces, and its absent places.

    Raises:
        ArchitectureError: a role of the row has no linear layer there.
    """
    sizes: dict[Space, int] = {}
    absent: set[Site] = set()
    for role, linear in stack.linears.items():
        module = _submodule(layer, linear.path)
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


def _global_sizes(
    row: ArchitectureRow, depths: Mapping[str, int], sizes: Mapping[Space, int], base: nn.Module
) -> dict[Space, int]:
    """The sizes of what the whole model gives; nothing for two towers that give a state each."""
    last = row.stacks[-1]
    if len(row.stacks) > 1 and last.kind != "decoder":
        return {}
    written = [Space(depths[last.name] - 1, last.full(name)) for name in ("ffn.down.out", "attn.output.out")]
    hidden = next((sizes[space] for space in written if space in sizes), None)
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


def linear_shape(module: nn.Module | None) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, transformers' transposed ``Conv1D`` included; None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        weight = module.weight  # type: ignore[union-attr]
        assert isinstance(weight, Tensor)
        return weight.shape[0], weight.shape[1]
    return None


def _units(stack: Stack, model_type: str, layer: nn.Module, config: Any) -> dict[str, Tensor]:
    """For every role in a fused linear layer its places in the output, in the order of heads and units in heads.

    Raises:
        ArchitectureError: the configuration's heads do not account for the layer's outputs.
    """
    found: dict[str, Tensor] = {}
    for role, linear in stack.linears.items():
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
    # An encoder or a decoder: it matters beside models that have both.
    causal = any(getattr(module, "is_causal", False) for module in layer.modules())
    return ArchitectureRow((model_type,), (Stack(stacks[0], linears, kind="decoder" if causal else "encoder"),))
