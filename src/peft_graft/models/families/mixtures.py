"""Decoders whose feed-forward block is a mixture of experts in some or all layers: Mixtral, Qwen-MoE, DeepSeek, ..."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.families.llama import GATED_FFN, LLAMA_ATTENTION, LLAMA_FFN, LLAMA_HEADS
from peft_graft.models.rows import decoder_row, linears, optional
from peft_graft.models.spec import Experts, of_expert

#: Of each layer, where not all are mixtures: dense feed-forward blocks, or experts, some of whom see every token.
_EXPERTS = Experts("mlp", "mlp.experts", linears(**GATED_FFN))
_DENSE_AND_SHARED = {
    **optional(linears(**LLAMA_FFN)),
    **optional(of_expert("shared", linears(**GATED_FFN), "mlp.shared_experts")),
}

register_architecture(
    decoder_row(
        "mixtral",
        layers="layers",
        # In transformers 5 experts are one tensor and the router is no linear layer: nothing attaches there.
        linears={**linears(**LLAMA_ATTENTION), **optional(linears(ffn_router="block_sparse_moe.gate"))},
        experts=Experts(
            "block_sparse_moe", "block_sparse_moe.experts", linears(ffn_gate="w1", ffn_up="w3", ffn_down="w2")
        ),
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "qwen2_moe",
        "qwen3_moe",
        "olmoe",
        layers="layers",
        linears={
            **linears(**LLAMA_ATTENTION),
            **optional(linears(ffn_router="mlp.gate", **LLAMA_FFN)),
            **optional(of_expert("shared", linears(**GATED_FFN), "mlp.shared_expert")),
            **optional(of_expert("shared", linears(ffn_router="mlp.shared_expert_gate"))),
        },
        experts=_EXPERTS,
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "deepseek_v2",
        "deepseek_v3",
        layers="layers",
        linears={  # queries from a latent vector in the large ones; keys and values in all
            **optional(
                linears(
                    attn_query="self_attn.q_proj",
                    attn_query_down="self_attn.q_a_proj",
                    attn_query_up="self_attn.q_b_proj",
                )
            ),
            **linears(
                attn_kv_down="self_attn.kv_a_proj_with_mqa",
                attn_kv_up="self_attn.kv_b_proj",
                attn_output="self_attn.o_proj",
            ),
            **_DENSE_AND_SHARED,
        },
        experts=_EXPERTS,
        heads=LLAMA_HEADS,
    ),
    decoder_row(
        "glm4_moe",
        "dots1",
        layers="layers",
        linears={**linears(**LLAMA_ATTENTION), **_DENSE_AND_SHARED},
        experts=_EXPERTS,
        heads=LLAMA_HEADS,
    ),
)
