"""What a graft costs beside its teacher: sizes, and the time that each takes to read the same text."""

from __future__ import annotations

import time
from collections.abc import Mapping

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.distillation import Distillation
from peft_graft.models.loading import ModelPair
from peft_graft.models.spaces import Site
from peft_graft.modules.base import Module
from peft_graft.record import Record

#: Readings, of which the fastest counts; the first one brings everything into place.
_TIMES = 2


class SideCost(Record):
    """Values of a base model and of its module without a head, and seconds to read some of the text that judges, with
    the module; None where nothing was read."""

    parameters: int
    module_parameters: int
    seconds: float | None = None


class CostRecord(Record):
    """Teacher and student with their modules, on the same texts (``texts`` of them, in one batch) and machine."""

    teacher: SideCost
    student: SideCost
    texts: int = 0


def cost_of(models: ModelPair, modules: Mapping[Site, Module], candidate: Candidate) -> CostRecord:
    """What teacher and graft cost.

    Args:
        modules: the teacher's. candidate: the graft; its attached model, if it has one, reads.
    """
    seconds: list[float | None] = [None, None]
    texts = 0
    if candidate.attached is not None:
        distillation, attached = candidate.learning
        for side, model in enumerate((distillation.teacher, attached)):
            texts, seconds[side] = _reading_time(distillation, model)
    sides = zip((models.teacher, models.student), (modules, candidate.checkpoint.modules), seconds, strict=True)
    teacher, student = (
        SideCost(
            parameters=int(model.base.num_parameters()),
            module_parameters=sum(value.numel() for module in own.values() for value in module.values.values()),
            seconds=taken,
        )
        for model, own, taken in sides
    )
    return CostRecord(teacher=teacher, student=student, texts=texts)


def _reading_time(distillation: Distillation, attached: AttachedModel) -> tuple[int, float]:
    """How many texts were read, and in how many seconds."""
    texts, taken = 0, []
    for _ in range(_TIMES):
        start = time.perf_counter()
        texts = distillation.read(attached)
        taken.append(time.perf_counter() - start)
    return texts, min(taken)
