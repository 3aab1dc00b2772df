"""Controls: students that had all that a graft has but the teacher's module of the task.

    other-task    the module of a teacher of another task, moved
    random        a random module with the norms of the teacher's, moved
    untrained     the student's fresh module
    bare-teacher  the student's fresh module; the answers are those of the teacher's model with a head alone
    head          the student's fresh module, which learns nothing; the head alone is fitted

Each then has its head fitted and is polished as a graft is, ``head`` without the polish. A gain that they share with a
graft is not its module's.

In tasks of generation, which have no head, the teacher's module of the task answers in the first two as well: what is
not its own are the weights that are moved. The others are refused there (``spec.PROMPT_CONTROLS``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft_graft._transfer import moved, transfer
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.models.loading import blank_handle, load_config
from peft_graft.move import Move
from peft_graft.outputs import written_aside
from peft_graft.planning.sources import ModuleSource
from peft_graft.run import Callback, Run
from peft_graft.study.cell import load_plugins, unlabelled_text
from peft_graft.study.cells import FreshPolishCell, FreshPolishConfig, GraftCell, TeacherCell, TransferConfig
from peft_graft.study.folder import StudyFolder
from peft_graft.study.fresh_polish import polish_fresh_module
from peft_graft.study.spec import Control
from peft_graft.study.tasks import StudyTask


class BareTeacherCell(TeacherCell):
    """Train a head alone on the teacher's model, whose module stays untrained; it leaves a checkpoint."""

    kind = "bare-teacher"
    version: ClassVar[int] = 1

    def untrained(self, task: StudyTask) -> Any:
        """All but the head frozen."""
        model = super().untrained(task)
        heads = ("modules_to_save.", "heads.")
        for name, value in model.named_parameters():
            value.requires_grad_(value.requires_grad and any(part in name for part in heads))
        return model


class ControlConfig(FreshPolishConfig):
    """``control``: which of them."""

    control: Control


class ControlCell(FreshPolishCell):
    """A control, from its module to its polish; it leaves a checkpoint."""

    kind = "control"
    version: ClassVar[int] = 1
    config: ControlConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Move a module where there is one, fit the head, polish and write; an interrupted polish goes on."""
        config, work = self.config, folder.work(self.id)
        load_plugins(config.plugins)
        assert self.needs.teacher is not None
        option = config.transfer.model_copy(update={"polish": 0}) if config.control == "head" else config.transfer
        with unlabelled_text(config.examples, work) as text:
            return polish_fresh_module(
                (folder.artifact(self.needs.teacher), self.fresh_module(folder)),
                (config.teacher, config.student),
                text,
                folder.artifact(self.id),
                option,
                Run(callbacks, work / "polish"),
                moved=self._moved(folder, text),
                fit_head=True,
            )

    def _moved(self, folder: StudyFolder, text: Path) -> Path | None:
        """The control's module on the student; None where that is the student's fresh one."""
        config, out = self.config, folder.work(self.id) / "moved"
        if config.control in ("untrained", "bare-teacher", "head"):
            return None
        if out.exists():
            return out
        transfer(
            _weights(self, folder),
            teacher=config.teacher,
            student=config.student,
            text=text,
            out=out,
            config=config.transfer.model_copy(update={"polish": 0, "head": "drop", "force": True}),
        )
        return out


class PromptControlConfig(TransferConfig):
    """``control``: which of them."""

    control: Control


class PromptControlCell(GraftCell):
    """A control in a task of generation: a transfer of other weights; it leaves a checkpoint with its report."""

    kind = "control"
    version = 1
    config: PromptControlConfig

    def transferred(self, folder: StudyFolder, text: Path, out: Path, callbacks: Sequence[Callback]) -> None:
        """Move the control's weights; the teacher's module answers."""
        config, option = self.config, self.options(folder).model_copy(update={"force": True})
        assert self.needs.teacher is not None
        move = Move.planned(
            folder.artifact(self.needs.teacher),
            config.student,
            teacher=config.teacher,
            text=text,
            seeds=None,
            alignment=None,
            config=option,
        )
        moved(move.moving(ModuleSource.of(_weights(self, folder), option)), out, callbacks)


def _weights(cell: ControlCell | PromptControlCell, folder: StudyFolder) -> Path:
    """The module that a control moves."""
    config, needs = cell.config, cell.needs
    assert needs.teacher is not None
    if config.control != "random":
        assert needs.other is not None
        return folder.artifact(needs.other)
    module = folder.work(cell.id) / "random"
    if not module.exists():
        write_random(folder.artifact(needs.teacher), module, config.teacher, config.transfer.seed)
    return module


def write_random(module: Path, out: Path, model: str, seed: int) -> None:
    """Write a checkpoint like another one, its module's tensors random with the same norms; the head stays."""
    raw, draw = read_checkpoint(module), torch.Generator().manual_seed(seed)

    def drawn(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=draw)
        found: Tensor = noise * (value.float().norm() / noise.norm().clamp_min(1e-12))
        return found.to(value.dtype)

    parts = {
        path: part.with_tensors({name: drawn(value) for name, value in part.tensors.items()})
        for path, part in raw.parts.items()
    }
    with written_aside(out, force=True) as staging:
        handle = blank_handle(load_config(model), model)
        write_checkpoint(staging, replace(raw, parts=parts), written_names(handle, raw.task))
