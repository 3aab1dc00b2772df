"""What peft-graft knows of one model: its layers, the roles at which modules attach, the sizes of its spaces.

A model is described by the row of its family (``families``), or inferred from its module tree (``inference``), or
refused with the reason and what a row would have to say (docs/extending.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from peft_graft.errors import ArchitectureError
from peft_graft.models.families import rows_of
from peft_graft.models.inference import infer_row
from peft_graft.models.norms import global_norm_paths, norm_paths
from peft_graft.models.sizes import fused_units, global_sizes, layer_sizes, submodule
from peft_graft.models.spaces import EMBEDDED, VOCABULARY, Site, Space
from peft_graft.models.spec import (
    EMBED_ROLE,
    INVERTIBLE_ROLE,
    LM_HEAD_ROLE,
    PREFIX_ROLE,
    ArchitectureRow,
    LinearRole,
    Stack,
    Tap,
    expert_of,
    of_expert,
)
from peft_graft.models.tasks import Task
from peft_graft.models.towers import other_towers, text_tower, tower_of, without_tower


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
        tower: the part that reads text, of a model that reads more (``language_model``); its layers are the model's.
        beside: names of the other parts of such a model.
        modules: paths of all modules of the base model, those without a role too.
        num_embeddings: number of tokens that it has embeddings of, None where that is not known, or it reads none.
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
    tower: str = ""
    beside: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    num_embeddings: int | None = None

    @property
    def num_layers(self) -> int:
        """Number of layers of all stacks."""
        return sum(self.depths.values())

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream, of the last stack where there are several."""
        read = self.row.stacks[-1].full("attn.in")  # by every layer but those that mix tokens in another way
        return next(size for space, size in self.sizes.items() if space.name == read)

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
        prefix = task.prefix_in(self.model_type) or self.prefix
        return "" if task in self.row.flat_tasks or not self.prefix else f"{prefix}."

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

        What stands before is ``bert.`` in a task model, nothing in a bare one. A path in a text tower is found in a
        text model too, and the reverse, whatever the version of transformers that named it.
        """
        for name, before in self._names(path):
            found = self._sites(name)
            if found is None:
                continue
            prefix = found[1] if before is None else before
            return None if self.other_tower(prefix) or self.other_tower(found[1]) else (found[0], prefix)
        return None

    def _names(self, path: str) -> list[tuple[str, str | None]]:
        """What a path may be called in this model, and what stands before the base model in it; at last as it is."""
        inside = without_tower(path)
        if inside is None and self.tower:
            local = path.removeprefix(f"{self.prefix}.")
            inside = local, path.removesuffix(local)
        if inside is None:
            return [(path, None)]
        local, before = inside
        return [(local, before), *([(f"{self.tower}.{local}", before)] if self.tower else []), (path, None)]

    def other_tower(self, path: str) -> str | None:
        """The tower of a path that leads into what reads images or sound, where this model's layers read text."""
        return tower_of(path, self.beside) if self.row.reads_text else None

    def _sites(self, path: str) -> tuple[list[Site], str] | None:
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

    def has_module(self, path: str) -> bool:
        """Whether the base model has a module at a path, with or without a role; a task model's paths are known too."""
        names = {name.removeprefix(f"{self.prefix}.") for name, _ in self._names(path)}
        return not self.modules.isdisjoint({path, *names, self.in_layers(path)})

    def in_layers(self, path: str) -> str | None:
        """The path in the base model of what lies in a layer of its stacks; None for what lies outside."""
        for name, _ in self._names(path):
            for stack in self.row.stacks:
                if match := re.fullmatch(rf"(?:.*\.)?({re.escape(stack.layers)}\.\d+\..+)", name):
                    return match[1]
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
    rows = rows_of(model_type)
    tower = "" if rows else text_tower(base)
    if tower:
        return _in_tower(base, tower, model_type, prefix)
    row = next((row for row in rows if _fits(row, base)), rows[0]) if rows else infer_row(base, model_type)
    layers = [_layers(stack, base, model_type) for stack in row.stacks]
    row = replace(row, stacks=tuple(map(_concrete, row.stacks, layers)))
    depths = {stack.name: len(own) for stack, own in zip(row.stacks, layers, strict=True)}
    sizes: dict[Space, int] = {}
    units: dict[str, Tensor] = {}
    absent: set[Site] = set()
    for stack, own in zip(row.stacks, layers, strict=True):
        fused = fused_units(stack, model_type, own[0], getattr(base, "config", None))
        units.update({stack.full(role): places for role, places in fused.items()})
        for index, layer in enumerate(own):
            found, missing = layer_sizes(stack, model_type, index, layer, fused)
            sizes.update(found)
            absent |= missing
    sizes.update(global_sizes(row, depths, sizes, base))
    words, alone = _input_embeddings(base), len(row.stacks) == 1
    if words is not None and row.reads_text:  # the stacks of an encoder-decoder share them
        sizes[Space(-1, EMBEDDED)] = words.embedding_dim
    if words is not None and alone:
        sizes[Space(-1, VOCABULARY)] = words.num_embeddings
    return Architecture(
        model_type=model_type,
        row=row,
        prefix=prefix,
        depths=depths,
        sizes=sizes,
        inferred=not rows,
        units=units,
        absent=frozenset(absent),
        norms=global_norm_paths(base) if alone else {},
        transposed=any(type(module).__name__ == "Conv1D" for module in base.modules()),
        vocabulary=_vocabulary(row, base, words) if words is not None and alone else {},
        embed_scale=_embed_scale(words) if words is not None and alone else 1.0,
        modules=frozenset(path for path, _ in base.named_modules()),
        num_embeddings=words.num_embeddings if words is not None and row.reads_text else None,
    )


def _in_tower(base: nn.Module, tower: str, model_type: str, prefix: str) -> Architecture:
    """A model that reads more than text, described as its text tower, where that is in the model."""
    inner = base.get_submodule(tower)
    found = describe(inner, inner.config.model_type, prefix)  # type: ignore[union-attr, arg-type]
    # The library adapters has no models of this kind.
    stacks = tuple(replace(stack, layers=f"{tower}.{stack.layers}", adapters={}) for stack in found.row.stacks)
    paths = {role: path if role == LM_HEAD_ROLE else f"{tower}.{path}" for role, path in found.vocabulary.items()}
    return replace(
        found,
        model_type=model_type,
        row=replace(found.row, stacks=stacks),
        norms={role: f"{tower}.{path}" for role, path in found.norms.items()},
        vocabulary=paths,
        modules=frozenset(path for path, _ in base.named_modules()),
        tower=tower,
        beside=other_towers(base, tower),
    )


def _layers(stack: Stack, base: nn.Module, model_type: str) -> nn.ModuleList:
    layers = submodule(base, stack.layers)
    if isinstance(layers, nn.ModuleList):
        return layers
    raise ArchitectureError(
        "the model has no list of layers where its architecture's row says",
        where=f"{model_type} {stack.layers}",
        fix="load the base model with AutoModel, or correct the row in peft_graft/models/families",
    )


def _vocabulary(row: ArchitectureRow, base: nn.Module, words: nn.Embedding) -> dict[str, str]:
    """Role -> path of the word embeddings, and of a decoder's output layer."""
    paths = {EMBED_ROLE: next(path for path, module in base.named_modules() if module is words)}
    return paths | ({LM_HEAD_ROLE: row.lm_head} if row.stacks[0].kind == "decoder" else {})


def _embed_scale(words: nn.Embedding) -> float:
    factor = getattr(words, "embed_scale", 1.0)  # Gemma 3 multiplies inside its class
    return 1.0 if isinstance(factor, Tensor) and factor.is_meta else float(factor)


def _fits(row: ArchitectureRow, base: nn.Module) -> bool:
    """Whether the model has its layers where the row says."""
    return all(isinstance(submodule(base, stack.layers), nn.ModuleList) for stack in row.stacks)


def _input_embeddings(base: nn.Module) -> nn.Embedding | None:
    try:
        found = base.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def _concrete(stack: Stack, layers: nn.ModuleList) -> Stack:
    """The stack with the paths that this model has, and a role for every expert's part."""
    linears: dict[str, LinearRole] = {}

    def present(path: str) -> bool:
        return any(submodule(layer, path) is not None for layer in layers)

    for role, linear in stack.linears.items():
        if linear.elsewhere and not present(linear.path):
            linear = replace(linear, path=linear.elsewhere, elsewhere=None)
        if not linear.optional or present(linear.path):
            linears[role] = linear
    if stack.experts:
        lists = [submodule(layer, stack.experts.path) for layer in layers]
        numbers = max((len(experts) for experts in lists if isinstance(experts, nn.ModuleList)), default=0)
        for number in range(numbers):
            inside = of_expert(f"expert.{number}", stack.experts.linears, f"{stack.experts.path}.{number}")
            linears |= {role: replace(linear, optional=True) for role, linear in inside.items()}
    # One name means different norms in the encoder of BART and in OPT: where there are several stacks, rows say it.
    norms = stack.norms if stack.name else norm_paths(layers[0])
    return replace(stack, linears=linears, norms=norms)
