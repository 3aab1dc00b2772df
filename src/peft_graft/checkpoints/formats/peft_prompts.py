"""PEFT's virtual tokens: prompt tuning, p-tuning and prefix tuning, all saved as one tensor ``prompt_embeddings``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_graft.checkpoints.raw import PROMPT, Kind, RawCheckpoint, prefix_entries, prefix_pairs
from peft_graft.checkpoints.student_names import StudentNames
from peft_graft.errors import CheckpointError

KEY = "prompt_embeddings"


def check(
    kind: Kind, entries: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any], where: str
) -> dict[str, dict[str, Tensor]]:
    """The virtual tokens by their use: ``prompt`` -> embeddings [n, d], or ``prefix.LAYER`` -> key, value [n, d].

    Raises:
        CheckpointError: the tensor is missing or has another shape than the configuration says, or the module belongs
            as a prefix to an encoder-decoder.
    """
    found = entries.get("", {}).get(KEY)
    number, width = int(config.get("num_virtual_tokens") or 0), int(config.get("token_dim") or 0)
    layers = int(config.get("num_layers") or 0)
    parts = int(config.get("num_transformer_submodules") or 1)
    if kind == "prefix" and parts != 1:
        raise CheckpointError("prefixes of encoder-decoders cannot be moved yet", where=where, fix="move a LoRA")
    # Of an encoder-decoder peft keeps twice as many, though only the first half ever stands before a text.
    expected = [number * parts, width] if kind == "prompt" else [number, 2 * layers * width]
    if found is None or list(found.shape) != expected:
        raise CheckpointError(
            f"{KEY} is missing or has another shape than the configuration says",
            where=where,
            expected=expected,
            found=None if found is None else list(found.shape),
        )
    if kind == "prompt":
        return {PROMPT: {"embeddings": found}}
    return prefix_entries(found.view(number, layers, 2, width), range(layers))


def tensors(raw: RawCheckpoint) -> dict[str, Tensor]:
    """The virtual tokens as the file has them."""
    if raw.kind == "prompt":
        return {KEY: raw.entries[PROMPT]["embeddings"]}
    return {KEY: prefix_pairs(raw.entries).flatten(1)}


def config_of(raw: RawCheckpoint, config: Mapping[str, Any], student: StudentNames) -> dict[str, Any]:
    """The student's configuration.

    What was saved is what the text is preceded by, not the network that made it (p-tuning's encoder, a prefix's
    projection): so p-tuning becomes prompt tuning, which computes the same, and a prefix is one without projection.
    """
    written = {name: value for name, value in config.items() if not name.startswith("encoder_")}
    first = next(iter(raw.entries.values()))
    if raw.kind == "prompt":
        written.update(peft_type="PROMPT_TUNING", prompt_tuning_init="RANDOM", prompt_tuning_init_text=None)
        width, heads = first["embeddings"].shape[1], student.num_heads
    else:
        written.update(prefix_projection=False)
        width, heads = first["key"].shape[1], student.num_kv_heads
    layers = student.num_layers // int(config.get("num_transformer_submodules") or 1)
    return {**written, "token_dim": width, "num_layers": layers, "num_attention_heads": heads}
