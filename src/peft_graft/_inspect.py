"""``inspect``: what a module is, and the plan of its transfer to a student, without loading any model's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import TextLike, rows_given
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import GraftConfig, known_arguments
from peft_graft.errors import GraftError
from peft_graft.graft import Graft
from peft_graft.models.devices import placed
from peft_graft.modules.base import Module
from peft_graft.modules.lora import LoraModule
from peft_graft.move import Move
from peft_graft.outlook import StudentSummary, outlook, unplanned
from peft_graft.planning.plan import at_teacher
from peft_graft.planning.sources import ModelLike, ModuleSource, described, given_alignment
from peft_graft.prompts.read import PromptLike
from peft_graft.record import Record


class SiteSummary(Record):
    """The modules of one role: in which layers, how wide, how scaled, and which of them do nothing."""

    role: str
    layers: list[int]
    widths: list[int]
    scalings: list[float]
    inactive_layers: list[int]


class Inspection(Record):
    """What ``inspect`` found.

    ``left_out``: those of ``paths`` that no role is known for, so that they would stay behind.
    """

    module: str
    module_library: str
    kind: str
    task: str
    base_model: str | None
    parameters: int
    sites: list[SiteSummary] = []
    paths: list[str]
    left_out: list[str] = []
    head: str | None = None
    labels: list[str] = []
    notes: list[str] = []
    teacher_problem: str | None = None
    student: StudentSummary | None = None


@known_arguments(GraftConfig)
def inspect(
    adapter: str | Path | nn.Module | Graft,
    student: ModelLike | None = None,
    *,
    teacher: ModelLike | None = None,
    text: TextLike | PromptLike | None = None,
    seeds: PromptLike | None = None,
    alignment: str | Path | Alignment | None = None,
    config: GraftConfig | Mapping[str, Any] | None = None,
) -> Inspection:
    """Look at a module, and plan its transfer to a student.

    Args:
        adapter: as for ``transfer``.
        student: as for ``transfer``; without one only the module is described.
        teacher: as for ``transfer``.
        text: as for ``transfer``; without any it stays open whether there will be some.
        seeds: as for ``transfer``.
        alignment: as for ``transfer``.
        config: as for ``transfer``.

    Returns:
        The findings. A teacher that cannot be reached or is not the module's base, or a student that cannot receive
        the module, is reported as a problem, in the words in which ``transfer`` would refuse it, and not raised.

    Raises:
        CheckpointError: the module itself cannot be read.
    """
    text = None if text is None else rows_given(text)
    seeds = None if seeds is None else rows_given(seeds, "seeds")
    config = placed(GraftConfig.of(config))
    module = ModuleSource.of(adapter.model if isinstance(adapter, Graft) else adapter, config)
    given = given_alignment(alignment, config.token)
    module, checkpoint, problem = _resolved(module, teacher, config)
    raw = module.raw
    found = Inspection(
        module=module.name,
        module_library=raw.library,
        kind=raw.kind,
        task=raw.task,
        base_model=raw.base_model,
        parameters=raw.num_parameters,
        sites=_summaries(checkpoint) if checkpoint else [],
        paths=sorted(raw.parts),
        left_out=list(checkpoint.left_out) if checkpoint else [],
        head=", ".join(f"{key} {list(value.shape)}" for key, value in raw.head.items()) or None,
        labels=list(raw.labels or (checkpoint.head.labels if checkpoint and checkpoint.head else ())),
        notes=list(raw.notes),
        teacher_problem=problem,
    )
    if student is None:
        return found
    try:
        move = Move.planned(
            module, student, teacher=teacher, text=text, seeds=seeds, alignment=given, config=config, may_have_text=True
        )
        planned = outlook(move)
    except GraftError as error:
        planned = unplanned(student, config, str(error))
    return found.model_copy(update={"student": planned})


def _resolved(
    module: ModuleSource, teacher: ModelLike | None, config: GraftConfig
) -> tuple[ModuleSource, PeftCheckpoint | None, str | None]:
    """The module with its task and at the sites of its teacher, or why that cannot be said."""
    try:
        handle = described(module.teacher(teacher), config, "teacher")
        module = module.of_teacher(handle, config)
        raw = module.shapes(handle.base.config)
        return module, at_teacher(raw, handle, config), None
    except GraftError as error:
        return module, None, str(error)


def _summaries(checkpoint: PeftCheckpoint) -> list[SiteSummary]:
    summaries = []
    for role in checkpoint.roles:
        modules = [module for site, module in checkpoint.modules.items() if site.role == role]
        scalings = [module.scaling for module in modules if isinstance(module, LoraModule)]
        summaries.append(
            SiteSummary(
                role=role,
                layers=[module.site.layer for module in modules],
                widths=sorted(Counter(module.width for module in modules)),
                scalings=sorted(Counter(scalings)),
                inactive_layers=[
                    module.site.layer for module in modules if not _unknown(module) and not module.is_active
                ],
            )
        )
    return summaries


def _unknown(module: Module) -> bool:
    """Whether the values are not known before the teacher's weights are loaded."""
    return any(tensor.values.is_meta for tensor in module.tensors.values())
