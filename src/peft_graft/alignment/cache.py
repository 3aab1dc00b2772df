"""Alignments kept for later modules of the same pair of models, text and settings: a second one costs no forward pass.

    CACHE/alignments/PASS/METHOD-N/    folders as ``peft-graft align`` writes them

PASS is a hash of what decides a map: both models' values, configurations and tokenizers, the text's content, order and
beginning, tokens and precision. Methods from outside this package are not kept, for what they compute may change. The
cache is bounded, least recently used first to go; deleting it loses nothing but time, and one that cannot be read or
written is done without.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import cached_assets_path, constants

from peft_graft.alignment.alignment import Alignment, Pair
from peft_graft.alignment.maps import LinearMap, SpaceMap
from peft_graft.alignment.methods import Method
from peft_graft.alignment.moments import Moment
from peft_graft.config import PairConfig
from peft_graft.errors import GraftError, OutputError

logger = logging.getLogger("peft_graft")
VARIABLE = "PEFT_GRAFT_CACHE"
#: Bytes that the cache may take.
MOST = 4 << 30
_FORMAT = 3  # to be raised when the same inputs give other maps


def cache_folder(wanted: bool | None) -> Path | None:
    """Where alignments are kept: the variable's folder, or huggingface_hub's assets; None where none shall be.

    Args:
        wanted: None keeps them where the variable names a folder.
    """
    named = os.environ.get(VARIABLE)
    if wanted is False or (wanted is None and not named):
        return None
    if named:
        return Path(named)
    return Path(cached_assets_path("peft-graft", namespace="cache", assets_dir=constants.HF_ASSETS_CACHE)).parent


@dataclass(frozen=True)
class AlignmentCache:
    """The alignments on one text that are kept.

    Attributes:
        folder: of the cache. key: what the alignments depend on beside the models: text, tokens, precision.
    """

    folder: Path
    key: str

    @staticmethod
    def of(config: PairConfig, text: str | None) -> AlignmentCache | None:
        """The cache for a text; None where nothing is kept.

        Args:
            text: what tells its samples and their order from others', None where that is not known.
        """
        folder = cache_folder(config.cache)
        if folder is None or text is None:
            return None
        return AlignmentCache(folder / "alignments", json.dumps([_FORMAT, text, config.max_tokens, config.dtype]))

    def _pass(self, models: tuple[str, str]) -> Path:
        return self.folder / hashlib.sha256(json.dumps([*models, self.key]).encode()).hexdigest()[:32]

    def find(
        self, method: Method, models: tuple[str, str], wanted: Mapping[Pair, Iterable[Moment]]
    ) -> Alignment | None:
        """An alignment by this method that has every wanted map, put together from those that are kept.

        Args:
            models: keys of teacher and student (``ModelHandle.key``).
        """
        return assembled(self._kept(method, models), method, wanted) if method.is_built_in else None

    def _kept(self, method: Method, models: tuple[str, str]) -> Iterator[Alignment]:
        for folder in sorted(self._pass(models).glob(f"{method.name}-*")):
            try:
                found = Alignment.from_pretrained(folder)
            except GraftError:  # damaged, or removed meanwhile
                continue
            with suppress(OSError):  # removed meanwhile, or read-only
                os.utime(folder)
            yield found

    def keep(self, alignment: Alignment, method: Method, models: tuple[str, str]) -> None:
        """Keep an alignment, and drop those used least recently where there are too many.

        Args:
            models: keys of teacher and student.
        """
        if not method.is_built_in:
            return
        try:
            alignment.save_pretrained(self._pass(models) / f"{method.name}-{uuid.uuid4().hex[:12]}")
        except OutputError as error:
            logger.warning("the alignment is not kept for later: %s", error)
        kept = sorted(((*_use(path), path) for path in self.folder.glob("*/*/")), reverse=True)
        total = 0
        for _, size, path in kept:
            total += size
            if total > MOST:
                shutil.rmtree(path, ignore_errors=True)


def assembled(kept: Iterable[Alignment], method: Method, wanted: Mapping[Pair, Iterable[Moment]]) -> Alignment | None:
    """An alignment by a method that has every wanted map, put together from others of the same models and text.

    Args:
        kept: read as far as they are needed. wanted: pairs of spaces, and the moments that their maps are made of.
    """
    maps: dict[Pair, SpaceMap] = {}
    diagnostics = {}
    for found in kept:
        if found.method != method.name:
            continue
        for pair in wanted.keys() & found.maps.keys():
            if _has(found.maps[pair], method, wanted[pair]):
                maps[pair] = found.maps[pair]
                diagnostics[pair] = found.diagnostics[pair]
        if maps.keys() == wanted.keys():
            return replace(found, maps=maps, diagnostics=diagnostics)
    return None


def _use(folder: Path) -> tuple[float, int]:
    """When a folder was last used, and its bytes; zeros for one that another process removes."""
    try:
        return folder.stat().st_mtime, sum(file.stat().st_size for file in folder.iterdir())
    except OSError:
        return 0.0, 0


def _has(space_map: SpaceMap, method: Method, moments: Iterable[Moment]) -> bool:
    """Whether a map serves the directions that these moments are for."""
    if not isinstance(space_map, LinearMap):
        return True
    matrices = {"student": space_map.reading, "teacher": space_map.writing}
    return all(matrices[moment] is not None for moment in moments if moment != "cross" and moment in method.moments)
