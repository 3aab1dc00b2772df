"""The table of model families: where each keeps its layers, and which spaces its linear layers read and write.

See docs/architectures.md for how to add a row, and ``roles`` for what a row can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from peft_graft.models.families.common import BART_LAYER, adapter_points, linears, optional, post_norm, pre_norm
from peft_graft.models.families.stacked import STACKED_ROWS
from peft_graft.models.spaces import FIRST_OUT, LAST_OUT, TOKENS_OUT
from peft_graft.models.spec import (
    GATE_UP,
    QKV,
    AdapterPoint,
    ArchitectureRow,
    Experts,
    Fused,
    HeadForm,
    LinearRole,
    Stack,
    Tap,
    of_expert,
)
from peft_graft.models.tasks import Task

_TOKEN_HEAD = HeadForm(out="classifier", reads=TOKENS_OUT)
_DENSE_HEAD = HeadForm(out="classifier.out_proj", reads=FIRST_OUT, dense="classifier.dense", activation="tanh")

_BERT_STACK = Stack(
    "encoder.layer",
    linears(
        attn_query="attention.self.query",
        attn_key="attention.self.key",
        attn_value="attention.self.value",
        attn_output="attention.output.dense",
        ffn_up="intermediate.dense",
        ffn_down="output.dense",
    ),
    taps=post_norm("attention.self.query", "intermediate.dense", "output.LayerNorm"),
    adapters=adapter_points("attention.output.adapters", "output.adapters"),
)
_BERT = ArchitectureRow(
    model_types=("bert",),
    stacks=(_BERT_STACK,),
    heads={
        Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD,
        Task.SEQUENCE_CLASSIFICATION: HeadForm(
            out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="tanh", dense_in_base=True
        ),
    },
)

_BERT_LIKE: tuple[ArchitectureRow, ...] = (
    _BERT,
    replace(
        _BERT,
        model_types=("roberta", "xlm-roberta", "camembert"),
        heads={Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD, Task.SEQUENCE_CLASSIFICATION: _DENSE_HEAD},
    ),
    replace(
        _BERT,
        model_types=("electra",),
        heads={
            Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: replace(_DENSE_HEAD, activation="gelu"),
        },
    ),
    ArchitectureRow(
        model_types=("distilbert",),
        stacks=(
            Stack(
                "transformer.layer",
                linears(
                    attn_query="attention.q_lin",
                    attn_key="attention.k_lin",
                    attn_value="attention.v_lin",
                    attn_output="attention.out_lin",
                    ffn_up="ffn.lin1",
                    ffn_down="ffn.lin2",
                ),
                taps=post_norm("attention.q_lin", "ffn.lin1", "output_layer_norm"),
                adapters=adapter_points("attention_adapters.adapters", "output_adapters.adapters"),
            ),
        ),
        heads={
            Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pre_classifier", activation="relu"
            ),
        },
    ),
    ArchitectureRow(
        model_types=("mpnet",),
        stacks=(
            Stack(
                "encoder.layer",
                linears(
                    attn_query="attention.attn.q",
                    attn_key="attention.attn.k",
                    attn_value="attention.attn.v",
                    attn_output="attention.attn.o",
                    ffn_up="intermediate.dense",
                    ffn_down="output.dense",
                ),
                taps=post_norm("attention.attn.q", "intermediate.dense", "output.LayerNorm"),
            ),
        ),
        heads={Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD, Task.SEQUENCE_CLASSIFICATION: _DENSE_HEAD},
    ),
)

#: Encoders whose layers are not arranged like BERT's.
_OTHER_ENCODERS: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("modernbert",),
        stacks=(
            Stack(
                "layers",
                linears(
                    ("attn.Wqkv", Fused(QKV)), ("mlp.Wi", Fused(GATE_UP)), attn_output="attn.Wo", ffn_down="mlp.Wo"
                ),
            ),
        ),
    ),
    ArchitectureRow(
        model_types=("deberta-v2",),
        stacks=(
            Stack(
                "encoder.layer",
                linears(
                    attn_query="attention.self.query_proj",
                    attn_key="attention.self.key_proj",
                    attn_value="attention.self.value_proj",
                    attn_output="attention.output.dense",
                    ffn_up="intermediate.dense",
                    ffn_down="output.dense",
                ),
                taps=post_norm("attention.self.query_proj", "intermediate.dense", "output.LayerNorm"),
                adapters=_BERT_STACK.adapters,
            ),
        ),
        heads={
            Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="gelu"
            ),
        },
    ),
    # One layer's weights, used again and again: it is one site for each role, seen as its last use sees it.
    ArchitectureRow(
        model_types=("albert",),
        stacks=(
            Stack(
                "encoder.albert_layer_groups.0.albert_layers",
                linears(
                    attn_query="attention.query",
                    attn_key="attention.key",
                    attn_value="attention.value",
                    attn_output="attention.dense",
                    ffn_up="ffn",
                    ffn_down="ffn_output",
                ),
                taps=post_norm("attention.query", "ffn", "full_layer_layer_norm"),
                adapters=adapter_points("attention.attention_adapters.adapters", "output_adapters.adapters"),
            ),
        ),
        heads={
            Task.TOKEN_CLASSIFICATION: _TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler", activation="tanh", dense_in_base=True
            ),
        },
    ),
)

#: What Llama calls its layers, most decoders since do too.
_LLAMA_ATTENTION = {
    "attn_query": "self_attn.q_proj",
    "attn_key": "self_attn.k_proj",
    "attn_value": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
_LLAMA_FFN = {role: f"mlp.{path}" for role, path in _GATED.items()}
_LLAMA_STACK = Stack("layers", linears(**_LLAMA_ATTENTION, **_LLAMA_FFN), kind="decoder")
_LLAMA = ArchitectureRow(
    model_types=(
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
    stacks=(_LLAMA_STACK,),
    heads={
        Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
        Task.TOKEN_CLASSIFICATION: HeadForm(out="score", reads=TOKENS_OUT),
    },
)

_TO_4H = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}


def _decoder(
    *model_types: str,
    layers: str,
    linears: Mapping[str, LinearRole],
    heads: Mapping[str, HeadForm] = MappingProxyType({}),
    lm_head: str = "lm_head",
    taps: Mapping[str, Tap] = MappingProxyType({}),
    adapters: Mapping[str, AdapterPoint] = MappingProxyType({}),
) -> ArchitectureRow:
    """A row of one stack of decoder layers."""
    stack = Stack(layers, dict(linears), taps=dict(taps), adapters=dict(adapters), kind="decoder")
    return ArchitectureRow(model_types, (stack,), heads=dict(heads), lm_head=lm_head)


_LAYER_ADAPTERS = adapter_points("attention_adapters.adapters", "output_adapters.adapters")

_DECODERS: tuple[ArchitectureRow, ...] = (
    _LLAMA,
    replace(  # of this make, those that AdapterHub knows
        _LLAMA,
        model_types=("llama", "mistral"),
        stacks=(
            replace(
                _LLAMA_STACK,
                taps=pre_norm("input_layernorm", "post_attention_layernorm"),
                adapters=_LAYER_ADAPTERS,
            ),
        ),
    ),
    _decoder(
        "phi3",
        layers="layers",
        linears=linears(
            ("self_attn.qkv_proj", Fused(QKV)),
            ("mlp.gate_up_proj", Fused(GATE_UP)),
            attn_output="self_attn.o_proj",
            ffn_down="mlp.down_proj",
        ),
        heads=_LLAMA.heads,
    ),
    _decoder(
        "gpt2",
        layers="h",
        linears=linears(
            ("attn.c_attn", Fused(QKV)), attn_output="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
        ),
        taps=pre_norm("ln_1", "ln_2"),
        adapters=_LAYER_ADAPTERS,
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
            Task.TOKEN_CLASSIFICATION: HeadForm(out="classifier", reads=TOKENS_OUT),
        },
    ),
    _decoder(
        "gpt_neox",
        layers="layers",
        linears=linears(("attention.query_key_value", Fused(QKV, "grouped")), attn_output="attention.dense", **_TO_4H),
        lm_head="embed_out",
    ),
    _decoder(
        "bloom",
        "falcon",
        layers="h",
        linears=linears(
            ("self_attention.query_key_value", Fused(QKV, "grouped")), attn_output="self_attention.dense", **_TO_4H
        ),
    ),
    _decoder(
        "opt",
        layers="decoder.layers",
        linears=BART_LAYER,
        heads={Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT)},
    ),
)

#: Decoders whose feed-forward block is a mixture of experts in some or all layers.
_MIXTURES: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("mixtral",),
        stacks=(
            replace(
                _LLAMA_STACK,
                # In transformers 5 experts are one tensor and the router is no linear layer: nothing attaches there.
                linears={**linears(**_LLAMA_ATTENTION), **optional(linears(ffn_router="block_sparse_moe.gate"))},
                experts=Experts(
                    "block_sparse_moe",
                    "block_sparse_moe.experts",
                    linears(ffn_gate="w1", ffn_up="w3", ffn_down="w2"),
                ),
            ),
        ),
        heads=_LLAMA.heads,
    ),
    ArchitectureRow(
        model_types=("qwen2_moe", "qwen3_moe", "olmoe"),
        stacks=(
            replace(
                _LLAMA_STACK,
                linears={
                    **linears(**_LLAMA_ATTENTION),
                    **optional(linears(ffn_router="mlp.gate", **_LLAMA_FFN)),
                    **optional(of_expert("shared", linears(**_GATED), "mlp.shared_expert")),
                    **optional(of_expert("shared", linears(ffn_router="mlp.shared_expert_gate"))),
                },
                experts=Experts("mlp", "mlp.experts", linears(**_GATED)),
            ),
        ),
        heads=_LLAMA.heads,
    ),
)


ROWS = (*_BERT_LIKE, *_OTHER_ENCODERS, *_DECODERS, *_MIXTURES, *STACKED_ROWS)
#: Several for families whose modules have other names in other versions of transformers.
ROWS_OF_TYPE = {
    model_type: [row for row in ROWS if model_type in row.model_types] for row in ROWS for model_type in row.model_types
}
