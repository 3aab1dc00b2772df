"""What peft saves of a vocabulary beside a LoRA: whole embeddings or output layers, or the rows of single tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peft_graft.errors import CheckpointError
from peft_graft.modules.base import Part
from peft_graft.modules.embeddings import RowsPart, TokenRowsPart, is_vocabulary

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


def part(path: str, values: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Part | None:
    """The rows that were saved at a path, None where there are none.

    Raises:
        CheckpointError: the configuration does not name as many tokens as there are rows.
    """
    if WHOLE in values:
        return RowsPart(values[WHOLE])
    if TOKENS not in values:
        return None
    named = config.get("trainable_token_indices") or []
    own = {name: ids for name, ids in named.items() if path.endswith(name)} if isinstance(named, dict) else {"": named}
    ids = next(iter(own.values()), [])
    if len(ids) != len(values[TOKENS]):
        raise CheckpointError(
            f"the rows of {path} and trainable_token_indices disagree",
            where=where,
            expected=f"{len(values[TOKENS])} ids",
            found=len(ids),
            fix="save the module again with save_pretrained, which writes both",
        )
    return TokenRowsPart(values[TOKENS], tuple(ids))


def tensors(path: str, part: RowsPart) -> dict[str, Tensor]:
    """The tensor of rows by its path in the file."""
    return {f"{path}.{TOKENS if isinstance(part, TokenRowsPart) else WHOLE}": part.rows}


def token_indices(parts: Mapping[str, Part]) -> dict[str, list[int]] | None:
    """What the configuration says about tokens whose rows were trained one by one."""
    chosen = {path: part.ids for path, part in parts.items() if isinstance(part, TokenRowsPart)}
    return {path.rpartition(".")[2]: list(ids) for path, ids in chosen.items()} or None
