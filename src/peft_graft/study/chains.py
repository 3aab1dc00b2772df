"""Chains A -> B -> C: an alignment that is put together of two. Grafts of grafts need no kind of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from peft_graft.alignment.alignment import Alignment
from peft_graft.run import Callback
from peft_graft.study.cell import Cell, Config
from peft_graft.study.folder import StudyFolder


class ChainConfig(Config):
    """``teacher``, ``through``, ``student``: A, B and C."""

    teacher: str
    through: str
    student: str


class ChainCell(Cell):
    """Put the alignments of A with B (``alignment``) and of B with C (``other``) together; it leaves an alignment."""

    kind = "chain"
    version: ClassVar[int] = 1
    config: ChainConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Compose and write; no model is run."""
        assert self.needs.alignment is not None
        assert self.needs.other is not None
        parts = (Alignment.from_pretrained(folder.artifact(name)) for name in (self.needs.alignment, self.needs.other))
        found = Alignment.compose(*parts)
        found.save_pretrained(folder.artifact(self.id), force=True)
        return {"spaces": len(found.maps)}
