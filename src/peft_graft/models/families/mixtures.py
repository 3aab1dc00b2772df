"""Decoders whose feed-forward block is a mixture of experts in some or all layers: Mixtral, Qwen-MoE, OLMoE."""

from __future__ import annotations

from dataclasses import replace

from peft_graft.models.families import register_architecture
from peft_graft.models.families.llama import GATED_FFN, LLAMA_ATTENTION, LLAMA_FFN, LLAMA_HEADS, LLAMA_STACK
from peft_graft.models.rows import linears, optional
from peft_graft.models.spec import ArchitectureRow, Experts, of_expert

register_architecture(
    ArchitectureRow(
        model_types=("mixtral",),
        stacks=(
            replace(
                LLAMA_STACK,
                # In transformers 5 experts are one tensor and the router is no linear layer: nothing attaches there.
                linears={**linears(**LLAMA_ATTENTION), **optional(linears(ffn_router="block_sparse_moe.gate"))},
                experts=Experts(
                    "block_sparse_moe",
                    "block_sparse_moe.experts",
                    linears(ffn_gate="w1", ffn_up="w3", ffn_down="w2"),
                ),
            ),
        ),
        heads=LLAMA_HEADS,
    ),
    ArchitectureRow(
        model_types=("qwen2_moe", "qwen3_moe", "olmoe"),
        stacks=(
            replace(
                LLAMA_STACK,
                linears={
                    **linears(**LLAMA_ATTENTION),
                    **optional(linears(ffn_router="mlp.gate", **LLAMA_FFN)),
                    **optional(of_expert("shared", linears(**GATED_FFN), "mlp.shared_expert")),
                    **optional(of_expert("shared", linears(ffn_router="mlp.shared_expert_gate"))),
                },
                experts=Experts("mlp", "mlp.experts", linears(**GATED_FFN)),
            ),
        ),
        heads=LLAMA_HEADS,
    ),
)
