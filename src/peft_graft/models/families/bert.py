"""BERT, and the encoders built like it: RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, MPNet, ALBERT."""

from __future__ import annotations

from dataclasses import replace

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import LAYER_ADAPTERS, adapter_points, linears, post_norm, row
from peft_graft.models.spaces import FIRST_OUT, TOKENS_OUT
from peft_graft.models.spec import HeadForm
from peft_graft.models.tasks import Task

_DENSE = HeadForm(out="classifier.out_proj", reads=FIRST_OUT, dense="classifier.dense", activation="tanh")
_POOLED = HeadForm(out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="tanh", dense_in_base=True)
#: Where the library adapters has its bottleneck adapters in a BERT.
BERT_ADAPTERS = adapter_points("attention.output.adapters", "output.adapters")


def encoder_heads(of_texts: HeadForm) -> dict[Task, HeadForm]:
    """The head of words, which is alike in all of them, and that of whole texts."""
    return {
        Task.TOKEN_CLASSIFICATION: HeadForm(out="classifier", reads=TOKENS_OUT),
        Task.SEQUENCE_CLASSIFICATION: of_texts,
    }


_BERT = row(
    "bert",
    layers="encoder.layer",
    linears=linears(
        attn_query="attention.self.query",
        attn_key="attention.self.key",
        attn_value="attention.self.value",
        attn_output="attention.output.dense",
        ffn_up="intermediate.dense",
        ffn_down="output.dense",
    ),
    taps=post_norm("attention.self.query", "intermediate.dense", "output.LayerNorm"),
    adapters=BERT_ADAPTERS,
    heads=encoder_heads(_POOLED),
)

register_architecture(
    _BERT,
    replace(_BERT, model_types=("roberta", "xlm-roberta", "camembert"), heads=encoder_heads(_DENSE)),
    replace(_BERT, model_types=("electra",), heads=encoder_heads(replace(_DENSE, activation="gelu"))),
    row(
        "distilbert",
        layers="transformer.layer",
        linears=linears(
            attn_query="attention.q_lin",
            attn_key="attention.k_lin",
            attn_value="attention.v_lin",
            attn_output="attention.out_lin",
            ffn_up="ffn.lin1",
            ffn_down="ffn.lin2",
        ),
        taps=post_norm("attention.q_lin", "ffn.lin1", "output_layer_norm"),
        adapters=LAYER_ADAPTERS,
        heads=encoder_heads(HeadForm(out="classifier", reads=FIRST_OUT, dense="pre_classifier", activation="relu")),
    ),
    row(
        "mpnet",
        layers="encoder.layer",
        linears=linears(
            attn_query="attention.attn.q",
            attn_key="attention.attn.k",
            attn_value="attention.attn.v",
            attn_output="attention.attn.o",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
        ),
        taps=post_norm("attention.attn.q", "intermediate.dense", "output.LayerNorm"),
        heads=encoder_heads(_DENSE),
    ),
    # One layer's weights, used several times: one site for each role, seen as its last use sees it.
    row(
        "albert",
        layers="encoder.albert_layer_groups.0.albert_layers",
        linears=linears(
            attn_query="attention.query",
            attn_key="attention.key",
            attn_value="attention.value",
            attn_output="attention.dense",
            ffn_up="ffn",
            ffn_down="ffn_output",
        ),
        taps=post_norm("attention.query", "ffn", "full_layer_layer_norm"),
        adapters=adapter_points("attention.attention_adapters.adapters", "output_adapters.adapters"),
        heads=encoder_heads(replace(_POOLED, dense="pooler")),
    ),
)
