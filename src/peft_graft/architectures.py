"""Where a transformer keeps its layers, and which spaces its linear layers read and write.

A known architecture is a row of data (``ROWS``); an unknown one is inferred from its module tree, or refused
with the reason and with what a row would have to say. See docs/architectures.md for how to add a row.

Spaces of a layer, in the order in which a layer computes them:

    attn.in          what query, key and value read (the residual stream)
    attn.query.out   attn.key.out   attn.value.out
    attn.context     attention-weighted values, read by the attention's output projection
    attn.output.out  what that projection writes, before residual and norm
    ffn.in           what the feed-forward block reads
    ffn.up.out       (ffn.gate.out)   before the activation function
    ffn.mid          what the feed-forward block's second projection reads
    ffn.down.out     what that projection writes, before residual and norm
    layer.out        the layer's output
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peft_graft.errors import ArchitectureError
from peft_graft.modules import FIRST_OUT, GLOBAL_SPACES, LAST_OUT, POOLED_OUT, TOKENS_OUT, Site, Space

TOKEN_CLASSIFICATION = "token-classification"
SEQUENCE_CLASSIFICATION = "sequence-classification"


@dataclass(frozen=True)
class Fused:
    """Several projections in one linear layer: which roles, and how their rows lie in its output.

    ``stacked``: one after another. ``grouped``: for every key-value head its query heads, its key, its value.
    """

    roles: tuple[str, ...]
    layout: Literal["stacked", "grouped"] = "stacked"


@dataclass(frozen=True)
class LinearRole:
    """A linear layer, or its part in a fused one: its path inside the layer, the spaces that it reads and writes."""

    path: str
    reads: str
    writes: str
    fused: Fused | None = None


@dataclass(frozen=True)
class Tap:
    """Where a space can be observed: the input or the output of a module, by its path inside the layer.

    ``units``: the places in it that belong to the space, int64; all of them when None.
    """

    path: str
    side: Literal["input", "output"]
    units: Tensor | None = None


@dataclass(frozen=True)
class AdapterPoint:
    """Where AdapterHub puts a bottleneck adapter, and what it sees in each of its three arrangements."""

    path: str
    before_norm: str  # the block's output, before residual and norm (Houlsby)
    after_norm: str  # the same after residual and norm (Pfeiffer)
    parallel: str  # the block's input (He et al. 2022)


@dataclass(frozen=True)
class HeadForm:
    """How a task class arranges its head: module paths seen from the task model, activation, what it reads.

    ``dense_in_base``: the inner layer is part of the base model (BERT's pooler), seen from the base model.
    """

    out: str
    reads: str
    dense: str | None = None
    activation: str | None = None
    dense_in_base: bool = False


@dataclass(frozen=True)
class ArchitectureRow:
    """One row of the table: everything that peft-graft knows about a family of models."""

    model_types: tuple[str, ...]
    layers: str
    linears: Mapping[str, LinearRole]
    taps: Mapping[str, Tap] = field(default_factory=dict)
    adapters: Mapping[str, AdapterPoint] = field(default_factory=dict)
    heads: Mapping[str, HeadForm] = field(default_factory=dict)


_SPACES_OF_ROLE = {
    "attn.query": ("attn.in", "attn.query.out"),
    "attn.key": ("attn.in", "attn.key.out"),
    "attn.value": ("attn.in", "attn.value.out"),
    "attn.output": ("attn.context", "attn.output.out"),
    "ffn.up": ("ffn.in", "ffn.up.out"),
    "ffn.gate": ("ffn.in", "ffn.gate.out"),
    "ffn.down": ("ffn.mid", "ffn.down.out"),
}
LINEAR_ROLES = tuple(_SPACES_OF_ROLE)


_QKV = ("attn.query", "attn.key", "attn.value")
_GATE_UP = ("ffn.gate", "ffn.up")


def _linears(*fused: tuple[str, Fused], **paths: str) -> dict[str, LinearRole]:
    """The linear layers of a row: role -> path, and (path, ``Fused``) for those that hold several roles."""
    roles = {name.replace("_", ".", 1): LinearRole(path, *_SPACES_OF_ROLE[name.replace("_", ".", 1)])
             for name, path in paths.items()}  # fmt: skip
    roles |= {role: LinearRole(path, *_SPACES_OF_ROLE[role], how) for path, how in fused for role in how.roles}
    return {role: roles[role] for role in LINEAR_ROLES if role in roles}


def _adapters(attention: str, output: str) -> dict[str, AdapterPoint]:
    return {
        "attn.adapter": AdapterPoint(attention, "attn.output.out", "ffn.in", "attn.in"),
        "ffn.adapter": AdapterPoint(output, "ffn.down.out", "layer.out", "ffn.in"),
    }


_TOKEN_HEAD = HeadForm(out="classifier", reads=TOKENS_OUT)
_DENSE_HEAD = HeadForm(out="classifier.out_proj", reads=FIRST_OUT, dense="classifier.dense", activation="tanh")

_BERT = ArchitectureRow(
    model_types=("bert",),
    layers="encoder.layer",
    linears=_linears(
        attn_query="attention.self.query",
        attn_key="attention.self.key",
        attn_value="attention.self.value",
        attn_output="attention.output.dense",
        ffn_up="intermediate.dense",
        ffn_down="output.dense",
    ),
    taps={"layer.out": Tap("output.LayerNorm", "output")},
    adapters=_adapters("attention.output.adapters", "output.adapters"),
    heads={
        TOKEN_CLASSIFICATION: _TOKEN_HEAD,
        SEQUENCE_CLASSIFICATION: HeadForm(
            out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="tanh", dense_in_base=True
        ),
    },
)

ROWS: tuple[ArchitectureRow, ...] = (
    _BERT,
    replace(
        _BERT,
        model_types=("roberta", "xlm-roberta", "camembert"),
        heads={TOKEN_CLASSIFICATION: _TOKEN_HEAD, SEQUENCE_CLASSIFICATION: _DENSE_HEAD},
    ),
    replace(
        _BERT,
        model_types=("electra",),
        heads={
            TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            SEQUENCE_CLASSIFICATION: replace(_DENSE_HEAD, activation="gelu"),
        },
    ),
    ArchitectureRow(
        model_types=("distilbert",),
        layers="transformer.layer",
        linears=_linears(
            attn_query="attention.q_lin",
            attn_key="attention.k_lin",
            attn_value="attention.v_lin",
            attn_output="attention.out_lin",
            ffn_up="ffn.lin1",
            ffn_down="ffn.lin2",
        ),
        taps={"layer.out": Tap("output_layer_norm", "output")},
        adapters=_adapters("attention_adapters.adapters", "output_adapters.adapters"),
        heads={
            TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pre_classifier", activation="relu"
            ),
        },
    ),
    ArchitectureRow(
        model_types=("mpnet",),
        layers="encoder.layer",
        linears=_linears(
            attn_query="attention.attn.q",
            attn_key="attention.attn.k",
            attn_value="attention.attn.v",
            attn_output="attention.attn.o",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
        ),
        taps=_BERT.taps,
        heads={TOKEN_CLASSIFICATION: _TOKEN_HEAD, SEQUENCE_CLASSIFICATION: _DENSE_HEAD},
    ),
)

#: Encoders whose layers are not arranged like BERT's.
ENCODER_ROWS: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("modernbert",),
        layers="layers",
        linears=_linears(
            ("attn.Wqkv", Fused(_QKV)), ("mlp.Wi", Fused(_GATE_UP)), attn_output="attn.Wo", ffn_down="mlp.Wo"
        ),
    ),
    ArchitectureRow(
        model_types=("deberta-v2",),
        layers="encoder.layer",
        linears=_linears(
            attn_query="attention.self.query_proj",
            attn_key="attention.self.key_proj",
            attn_value="attention.self.value_proj",
            attn_output="attention.output.dense",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
        ),
        taps={"layer.out": Tap("output.LayerNorm", "output")},
        heads={
            TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="gelu"
            ),
        },
    ),
    # One layer's weights, used again and again: it is one site for each role, seen as its last use sees it.
    ArchitectureRow(
        model_types=("albert",),
        layers="encoder.albert_layer_groups.0.albert_layers",
        linears=_linears(
            attn_query="attention.query",
            attn_key="attention.key",
            attn_value="attention.value",
            attn_output="attention.dense",
            ffn_up="ffn",
            ffn_down="ffn_output",
        ),
        taps={"layer.out": Tap("full_layer_layer_norm", "output")},
        heads={
            TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler", activation="tanh", dense_in_base=True
            ),
        },
    ),
)

#: What Llama calls its layers, most decoders since do too.
_LLAMA = ArchitectureRow(
    model_types=(
        "llama",
        "mistral",
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "stablelm",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
        "cohere",
        "cohere2",
    ),
    layers="layers",
    linears=_linears(
        attn_query="self_attn.q_proj",
        attn_key="self_attn.k_proj",
        attn_value="self_attn.v_proj",
        attn_output="self_attn.o_proj",
        ffn_gate="mlp.gate_proj",
        ffn_up="mlp.up_proj",
        ffn_down="mlp.down_proj",
    ),
    heads={
        SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
        TOKEN_CLASSIFICATION: HeadForm(out="score", reads=TOKENS_OUT),
    },
)

DECODER_ROWS: tuple[ArchitectureRow, ...] = (
    _LLAMA,
    ArchitectureRow(
        model_types=("phi3",),
        layers="layers",
        linears=_linears(
            ("self_attn.qkv_proj", Fused(_QKV)),
            ("mlp.gate_up_proj", Fused(_GATE_UP)),
            attn_output="self_attn.o_proj",
            ffn_down="mlp.down_proj",
        ),
        heads=_LLAMA.heads,
    ),
    ArchitectureRow(
        model_types=("gpt2",),
        layers="h",
        linears=_linears(
            ("attn.c_attn", Fused(_QKV)), attn_output="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
        ),
        heads={
            SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
            TOKEN_CLASSIFICATION: HeadForm(out="classifier", reads=TOKENS_OUT),
        },
    ),
    ArchitectureRow(
        model_types=("gpt_neox",),
        layers="layers",
        linears=_linears(
            ("attention.query_key_value", Fused(_QKV, "grouped")),
            attn_output="attention.dense",
            ffn_up="mlp.dense_h_to_4h",
            ffn_down="mlp.dense_4h_to_h",
        ),
    ),
    ArchitectureRow(
        model_types=("bloom", "falcon"),
        layers="h",
        linears=_linears(
            ("self_attention.query_key_value", Fused(_QKV, "grouped")),
            attn_output="self_attention.dense",
            ffn_up="mlp.dense_h_to_4h",
            ffn_down="mlp.dense_4h_to_h",
        ),
    ),
    ArchitectureRow(
        model_types=("opt",),
        layers="decoder.layers",
        linears=_linears(
            attn_query="self_attn.q_proj",
            attn_key="self_attn.k_proj",
            attn_value="self_attn.v_proj",
            attn_output="self_attn.out_proj",
            ffn_up="fc1",
            ffn_down="fc2",
        ),
        heads={SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT)},
    ),
)

_ROW_OF_TYPE = {model_type: row for row in (*ROWS, *ENCODER_ROWS, *DECODER_ROWS) for model_type in row.model_types}


@dataclass(frozen=True)
class Architecture:
    """A row made concrete for one model: number of layers and the size of every space.

    Attributes:
        prefix: the attribute under which a task model keeps this base model (``bert``).
        units: for roles that share a fused linear layer, their places in its output, int64.
    """

    model_type: str
    row: ArchitectureRow
    prefix: str
    num_layers: int
    sizes: Mapping[Space, int]
    inferred: bool = False
    units: Mapping[str, Tensor] = field(default_factory=dict)

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
        """The module path of a linear site, or of a bottleneck adapter's container, seen from the base model.

        Raises:
            ArchitectureError: the architecture has no such role.
        """
        place = self.row.linears.get(site.role) or self.row.adapters.get(site.role)
        if place is None:
            raise ArchitectureError(
                f"{self.model_type} has no role {site.role!r}",
                where=str(site),
                fix=f"roles of this architecture: {', '.join([*self.row.linears, *self.row.adapters])}",
            )
        return f"{self.row.layers}.{site.layer}.{place.path}"

    def _places(self) -> list[tuple[str, str]]:
        linears = [(role, linear.path) for role, linear in self.row.linears.items()]
        return linears + [(role, point.path) for role, point in self.row.adapters.items()]

    def sites(self, path: str) -> tuple[list[Site], str] | None:
        """The sites of a module path, several for a fused layer, and what stands before the layers in it, or None.

        What stands before is ``bert.`` in a task model, nothing in a bare one.
        """
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
    row = _ROW_OF_TYPE.get(model_type)
    inferred = row is None
    if row is None:
        row = infer_row(base, model_type)
    layers = _submodule(base, row.layers)
    if not isinstance(layers, nn.ModuleList):
        raise ArchitectureError(
            "the model has no list of layers where its architecture's row says",
            where=f"{model_type} {row.layers}",
            fix="load the base model with AutoModel, or correct the row in peft_graft/architectures.py",
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
    return Architecture(model_type, row, prefix, len(layers), sizes, inferred, units)


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
        if linear.fused.roles == _GATE_UP:
            halves = torch.arange(shape[1]).chunk(2)
            found.update(zip(linear.fused.roles, halves, strict=True))
            continue
        queries, pairs, width = _heads(config)
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


def _heads(config: Any) -> tuple[int, int, int]:
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
            fix="add a row with its layers and role paths to ROWS in peft_graft/architectures.py "
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
            linears[roles[0]] = LinearRole(path, *_SPACES_OF_ROLE[roles[0]])
    if not {"attn.query", "attn.value"} <= linears.keys():
        raise refuse(f"no query and value projections in {stacks[0]}.0; found roles: {', '.join(linears) or 'none'}")
    return ArchitectureRow((model_type,), stacks[0], linears)
