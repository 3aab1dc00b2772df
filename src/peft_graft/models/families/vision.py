"""Models that read images, alone or beside text: ViT, DeiT, CLIP, SigLIP."""

from __future__ import annotations

from dataclasses import replace

from peft_graft.models.families import register_architecture
from peft_graft.models.families.bart import BART_LAYER
from peft_graft.models.rows import LAYER_ADAPTERS, adapter_points, linears, pre_norm, row
from peft_graft.models.spaces import FIRST_OUT
from peft_graft.models.spec import ArchitectureRow, HeadForm, Stack
from peft_graft.models.tasks import Task

_IMAGE_HEAD = {Task.IMAGE_CLASSIFICATION: HeadForm(out="classifier", reads=FIRST_OUT)}
_CLIP_LINEARS = {
    **BART_LAYER,
    **linears(ffn_up="mlp.fc1", ffn_down="mlp.fc2"),
}
_CLIP_TEXT = Stack(
    "text_model.encoder.layers",
    _CLIP_LINEARS,
    taps=pre_norm("layer_norm1", "layer_norm2"),
    adapters=LAYER_ADAPTERS,
    norms={"attn.norm": "layer_norm1", "ffn.norm": "layer_norm2"},
)
_CLIP_VISION = replace(_CLIP_TEXT, layers="vision_model.encoder.layers", kind="vision")

register_architecture(
    row(
        "vit",
        "deit",
        layers="encoder.layer",
        linears=linears(
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
        heads=_IMAGE_HEAD,
    ),
    row(  # transformers 5
        "vit",
        "deit",
        layers="layers",
        linears=linears(
            attn_query="attention.q_proj",
            attn_key="attention.k_proj",
            attn_value="attention.v_proj",
            attn_output="attention.o_proj",
            ffn_up="mlp.fc1",
            ffn_down="mlp.fc2",
        ),
        kind="vision",
        heads=_IMAGE_HEAD,
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
