"""The table of model families: where each keeps its layers, and which spaces its linear layers read and write.

See docs/architectures.md for how to add a row.

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

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from peft_graft.modules import FIRST_OUT, LAST_OUT, TOKENS_OUT

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


SPACES_OF_ROLE = {
    "attn.query": ("attn.in", "attn.query.out"),
    "attn.key": ("attn.in", "attn.key.out"),
    "attn.value": ("attn.in", "attn.value.out"),
    "attn.output": ("attn.context", "attn.output.out"),
    "ffn.up": ("ffn.in", "ffn.up.out"),
    "ffn.gate": ("ffn.in", "ffn.gate.out"),
    "ffn.down": ("ffn.mid", "ffn.down.out"),
}
LINEAR_ROLES = tuple(SPACES_OF_ROLE)


QKV = ("attn.query", "attn.key", "attn.value")
GATE_UP = ("ffn.gate", "ffn.up")


def _linears(*fused: tuple[str, Fused], **paths: str) -> dict[str, LinearRole]:
    """The linear layers of a row: role -> path, and (path, ``Fused``) for those that hold several roles."""
    roles = {name.replace("_", ".", 1): LinearRole(path, *SPACES_OF_ROLE[name.replace("_", ".", 1)])
             for name, path in paths.items()}  # fmt: skip
    roles |= {role: LinearRole(path, *SPACES_OF_ROLE[role], how) for path, how in fused for role in how.roles}
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

_BERT_LIKE: tuple[ArchitectureRow, ...] = (
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
_OTHER_ENCODERS: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("modernbert",),
        layers="layers",
        linears=_linears(
            ("attn.Wqkv", Fused(QKV)), ("mlp.Wi", Fused(GATE_UP)), attn_output="attn.Wo", ffn_down="mlp.Wo"
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

_DECODERS: tuple[ArchitectureRow, ...] = (
    _LLAMA,
    ArchitectureRow(
        model_types=("phi3",),
        layers="layers",
        linears=_linears(
            ("self_attn.qkv_proj", Fused(QKV)),
            ("mlp.gate_up_proj", Fused(GATE_UP)),
            attn_output="self_attn.o_proj",
            ffn_down="mlp.down_proj",
        ),
        heads=_LLAMA.heads,
    ),
    ArchitectureRow(
        model_types=("gpt2",),
        layers="h",
        linears=_linears(
            ("attn.c_attn", Fused(QKV)), attn_output="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
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
            ("attention.query_key_value", Fused(QKV, "grouped")),
            attn_output="attention.dense",
            ffn_up="mlp.dense_h_to_4h",
            ffn_down="mlp.dense_4h_to_h",
        ),
    ),
    ArchitectureRow(
        model_types=("bloom", "falcon"),
        layers="h",
        linears=_linears(
            ("self_attention.query_key_value", Fused(QKV, "grouped")),
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

ROWS = (*_BERT_LIKE, *_OTHER_ENCODERS, *_DECODERS)
ROW_OF_TYPE = {model_type: row for row in ROWS for model_type in row.model_types}
