"""Chains A -> B -> C: an alignment that is put together of two, and the graft by it. Grafts of grafts are grafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from peft_graft.alignment.alignment import Alignment
from peft_graft.config import GraftConfig
from peft_graft.run import Callback
from peft_graft.study.cell import Cell, Config
from peft_graft.study.cells import GraftCell
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


class ChainGraftCell(GraftCell):
    """Move a module by the alignment of a chain, between the layers that the chain brings together."""

    def options(self, folder: StudyFolder) -> GraftConfig:
        """With the layers of the alignment, where one serves each: those between the ends of a chain differ from what
        the ends alone would have, and from nothing else can they be known."""
        assert self.needs.alignment is not None
        option = self.config.transfer
        layers = Alignment.from_pretrained(folder.artifact(self.needs.alignment)).layers
        return option if layers is None else option.model_copy(update={"layers": layers})
