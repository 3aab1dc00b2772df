"""ModernBERT."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import linears
from peft_graft.models.spec import GATE_UP, QKV, ArchitectureRow, Fused, Stack

register_architecture(
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
)
