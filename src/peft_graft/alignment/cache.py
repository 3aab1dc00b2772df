"""Alignments kept for later modules of the same pair of models, text and settings: a second one costs no forward pass.

    CACHE/alignments/PASS/METHOD-N/    folders as ``peft-graft align`` writes them

PASS is a hash of all that decides a map: both models' fingerprints, the text's content, order and beginning, tokens and
precision. The cache is bounded, least recently used first to go; deleting it loses nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_graft.alignment.alignment import Alignment, Pair
from peft_graft.alignment.maps import LinearMap, SpaceMap
from peft_graft.alignment.methods import Method
from peft_graft.alignment.moments import Moment
from peft_graft.alignment.storage import load_alignment, save_alignment
from peft_graft.errors import GraftError

VARIABLE = "PEFT_GRAFT_CACHE"
#: Bytes that the cache may take.
MOST = 4 << 30
_FORMAT = 1  # to be raised when the same inputs give other maps


def cache_folder(wanted: bool | None) -> Path | None:
    """Where to keep alignments: the variable's folder, or the platform's cache; None where none shall be kept.

    Args:
        wanted: None keeps them where the variable names a folder.
    """
    named = os.environ.get(VARIABLE)
    if wanted is False or (wanted is None and not named):
        return None
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peft-graft"


@dataclass(frozen=True)
class AlignmentCache:
    """The cached alignments of one text, read in one order, from one sample on."""

    folder: Path
    text: str
    skipped: int = 0

    @staticmethod
    def of(
        folder: Path | None, text: str | Path | None, columns: Sequence[str] | None, seed: int
    ) -> AlignmentCache | None:
        """The cache for a text file; None without a folder, and for data sets of the hub, which may change."""
        if folder is None or text is None or not Path(text).is_file():
            return None
        with Path(text).open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        return AlignmentCache(folder / "alignments", json.dumps([content, columns, seed]))

    def skipping(self, samples: int) -> AlignmentCache:
        """The same text without its first samples."""
        return replace(self, skipped=samples)

    def _pass(self, teacher: str, student: str, settings: Mapping[str, Any]) -> Path:
        parts = [_FORMAT, teacher, student, self.text, self.skipped, settings["max_tokens"], settings["dtype"]]
        return self.folder / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def find(
        self,
        method: Method,
        teacher: str,
        student: str,
        settings: Mapping[str, Any],
        wanted: Mapping[Pair, Iterable[Moment]],
    ) -> Alignment | None:
        """An alignment by this method that has every wanted map, put together from those that are kept."""
        maps: dict[Pair, SpaceMap] = {}
        found: Alignment | None = None
        diagnostics = {}
        for folder in sorted(self._pass(teacher, student, settings).glob(f"{method.name}-*")):
            try:
                found = load_alignment(folder)
            except GraftError:  # damaged, or removed meanwhile
                continue
            for pair in wanted.keys() & found.maps.keys():
                if _has(found.maps[pair], method, wanted[pair]):
                    maps[pair] = found.maps[pair]
                    diagnostics[pair] = found.diagnostics[pair]
            os.utime(folder)
            if maps.keys() == wanted.keys():
                return replace(found, maps=maps, diagnostics=diagnostics)
        return None

    def keep(self, alignment: Alignment, settings: Mapping[str, Any]) -> None:
        """Keep an alignment, and drop those used least recently where there are too many."""
        folder = self._pass(alignment.teacher, alignment.student, settings)
        save_alignment(alignment, folder / f"{alignment.method}-{uuid.uuid4().hex[:12]}")
        kept = sorted(self.folder.glob("*/*/"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in kept:
            total += sum(file.stat().st_size for file in path.iterdir())
            if total > MOST:
                shutil.rmtree(path, ignore_errors=True)


def _has(space_map: SpaceMap, method: Method, moments: Iterable[Moment]) -> bool:
    """Whether a map serves the directions that these moments are for."""
    if not isinstance(space_map, LinearMap):
        return True
    matrices = {"student": space_map.reading, "teacher": space_map.writing}
    return all(matrices[moment] is not None for moment in moments if moment != "cross" and moment in method.moments)
