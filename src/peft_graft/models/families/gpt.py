"""The decoders before Llama: GPT-2, GPT-NeoX, OPT, Bloom, Falcon."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.families.bart import BART_LAYER
from peft_graft.models.rows import LAYER_ADAPTERS, decoder_row, linears, pre_norm
from peft_graft.models.spaces import LAST_OUT, TOKENS_OUT
from peft_graft.models.spec import QKV, Fused, HeadForm
from peft_graft.models.tasks import Task

_TO_4H = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}

register_architecture(
    decoder_row(
        "gpt2",
        layers="h",
        linears=linears(
            ("attn.c_attn", Fused(QKV)), attn_output="attn.c_proj", ffn_up="mlp.c_fc", ffn_down="mlp.c_proj"
        ),
        taps=pre_norm("ln_1", "ln_2"),
        adapters=LAYER_ADAPTERS,
        heads={
            Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
            Task.TOKEN_CLASSIFICATION: HeadForm(out="classifier", reads=TOKENS_OUT),
        },
    ),
    decoder_row(
        "gpt_neox",
        layers="layers",
        linears=linears(("attention.query_key_value", Fused(QKV, "grouped")), attn_output="attention.dense", **_TO_4H),
        lm_head="embed_out",
    ),
    decoder_row(
        "bloom",
        "falcon",
        layers="h",
        linears=linears(
            ("self_attention.query_key_value", Fused(QKV, "grouped")), attn_output="self_attention.dense", **_TO_4H
        ),
    ),
    decoder_row(
        "opt",
        layers="decoder.layers",
        linears=BART_LAYER,
        heads={Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT)},
    ),
)
