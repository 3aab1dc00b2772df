"""The part of the table of families for models of several stacks, and for those that read images or sound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from peft_graft.models.families.common import BART_LAYER, adapter_points, linears, optional, post_norm, pre_norm
from peft_graft.models.spaces import FIRST_OUT
from peft_graft.models.spec import AdapterPoint, ArchitectureRow, HeadForm, Stack, Tap
from peft_graft.models.tasks import Task


def _crossing(taps: Mapping[str, Tap], cross: Tap) -> dict[str, Tap]:
    """The stream of decoder layers that also attend to an encoder, after which the feed-forward block sees it."""
    return {**taps, "attn.stream": cross, "cross.stream": taps["attn.stream"]}


def _crossing_points(attention: str, cross: str, output: str) -> dict[str, AdapterPoint]:
    points = adapter_points(attention, output)
    return {
        **points,
        "cross.adapter": AdapterPoint(cross, "cross.output.out", "cross.stream", "attn.stream"),
        "ffn.adapter": replace(points["ffn.adapter"], parallel="cross.stream"),
    }


def _t5(name: Literal["encoder", "decoder"]) -> Stack:
    attention = {f"attn_{role}": f"layer.0.SelfAttention.{role[0]}" for role in ("query", "key", "value", "output")}
    cross = {f"cross_{role}": f"layer.1.EncDecAttention.{role[0]}" for role in ("query", "key", "value", "output")}
    last = "layer.1" if name == "encoder" else "layer.2"
    block = f"{last}.DenseReluDense"
    found = linears(**attention, ffn_up=f"{block}.wi_1", ffn_down=f"{block}.wo", **(cross if name == "decoder" else {}))
    # Version 1.0 has no gate, and calls its first projection otherwise.
    found["ffn.up"] = replace(found["ffn.up"], elsewhere=f"{block}.wi")
    found |= optional(linears(ffn_gate=f"{block}.wi_0"))
    taps, points = pre_norm("layer.0", last), adapter_points("layer.0.adapters", f"{last}.adapters")
    norms = {"attn.norm": "layer.0.layer_norm", "ffn.norm": f"{last}.layer_norm"}
    if name == "decoder":
        taps = _crossing(taps, Tap("layer.1", "input"))
        points = _crossing_points("layer.0.adapters", "layer.1.adapters", f"{last}.adapters")
        norms["cross.norm"] = "layer.1.layer_norm"
    return Stack(f"{name}.block", found, taps=taps, adapters=points, name=name, kind=name, norms=norms)


_BART_CROSS = linears(
    cross_query="encoder_attn.q_proj",
    cross_key="encoder_attn.k_proj",
    cross_value="encoder_attn.v_proj",
    cross_output="encoder_attn.out_proj",
)
_BART_ADAPTERS = adapter_points("attention_adapters.adapters", "output_adapters.adapters")


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
    points = _crossing_points(
        "attention_adapters.adapters", "cross_attention_adapters.adapters", "output_adapters.adapters"
    )
    decoder = {**BART_LAYER, **_BART_CROSS}
    return ArchitectureRow(
        model_types,
        (
            Stack("encoder.layers", BART_LAYER, taps=taps, adapters=_BART_ADAPTERS, name="encoder",
                  norms=of_encoder),
            Stack("decoder.layers", decoder, taps=_crossing(taps, cross), adapters=points, name="decoder",
                  kind="decoder", norms=of_decoder),
        ),
    )  # fmt: skip


_WHISPER = _bart("whisper", before=True)

_ENCODER_DECODERS: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("t5", "mt5", "umt5"),
        stacks=(_t5("encoder"), _t5("decoder")),
        flat_tasks=frozenset({Task.SEQ2SEQ_LM, Task.QUESTION_ANSWERING}),
    ),
    _bart("bart", "marian", before=False),
    _bart("mbart", "pegasus", "m2m_100", before=True),
    replace(_WHISPER, stacks=(replace(_WHISPER.stacks[0], kind="audio"), _WHISPER.stacks[1])),
)

_CLIP_LINEARS = {
    **BART_LAYER,
    **linears(ffn_up="mlp.fc1", ffn_down="mlp.fc2"),
}
_CLIP_TEXT = Stack(
    "text_model.encoder.layers",
    _CLIP_LINEARS,
    taps=pre_norm("layer_norm1", "layer_norm2"),
    adapters=_BART_ADAPTERS,
    norms={"attn.norm": "layer_norm1", "ffn.norm": "layer_norm2"},
)
_CLIP_VISION = replace(_CLIP_TEXT, layers="vision_model.encoder.layers", kind="vision")

_TOWERS: tuple[ArchitectureRow, ...] = (
    ArchitectureRow(
        model_types=("vit", "deit"),
        stacks=(
            Stack(
                "encoder.layer",
                linears(
                    attn_query="attention.attention.query",
                    attn_key="attention.attention.key",
                    attn_value="attention.attention.value",
                    attn_output="attention.output.dense",
                    ffn_up="intermediate.dense",
                    ffn_down="output.dense",
                ),
                taps=pre_norm("layernorm_before", "layernorm_after"),
                adapters=adapter_points("attention_adapters.adapters", "output.output_adapters.adapters"),
                kind="vision",
            ),
        ),
        heads={Task.IMAGE_CLASSIFICATION: HeadForm(out="classifier", reads=FIRST_OUT)},
    ),
    ArchitectureRow(  # transformers 5
        model_types=("vit", "deit"),
        stacks=(
            Stack(
                "layers",
                linears(
                    attn_query="attention.q_proj",
                    attn_key="attention.k_proj",
                    attn_value="attention.v_proj",
                    attn_output="attention.o_proj",
                    ffn_up="mlp.fc1",
                    ffn_down="mlp.fc2",
                ),
                kind="vision",
            ),
        ),
        heads={Task.IMAGE_CLASSIFICATION: HeadForm(out="classifier", reads=FIRST_OUT)},
    ),
    ArchitectureRow(model_types=("clip_text_model",), stacks=(_CLIP_TEXT,)),
    ArchitectureRow(model_types=("clip_vision_model", "siglip_vision_model"), stacks=(_CLIP_VISION,)),
    ArchitectureRow(  # transformers 5
        model_types=("clip_text_model",), stacks=(replace(_CLIP_TEXT, layers="encoder.layers"),)
    ),
    ArchitectureRow(
        model_types=("clip_vision_model", "siglip_vision_model"),
        stacks=(replace(_CLIP_VISION, layers="encoder.layers"),),
    ),
    ArchitectureRow(
        model_types=("clip", "siglip"),
        stacks=(replace(_CLIP_TEXT, name="text"), replace(_CLIP_VISION, name="vision")),
    ),
)

STACKED_ROWS = (*_ENCODER_DECODERS, *_TOWERS)
