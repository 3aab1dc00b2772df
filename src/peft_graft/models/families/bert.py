"""BERT, and the encoders built like it: RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, MPNet, ALBERT."""

from __future__ import annotations

from dataclasses import replace

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import LAYER_ADAPTERS, adapter_points, linears, post_norm
from peft_graft.models.spaces import FIRST_OUT, TOKENS_OUT
from peft_graft.models.spec import ArchitectureRow, HeadForm, Stack
from peft_graft.models.tasks import Task

TOKEN_HEAD = HeadForm(out="classifier", reads=TOKENS_OUT)
DENSE_HEAD = HeadForm(out="classifier.out_proj", reads=FIRST_OUT, dense="classifier.dense", activation="tanh")

BERT_STACK = Stack(
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
    stacks=(BERT_STACK,),
    heads={
        Task.TOKEN_CLASSIFICATION: TOKEN_HEAD,
        Task.SEQUENCE_CLASSIFICATION: HeadForm(
            out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="tanh", dense_in_base=True
        ),
    },
)

register_architecture(
    _BERT,
    replace(
        _BERT,
        model_types=("roberta", "xlm-roberta", "camembert"),
        heads={Task.TOKEN_CLASSIFICATION: TOKEN_HEAD, Task.SEQUENCE_CLASSIFICATION: DENSE_HEAD},
    ),
    replace(
        _BERT,
        model_types=("electra",),
        heads={
            Task.TOKEN_CLASSIFICATION: TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: replace(DENSE_HEAD, activation="gelu"),
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
                adapters=LAYER_ADAPTERS,
            ),
        ),
        heads={
            Task.TOKEN_CLASSIFICATION: TOKEN_HEAD,
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
        heads={Task.TOKEN_CLASSIFICATION: TOKEN_HEAD, Task.SEQUENCE_CLASSIFICATION: DENSE_HEAD},
    ),
    # One layer's weights, used several times: one site for each role, seen as its last use sees it.
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
            Task.TOKEN_CLASSIFICATION: TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler", activation="tanh", dense_in_base=True
            ),
        },
    ),
)
