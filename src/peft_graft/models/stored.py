"""Single tensors of a model's safetensors, without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from peft_graft.models.checks import file_of


class StoredTensors:
    """A model's tensors by the names that its safetensors have, each read when it is asked for.

    Args:
        place: folder or hub id. source: arguments of ``from_pretrained`` that say where it is.
    """

    def __init__(self, place: str, source: Mapping[str, Any]) -> None:
        self._place, self._source = place, source
        self._open: dict[str, tuple[Any, set[str]]] = {}

    def get(self, name: str) -> Tensor | None:
        """One of them; None where it has no such file or tensor."""
        stored = self._holding(name)
        return stored.get_tensor(name) if stored is not None else None

    def rows(self, name: str, count: int) -> Tensor | None:
        """The first rows of one, of which no others are read."""
        stored = self._holding(name)
        return stored.get_slice(name)[:count] if stored is not None else None

    def _holding(self, name: str) -> Any:
        """The open file with a tensor, None where there is none."""
        from transformers.utils import SAFE_WEIGHTS_NAME

        file = SAFE_WEIGHTS_NAME if self._files is None else self._files.get(name)
        if file is None:
            return None
        if file not in self._open:
            path = file_of(self._place, file, self._source, "model")
            stored: Any = safe_open(path, "pt") if path else None
            self._open[file] = stored, set(stored.keys() if path else ())
        stored, names = self._open[file]
        return stored if name in names else None

    @cached_property
    def _files(self) -> dict[str, str] | None:
        """Names of tensors -> the files that have them; None of a model in a single file."""
        from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

        index = file_of(self._place, SAFE_WEIGHTS_INDEX_NAME, self._source, "model")
        if index is None:
            return None
        files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return files
