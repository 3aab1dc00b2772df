"""The preflight: what a module is, and what would become of it on a student, without loading any model's weights."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from peft_graft.alignment.layout import room_of_a_pass
from peft_graft.alignment.methods import AUTO, METHODS
from peft_graft.checkpoints.convert import stand_in
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.errors import GraftError
from peft_graft.models.architecture import Architecture, describe
from peft_graft.models.loading import load_config
from peft_graft.models.task_models import blank_model, prefix_of
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Module
from peft_graft.modules.lora import LoraModule
from peft_graft.options import MAX_TOKENS
from peft_graft.planning.plan import TransferPlan, plan_transfer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteSummary(_Record):
    """The modules of one role: in which layers, how wide, how scaled, and which of them do nothing."""

    role: str
    layers: list[int]
    widths: list[int]
    scalings: list[float]
    idle_layers: list[int]


class StudentSummary(_Record):
    """What a transfer to a student would do, or why it cannot.

    ``statistics_mib``: memory of the statistics that the default gathers; ``passes``: over the text, so that they fit
    in this machine's memory; ``products_per_token``: multiply-adds for them; ``forwards_per_token``: those of both
    models' forward passes; ``weights_mib``: memory of both models in float32; ``least_seconds``: what the multiply-adds
    of ``options.MAX_TOKENS`` tokens take at the rate of a matrix product here.
    """

    name: str
    model_type: str | None = None
    num_layers: int | None = None
    layers: list[list[int]] | dict[str, list[list[int]]] = []
    modules: int = 0
    spaces: int = 0
    same_sizes: bool | None = None
    method: str | None = None
    needs_text: bool | None = None
    statistics_mib: float = 0.0
    passes: int = 1
    products_per_token: int = 0
    forwards_per_token: int = 0
    weights_mib: float = 0.0
    least_seconds: float = 0.0
    head: bool = False
    notes: list[str] = []
    problem: str | None = None


class Inspection(_Record):
    """What ``inspect`` found."""

    module: str
    module_library: str
    kind: str
    task: str
    base_model: str | None
    parameters: int
    sites: list[SiteSummary] = []
    paths: list[str]
    head: str | None = None
    labels: list[str] = []
    teacher_problem: str | None = None
    student: StudentSummary | None = None


def inspect(
    module: str | Path,
    *,
    student: str | Path | None = None,
    teacher: str | Path | None = None,
    layers: str = "skip",
) -> Inspection:
    """Look at a module, and plan its transfer to a student.

    Args:
        module, student, teacher, layers: as for ``transfer.transfer``.

    Returns:
        The findings. A teacher that cannot be reached, or a student that cannot receive the module, is reported as a
        problem and not raised.

    Raises:
        CheckpointError: the module itself cannot be read.
    """
    folder = locate(module)
    raw = read_checkpoint(folder)
    checkpoint, base, problem = _resolved(raw, str(teacher or raw.base_model or ""))
    found = Inspection(
        module=str(module),
        module_library=raw.library,
        kind=raw.kind,
        task=raw.task,
        base_model=raw.base_model,
        parameters=raw.num_parameters,
        sites=_summaries(checkpoint) if checkpoint else [],
        paths=sorted(raw.parts),
        head=", ".join(f"{key} {list(value.shape)}" for key, value in raw.head.items()) or None,
        labels=list(raw.labels or (checkpoint.head.labels if checkpoint and checkpoint.head else ())),
        teacher_problem=problem,
    )
    if student is None:
        return found
    if checkpoint is None or base is None:
        summary = StudentSummary(name=str(student), problem="the teacher has to be known first")
    else:
        summary = _plan_for(checkpoint, base, str(student), layers)
    return found.model_copy(update={"student": summary})


class _Blank(NamedTuple):
    """A base model without weights, and what is known about it."""

    model: PreTrainedModel
    architecture: Architecture

    @classmethod
    def of(cls, config: PretrainedConfig) -> _Blank:
        model = blank_model(config, Task.BASE)
        return cls(model, describe(model, config.model_type, prefix_of(model)))

    @property
    def costs(self) -> tuple[int, int]:
        """Multiply-adds of a forward pass for each token, attention's own aside, and bytes of float32 weights."""
        words = {id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)}
        sizes = [(value.numel(), value.ndim > 1 and id(value) not in words) for value in self.model.parameters()]
        return sum(size for size, multiplies in sizes if multiplies), 4 * sum(size for size, _ in sizes)


def _resolved(raw: RawCheckpoint, teacher: str) -> tuple[PeftCheckpoint | None, _Blank | None, str | None]:
    try:
        if not teacher:
            return None, None, "the module's configuration names no base model; name it with --teacher"
        config = load_config(teacher, "teacher")
        base = _Blank.of(config)
        if raw.needs_conversion:
            raw = stand_in(raw, config)
        return resolve(raw, base.architecture, dict(base.model.state_dict())), base, None
    except GraftError as error:
        return None, None, str(error)


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
                idle_layers=[module.site.layer for module in modules if not _unknown(module) and not module.is_active],
            )
        )
    return summaries


def _unknown(module: Module) -> bool:
    """Whether the values are not known before the teacher's weights are loaded."""
    return any(tensor.values.is_meta for tensor in module.tensors.values())


def _plan_for(checkpoint: PeftCheckpoint, teacher: _Blank, student: str, layers: str) -> StudentSummary:
    try:
        own = _Blank.of(load_config(student, "student"))
        architecture = own.architecture
        known = StudentSummary(name=student, model_type=architecture.model_type, num_layers=architecture.num_layers)
    except GraftError as error:
        return StudentSummary(name=student, problem=str(error))
    try:
        plan = plan_transfer(
            checkpoint, teacher.architecture, architecture, layers=layers, method=METHODS["prune-align"]
        )
    except GraftError as error:
        return known.model_copy(update={"problem": str(error)})
    outlook = _outlook(plan)
    if not (teacher.architecture.row.reads_text and architecture.row.reads_text):
        return known.model_copy(update=outlook | _WITHOUT_TEXT)
    costs = teacher.costs, own.costs
    forwards = sum(operations for operations, _ in costs)
    operations = MAX_TOKENS * (forwards + _plan_products(plan))
    return known.model_copy(
        update=outlook
        | {
            "forwards_per_token": forwards,
            "weights_mib": round(sum(size for _, size in costs) / 2**20, 1),
            "least_seconds": round(operations / _products_per_second(), 3),
        }
    )


#: What is different where text is of no use.
_WITHOUT_TEXT = {"method": "copy", "needs_text": False, "statistics_mib": 0.0, "products_per_token": 0}


def _products_per_second() -> float:
    """Multiply-adds a second of a float32 matrix product on this machine's processor, measured in some 0.1 seconds."""
    size = 768
    first = torch.rand(size, size)
    first @ first
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.1:
        first @ first
        count += 1
    return count * size**3 / (time.perf_counter() - begin)


def _plan_products(plan: TransferPlan) -> int:
    """Multiply-adds for each token of the moments that the default's methods need, those to fit and those held out."""
    moments = {moment for name in AUTO for moment in METHODS[name].moments}
    sizes = {"cross": lambda t, s: t * s, "teacher": lambda t, s: t * t, "student": lambda t, s: s * s}
    return sum(sizes[moment](*pair) for moment in moments for pair in plan.pairs.values())


def _outlook(plan: TransferPlan) -> dict[str, object]:
    same = all(first == second for first, second in plan.pairs.values())
    products = _plan_products(plan)
    return {
        "layers": plan.recorded_layers,
        "modules": len(plan.sites),
        "spaces": len(plan.pairs),
        "same_sizes": same,
        "method": f"the best of {', '.join(AUTO if same else AUTO[1:])} by agreement with the teacher, given text"
        + ("; else copy, if the student shares the teacher's word embeddings" if same else ""),
        "needs_text": None if same else True,
        "statistics_mib": round(2 * products * 8 / 2**20, 1),
        "passes": 1 + 2 * products // max(1, room_of_a_pass(torch.device("cpu"))),
        "products_per_token": products,
        "head": plan.head,
        "notes": list(plan.notes),
    }
