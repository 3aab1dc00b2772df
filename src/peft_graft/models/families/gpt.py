"""The decoders before Llama, and those that took over their names: GPT-2, GPT-Neo, GPT-NeoX, OPT, BLOOM, Falcon, ..."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.families.bart import BART_LAYER
from peft_graft.models.families.llama import LLAMA_ATTENTION, LLAMA_HEADS
from peft_graft.models.rows import LAYER_ADAPTERS, decoder_row, linears, pre_norm
from peft_graft.models.spaces import LAST_OUT, TOKENS_OUT
from peft_graft.models.spec import QKV, Fused, HeadForm
from peft_graft.models.tasks import Task

_TO_4H = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
_C_FFN = {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
_LAST_TOKEN_HEADS = {
    Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
    Task.TOKEN_CLASSIFICATION: HeadForm(out="classifier", reads=TOKENS_OUT),
}

register_architecture(
    decoder_row(
        "gpt2",
        layers="h",
        linears=linears(("attn.c_attn", Fused(QKV)), attn_output="attn.c_proj", **_C_FFN),
        taps=pre_norm("ln_1", "ln_2"),
        adapters=LAYER_ADAPTERS,
        heads=_LAST_TOKEN_HEADS,
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
    decoder_row(
        "gpt_neo",
        layers="h",
        linears=linears(
            attn_query="attn.attention.q_proj",
            attn_key="attn.attention.k_proj",
            attn_value="attn.attention.v_proj",
            attn_output="attn.attention.out_proj",
            **_C_FFN,
        ),
        heads=_LAST_TOKEN_HEADS,
    ),
    decoder_row(
        "gpt_bigcode",  # one key-value head beside all query heads, or as many as those, in groups
        layers="h",
        linears=linears(("attn.c_attn", Fused(QKV, "grouped")), attn_output="attn.c_proj", **_C_FFN),
        heads=_LAST_TOKEN_HEADS,
    ),
    decoder_row("starcoder2", layers="layers", linears=linears(**LLAMA_ATTENTION, **_C_FFN), heads=LLAMA_HEADS),
    decoder_row(
        "mpt",
        layers="blocks",
        linears=linears(
            ("attn.Wqkv", Fused(QKV)), attn_output="attn.out_proj", ffn_up="ffn.up_proj", ffn_down="ffn.down_proj"
        ),
        heads=_LAST_TOKEN_HEADS,
    ),
    decoder_row(
        "persimmon",
        layers="layers",
        linears=linears(("self_attn.query_key_value", Fused(QKV, "grouped")), attn_output="self_attn.dense", **_TO_4H),
        heads=LLAMA_HEADS,
    ),
)
