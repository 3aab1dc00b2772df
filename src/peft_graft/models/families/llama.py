"""Llama, Mistral, and the many decoders whose layers have the same names: Qwen, Gemma, OLMo, Cohere, Phi-3, GLM, ..."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import LAYER_ADAPTERS, decoder_row, linears, optional, pre_norm
from peft_graft.models.spaces import LAST_OUT, TOKENS_OUT
from peft_graft.models.spec import GATE_UP, QKV, Fused, HeadForm
from peft_graft.models.tasks import Task

#: Names inside Llama's layers, and those of most decoders since.
LLAMA_ATTENTION = {
    "attn_query": "self_attn.q_proj",
    "attn_key": "self_attn.k_proj",
    "attn_value": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
GATED_FFN = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
LLAMA_FFN = {role: f"mlp.{path}" for role, path in GATED_FFN.items()}
LLAMA_HEADS = {
    Task.SEQUENCE_CLASSIFICATION: HeadForm(out="score", reads=LAST_OUT),
    Task.TOKEN_CLASSIFICATION: HeadForm(out="score", reads=TOKENS_OUT),
}

register_architecture(
    decoder_row(
        "ministral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "qwen2_vl_text",
        "qwen2_5_vl_text",
        "qwen3_vl_text",
        "stablelm",
        "olmo",
        "olmo2",
        "granite",
        "smollm3",
        "cohere",
        "cohere2",
        layers="layers",
        linears=linears(**LLAMA_ATTENTION, **LLAMA_FFN),
        heads=LLAMA_HEADS,
    ),
    decoder_row(  # those that AdapterHub supports
        "llama",
        "mistral",
        layers="layers",
        linears=linears(**LLAMA_ATTENTION, **LLAMA_FFN),
        taps=pre_norm("input_layernorm", "post_attention_layernorm"),
        adapters=LAYER_ADAPTERS,
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "phi3",
        layers="layers",
        linears=linears(
            ("self_attn.qkv_proj", Fused(QKV)),
            ("mlp.gate_up_proj", Fused(GATE_UP)),
            attn_output="self_attn.o_proj",
            ffn_down="mlp.down_proj",
        ),
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "glm",
        "glm4",
        layers="layers",
        linears=linears(("mlp.gate_up_proj", Fused(GATE_UP)), **LLAMA_ATTENTION, ffn_down="mlp.down_proj"),
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "lfm2",
        layers="layers",
        linears={  # some layers attend, the others have a convolution
            **optional(linears(**{**LLAMA_ATTENTION, "attn_output": "self_attn.out_proj"})),
            **linears(ffn_gate="feed_forward.w1", ffn_up="feed_forward.w3", ffn_down="feed_forward.w2"),
        },
        heads=LLAMA_HEADS,
    ),
)
