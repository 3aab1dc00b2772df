"""Grafts: built from a plan and an alignment, recorded site by site, written and verified."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_graft.alignment.alignment import Alignment, Pair
from peft_graft.alignment.maps import SpaceMap
from peft_graft.alignment.methods import Diagnostics, Method, map_axis
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.heads import head_form
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, to_raw
from peft_graft.checkpoints.student_names import StudentNames, student_names
from peft_graft.checkpoints.verify import verify
from peft_graft.config import Library
from peft_graft.files import write_json, written_aside
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import VOCABULARY, Site, Space, space_at
from peft_graft.models.task_models import fresh_head, set_labels
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Axis, LabelledTensor, Module, average
from peft_graft.modules.head import Head
from peft_graft.planning.plan import SitePlan, TransferPlan
from peft_graft.projection import project, resize_inner_layer
from peft_graft.report import (
    GraftReport,
    HeadRecord,
    MapRecord,
    ModelRecord,
    PairingRecord,
    SiteRecord,
    write_model_card,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Tasks without whose head peft loads no checkpoint.
_TASKS_WITH_HEAD = (Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING)


@dataclass(frozen=True)
class Graft:
    """The result of every transfer: the student's checkpoint, how each site came about, and how to keep it.

    Attributes:
        checkpoint: the modules at the student's sites, and the head if one was carried.
        report: everything that ``graft.json`` will say.
        alignment: the maps that were used, reusable for every module of the same pair of models.
        student: the student's base model; ``save`` loads the written checkpoint into a copy of it.
    """

    checkpoint: PeftCheckpoint
    report: GraftReport
    alignment: Alignment
    student: ModelHandle = field(repr=False)
    folder: Path | None = None

    def raw(self) -> RawCheckpoint:
        """The checkpoint with the student's own paths, as it will be written."""
        return checkpoint_of_student(self.checkpoint, self.student, self.report.settings.seed)

    def save(self, folder: str | Path, *, force: bool = False) -> Graft:
        """Write the checkpoint, verify it in its library, and only then put it in place.

        Returns:
            The same graft with ``folder`` and the verification in its report.

        Raises:
            OutputError: the folder exists and ``force`` is not set, or cannot be written.
            VerificationError: the written checkpoint does not load cleanly or changes nothing.
        """
        out, raw, task = Path(folder), self.raw(), self.checkpoint.raw.task
        labels = self.checkpoint.head.labels if self.checkpoint.head else ()
        config = self.student.base.config
        names = written_names(self.student, task)
        with written_aside(out, force=force) as staging:
            write_checkpoint(staging, raw, names)
            if labels and raw.library == Library.PEFT:
                _write_labels(staging, config, labels)
            verification = verify(staging, raw, self.student, labels)
            notes = list(self.report.notes)
            if raw.head and self.checkpoint.head is None:
                notes.append(f"an untrained head stands in for one that was not carried, as peft demands for {task}")
            if not verification.done:
                notes.append(f"not verified: {verification.library} is not installed")
            report = self.report.model_copy(update={"verification": verification, "notes": notes})
            write_model_card(staging, report, task, labels)
            write_json(staging / "graft.json", report.model_dump(mode="json"))
        return replace(self, report=report, folder=out)


def checkpoint_of_student(checkpoint: PeftCheckpoint, student: ModelHandle, seed: int = 0) -> RawCheckpoint:
    """A checkpoint with the student's own paths, as it will be written.

    peft demands a head in every checkpoint of a classification task, and of question answering; where none is carried,
    an untrained one of as many labels stands in.
    """
    raw = to_raw(checkpoint, student.architecture, student.base_tensors(output=checkpoint.raw.trains_output))
    if raw.head or raw.library != Library.PEFT or raw.task not in _TASKS_WITH_HEAD:
        return raw
    return replace(raw, head=fresh_head(student.base.config, raw.task, checkpoint.raw.num_labels, seed))


def written_names(model: ModelHandle, task: Task) -> StudentNames:
    """What a checkpoint for this model says about it."""
    return student_names(model.name, model.base.config, task, model.architecture)


def graft_modules(
    checkpoint: PeftCheckpoint,
    plan: TransferPlan,
    alignment: Alignment,
    method: Method,
    vocabularies: Vocabularies,
) -> tuple[dict[Site, Module], list[SiteRecord]]:
    """The student's modules: each teacher module of a site projected through its maps, then averaged; and records."""
    modules: dict[Site, Module] = {}
    records: list[SiteRecord] = []
    for site in plan.sites:
        moved: list[Module] = []
        maps: dict[Pair, Diagnostics] = {}
        for source in site.teacher:
            module = checkpoint.modules[source]
            module.check_method(method.name)
            names = {axis: map_axis(method, module, axis) for axis in _named_axes(module)}
            used = {
                axis: (space_at(source.layer, name), site.space(source, name))
                for axis, name in names.items()
                if name != VOCABULARY
            }
            found: dict[Axis, SpaceMap] = {axis: alignment.map(pair) for axis, pair in used.items()}
            found |= {axis: vocabularies.map_for(module) for axis in names.keys() - used.keys()}
            moved.append(project(module, found.__getitem__))
            maps.update({pair: alignment.diagnostics.get(pair, {}) for pair in used.values()})
        modules[site.student] = _at(site, average(moved))
        records.append(_site_record(site, checkpoint, modules[site.student], maps))
    return modules, records


def _at(site: SitePlan, module: Module) -> Module:
    """A moved module at its place in the student, its axes in the student's spaces."""
    tensors = {
        name: LabelledTensor(
            tensor.values,
            tuple(axis and replace(axis, space=site.space(module.site, axis.space).name) for axis in tensor.axes),
        )
        for name, tensor in module.tensors.items()
    }
    return replace(module, site=site.student, tensors=tensors)


def _named_axes(module: Module) -> list[Axis]:
    axes = [axis for tensor in module.tensors.values() for axis in tensor.axes if axis is not None]
    return list(dict.fromkeys(axes))


def graft_head(
    checkpoint: PeftCheckpoint, plan: TransferPlan, alignment: Alignment, student: Architecture
) -> tuple[Head | None, HeadRecord | None]:
    """The student's head and its record, None where the plan carries none."""
    if checkpoint.head is None or not plan.head:
        return None, None
    space = Space(-1, checkpoint.head.reads)
    moved = project(checkpoint.head, lambda axis: alignment.map((space, space)))
    head_form(moved, checkpoint.raw, student)
    moved, dropped = resize_inner_layer(moved, student.size(space))
    return moved, HeadRecord(
        task=moved.task,
        reads=moved.reads,
        labels=list(moved.labels) or [f"LABEL_{index}" for index in range(moved.num_labels)],
        dropped_inner_units=dropped,
        diagnostics=alignment.diagnostics.get((space, space), {}),
    )


def _write_labels(folder: Path, config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    """Label names beside the module, which peft does not store: the student's configuration as its users need it."""
    named = copy.deepcopy(config)
    set_labels(named, labels)
    named.save_pretrained(folder)


def _site_record(
    site: SitePlan, checkpoint: PeftCheckpoint, module: Module, maps: dict[Pair, Diagnostics]
) -> SiteRecord:
    strengths = {place: source.strength for place, source in checkpoint.modules.items()}
    before = sum(strengths[source] for source in site.teacher) / len(site.teacher)
    whole = sum(strength**2 for strength in strengths.values())
    return SiteRecord(
        site=str(site.student),
        teacher_sites=[str(source) for source in site.teacher],
        norm_kept=module.strength / before if before else 0.0,
        share=sum(strengths[source] ** 2 for source in site.teacher) / whole if whole else 0.0,
        maps=[
            MapRecord(space=str(second), teacher_space=str(first), diagnostics=diagnostics)
            for (first, second), diagnostics in maps.items()
        ],
    )


def refitted_records(
    records: Sequence[SiteRecord], checkpoint: PeftCheckpoint, modules: Mapping[Site, Module]
) -> list[SiteRecord]:
    """The records of modules that came by no map: their norms, and no maps."""
    by_name = {str(site): module for site, module in modules.items()}
    teachers = {str(site): module for site, module in checkpoint.modules.items()}
    found = []
    for record in records:
        before = sum(teachers[source].strength for source in record.teacher_sites) / len(record.teacher_sites)
        kept = by_name[record.site].strength / before if before else 0.0
        found.append(record.model_copy(update={"norm_kept": kept, "maps": []}))
    return found


def model_record(model: ModelHandle) -> ModelRecord:
    """What a report says about a teacher or student."""
    architecture = model.architecture
    return ModelRecord(
        name=model.name,
        model_type=architecture.model_type,
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        inferred_architecture=architecture.inferred,
        fingerprint=model.fingerprint,
    )


def pairing_record(counts: PairingCounts) -> PairingRecord:
    """What a report says about how tokens paired."""
    return PairingRecord(
        samples=counts.samples,
        pairs=counts.pairs,
        one_to_one=counts.one_to_one,
        teacher_tokens=counts.teacher_tokens,
        student_tokens=counts.student_tokens,
        teacher_share_paired=counts.paired_teacher_tokens / max(1, counts.teacher_tokens),
        student_share_paired=counts.paired_student_tokens / max(1, counts.student_tokens),
        nonfinite_pairs=counts.nonfinite_pairs,
    )
