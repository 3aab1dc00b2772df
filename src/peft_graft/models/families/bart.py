"""BART and its relatives: Marian, mBART, Pegasus, M2M100, Whisper."""

from __future__ import annotations

from dataclasses import replace

from peft_graft.models.families import register_architecture
from peft_graft.models.rows import LAYER_ADAPTERS, crossing, crossing_points, linears, post_norm, pre_norm
from peft_graft.models.spec import ArchitectureRow, Stack, Tap

#: The linear layers of BART, and of many after it.
BART_LAYER = linears(
    attn_query="self_attn.q_proj",
    attn_key="self_attn.k_proj",
    attn_value="self_attn.v_proj",
    attn_output="self_attn.out_proj",
    ffn_up="fc1",
    ffn_down="fc2",
)
_BART_CROSS = linears(
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_output="encoder_attn.out_proj",
)


def _bart(*model_types: str, before: bool) -> ArchitectureRow:
    """BART and its relatives, which norm the residual stream before every block or after it."""
    first, second, third = "self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"
    taps = pre_norm(first, third) if before else post_norm("self_attn.q_proj", "fc1", third)
    cross = Tap(second if before else "encoder_attn.q_proj", "input")
    if before:  # a norm belongs to whoever reads what it writes
        of_encoder = {"attn.norm": first, "ffn.norm": third}
        of_decoder = {"attn.norm": first, "cross.norm": second, "ffn.norm": third}
    else:
        of_encoder = {"ffn.norm": first, "out.norm": third}
        of_decoder = {"cross.norm": first, "ffn.norm": second, "out.norm": third}
    points = crossing_points(
        "attention_adapters.adapters", "cross_attention_adapters.adapters", "output_adapters.adapters"
    )
    decoder = {**BART_LAYER, **_BART_CROSS}
    return ArchitectureRow(
        model_types,
        (
            Stack("encoder.layers", BART_LAYER, taps=taps, adapters=LAYER_ADAPTERS, name="encoder",
                  norms=of_encoder),
            Stack("decoder.layers", decoder, taps=crossing(taps, cross), adapters=points, name="decoder",
                  kind="decoder", norms=of_decoder),
        ),
    )  # fmt: skip


_WHISPER = _bart("whisper", before=True)

register_architecture(
    _bart("bart", "marian", before=False),
    _bart("mbart", "pegasus", "m2m_100", before=True),
    replace(_WHISPER, stacks=(replace(_WHISPER.stacks[0], kind="audio"), _WHISPER.stacks[1])),
)
