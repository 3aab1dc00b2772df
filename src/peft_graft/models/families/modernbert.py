"""ModernBERT."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import linears, row
from peft_graft.models.spec import GATE_UP, QKV, Fused

register_architecture(
    row(
        "modernbert",
        layers="layers",
        linears=linears(
            ("attn.Wqkv", Fused(QKV)), ("mlp.Wi", Fused(GATE_UP)), attn_output="attn.Wo", ffn_down="mlp.Wo"
        ),
    ),
)
