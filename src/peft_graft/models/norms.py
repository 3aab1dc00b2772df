"""Where a model keeps its layer norms, and which space each of them writes: found by the names that authors give.

A norm's role follows from who reads it, so that models share roles where their norms do the same,
before the block or after it.

    attn.norm        written for the attention: attn.in
    cross.norm       written for the attention to an encoder: cross.in
    ffn.norm         written for the feed-forward block: ffn.in
    out.norm         the layer's last act (post-norm models): layer.out
    attn.post_norm   of what the attention wrote, before it is added (Gemma 2, OLMo 2): attn.output.out
    ffn.post_norm    of what the feed-forward block wrote, likewise: ffn.down.out
    embeddings.norm  of the embeddings, before the first layer
    final.norm       after the last layer: tokens.out
"""

from __future__ import annotations

import re

from torch import nn

from peft_graft.models.spaces import EMBEDDED, TOKENS_OUT

#: Role -> the space that the norm writes.
SPACE_OF_NORM = {
    "attn.norm": "attn.in",
    "cross.norm": "cross.in",
    "ffn.norm": "ffn.in",
    "out.norm": "layer.out",
    "attn.post_norm": "attn.output.out",
    "ffn.post_norm": "ffn.down.out",
    "embeddings.norm": EMBEDDED,
    "final.norm": TOKENS_OUT,
}
_IN_LAYER = {
    "attn.norm": r"input_layernorm|ln_1|self_attn_layer_norm|attn_norm|layernorm_before|layer_norm1|ln_attn",
    "ffn.norm": r"post_attention_layernorm|pre_feedforward_layernorm|ln_2|final_layer_norm|mlp_norm|layernorm_after|"
    r"layer_norm2|ln_mlp|attention\.output\.LayerNorm|attention\.LayerNorm|sa_layer_norm",
    "out.norm": r"output\.LayerNorm|full_layer_layer_norm|output_layer_norm",
    "attn.post_norm": r"post_attention_layernorm",
    "ffn.post_norm": r"post_feedforward_layernorm",
}
_IN_MODEL = {
    "embeddings.norm": r"embeddings\.(LayerNorm|norm)|word_embeddings_layernorm|embeddings_project_in_norm",
    "final.norm": r"(decoder\.)?(norm|ln_f|final_layer_norm|final_layernorm|final_norm)",
}


def norm_paths(layer: nn.Module) -> dict[str, str]:
    """Role -> path inside the layer, for the norms whose role is known and of which there is one."""
    names = [name for name, module in layer.named_modules() if _is_norm(module)]
    found = _matching(names, _IN_LAYER)
    if "post_feedforward_layernorm" in names:  # then the norm after the attention belongs to what it wrote
        found["attn.post_norm"] = ["post_attention_layernorm"]
        found["ffn.norm"] = [name for name in found["ffn.norm"] if name != "post_attention_layernorm"]
    else:
        found["attn.post_norm"] = []
    return {role: paths[0] for role, paths in found.items() if len(paths) == 1}


def global_norm_paths(base: nn.Module) -> dict[str, str]:
    """Role -> path in the base model, for the norms before and after the layers."""
    names = [name for name, module in base.named_modules() if _is_norm(module)]
    return {role: paths[0] for role, paths in _matching(names, _IN_MODEL).items() if len(paths) == 1}


def _matching(names: list[str], patterns: dict[str, str]) -> dict[str, list[str]]:
    return {role: [name for name in names if re.fullmatch(pattern, name)] for role, pattern in patterns.items()}


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("Norm") and isinstance(weight, nn.Parameter) and weight.ndim == 1
