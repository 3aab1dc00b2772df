"""What peft saves of a vocabulary beside a LoRA: whole embeddings or output layers, or the rows of single tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.embeddings import OUTPUT_NAMES, RowsPart, TokenRowsPart, is_vocabulary

WHOLE, TOKENS = "weight", "token_adapter.trainable_tokens_delta"
#: Copies of embeddings and output layers, untrained or already there, which peft saves beside those that count.
_COPY = re.compile(r".+\.((token_adapter\.)?base_layer|modules_to_save|original_module)\.weight")


def is_copy(path: str) -> bool:
    """Whether a tensor says nothing that no other does."""
    return bool(_COPY.fullmatch(path))


def place(path: str) -> tuple[str, str] | None:
    """Module path and name of a tensor of whole embeddings or output layers."""
    owner, _, last = re.sub(r"\.modules_to_save\.[^.]+", "", path).rpartition(".")
    return (owner, WHOLE) if last == WHOLE and is_vocabulary(owner) else None


def without_tied(
    found: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> Mapping[str, Mapping[str, Tensor]]:
    """The same without the rows of an output layer that are the word embeddings' own, which it is tied to.

    peft saves them twice once the vocabulary was resized, and does not load the second.
    """
    rows = {path: values[TOKENS] for path, values in found.items() if TOKENS in values}
    twice = {
        path
        for path, own in rows.items()
        if path.rpartition(".")[2] in OUTPUT_NAMES
        and any(
            other != path and own.shape == value.shape and torch.equal(own, value) and _same_ids(path, other, config)
            for other, value in rows.items()
        )
    }
    return {path: values for path, values in found.items() if path not in twice}


def _same_ids(output: str, embedding: str, config: Mapping[str, Any]) -> bool:
    """Whether the configuration names no other tokens for an output layer than for word embeddings."""
    return _ids(output, config) in ([], _ids(embedding, config))


def _ids(path: str, config: Mapping[str, Any]) -> list[int]:
    named = config.get("trainable_token_indices") or []
    own = {name: ids for name, ids in named.items() if path.endswith(name)} if isinstance(named, dict) else {"": named}
    return list(next(iter(own.values()), []))


def part(path: str, values: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Part | None:
    """The rows that were saved at a path, None where there are none.

    Raises:
        CheckpointError: there is something else beside them, or the configuration does not name as many tokens as there
            are rows.
    """
    if len(values) > 1 and {WHOLE, TOKENS} & values.keys():
        raise CheckpointError(
            f"the file holds trained rows of {path} and something else there, of which peft loads one alone",
            where=where,
            found=", ".join(sorted(values)),
            fix="load the file with peft and save_pretrained, which writes what it has loaded",
        )
    if WHOLE in values:
        return RowsPart(values[WHOLE])
    if TOKENS not in values:
        return None
    ids, rows = _ids(path, config), values[TOKENS]
    if rows.ndim != 2 or len(set(ids)) != len(rows) or len(ids) != len(rows):
        raise CheckpointError(
            f"the rows of {path} and trainable_token_indices disagree",
            where=where,
            expected=f"{len(set(ids))} rows, one for each id" if rows.ndim != 2 else f"{len(rows)} different ids",
            found=f"shape {list(rows.shape)}" if rows.ndim != 2 else len(set(ids)),
            fix="save the module again with save_pretrained, which writes both",
        )
    return TokenRowsPart(rows, tuple(ids))


def tensors(path: str, part: RowsPart) -> dict[str, Tensor]:
    """The tensor of rows by its path in the file."""
    return {f"{path}.{TOKENS if isinstance(part, TokenRowsPart) else WHOLE}": part.rows}


def token_indices(parts: Mapping[str, Part]) -> dict[str, list[int]] | None:
    """What the configuration says about tokens whose rows were trained one by one."""
    chosen = {path: part.ids for path, part in parts.items() if isinstance(part, TokenRowsPart)}
    return {path.rpartition(".")[2]: list(ids) for path, ids in chosen.items()} or None
