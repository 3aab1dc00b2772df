"""DeBERTa, versions 2 and 3."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.families.bert import BERT_STACK, TOKEN_HEAD
from peft_graft.models.rows import linears, post_norm
from peft_graft.models.spaces import FIRST_OUT
from peft_graft.models.spec import ArchitectureRow, HeadForm, Stack
from peft_graft.models.tasks import Task

register_architecture(
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
                adapters=BERT_STACK.adapters,
            ),
        ),
        heads={
            Task.TOKEN_CLASSIFICATION: TOKEN_HEAD,
            Task.SEQUENCE_CLASSIFICATION: HeadForm(
                out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="gelu"
            ),
        },
    ),
)
