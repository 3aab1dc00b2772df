"""Grafts: built from a plan and an alignment, recorded site by site, written and verified."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.tokens import PairingCounts
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, write_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.verify import verify
from peft_graft.files import write_json, written_aside
from peft_graft.models.loading import ModelHandle
from peft_graft.models.task_models import set_labels
from peft_graft.report import GraftReport, ModelRecord, PairingRecord, write_model_card

if TYPE_CHECKING:
    from transformers import PretrainedConfig


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
            if labels and raw.format == "peft":
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


def _write_labels(folder: Path, config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    """Label names beside the module, which peft does not store: the student's configuration as its users need it."""
    named = copy.deepcopy(config)
    set_labels(named, labels)
    named.save_pretrained(folder)


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
