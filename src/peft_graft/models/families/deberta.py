"""DeBERTa, versions 2 and 3."""

from __future__ import annotations

from peft_graft.models.families import register_architecture
from peft_graft.models.families.bert import BERT_ADAPTERS, encoder_heads
from peft_graft.models.rows import linears, post_norm, row
from peft_graft.models.spaces import FIRST_OUT
from peft_graft.models.spec import HeadForm

register_architecture(
    row(
        "deberta-v2",
        layers="encoder.layer",
        linears=linears(
            attn_query="attention.self.query_proj",
            attn_key="attention.self.key_proj",
            attn_value="attention.self.value_proj",
            attn_output="attention.output.dense",
            ffn_up="intermediate.dense",
            ffn_down="output.dense",
        ),
        taps=post_norm("attention.self.query_proj", "intermediate.dense", "output.LayerNorm"),
        adapters=BERT_ADAPTERS,
        heads=encoder_heads(HeadForm(out="classifier", reads=FIRST_OUT, dense="pooler.dense", activation="gelu")),
    ),
)
