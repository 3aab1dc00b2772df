"""What is exported: a module and the model that it is on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import last_state
from peft_graft.checkpoints.library import in_library
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.checkpoints.verify import probe
from peft_graft.config import Library
from peft_graft.errors import VerificationError
from peft_graft.models.loading import ModelHandle
from peft_graft.models.tasks import Task
from peft_graft.record import Record


class Comparison(Record):
    """How what was written answers a probe batch, beside the module as it was.

    ``lost``: of what the module changes in the model's outputs, the part that is gone: the norm of the difference in
    proportion to that of the change. ``same_choices``: share of the places with the same likeliest token or class, None
    for a model without logits.
    """

    lost: float
    same_choices: float | None


@dataclass(frozen=True)
class Subject:
    """A module and its base.

    Attributes:
        name: as the user gave it. raw: the module with its base's own paths. folder: where it lies.
        base: described from its configuration alone until it is needed. labels: of the head's classes.
        system, format, template_args: the system message, the format (None for the chat template) and the arguments of
            the chat template that the module was moved with.
    """

    name: str
    raw: RawCheckpoint
    base: ModelHandle
    labels: tuple[str, ...] = ()
    folder: Path | None = None
    system: str | None = None
    format: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def checkpoint(self) -> PeftCheckpoint:
        """The module tied to the sites of its base."""
        tensors = self.base.base_tensors(output=self.raw.trains_output)
        found = resolve(self.raw, self.base.architecture, tensors)
        return replace(found, raw=replace(found.raw, labels=self.labels or found.raw.labels))

    def check_library(self, library: Library) -> None:
        """Refuse what cannot be said in a library.

        Raises:
            PlanError: it is no plain LoRA, or the library has no such sites or head.
            DependencyError: the library is needed for its configuration, and not installed.
        """
        if not self.raw.needs_conversion:  # which becomes a LoRA first
            in_library(self.checkpoint, library, option="--to")

    def in_library(self, library: Library) -> RawCheckpoint:
        """The module as a checkpoint of a library, on a loaded base; as it is where it is one.

        Raises:
            PlanError, DependencyError: see ``check_library``.
        """
        if self.raw.library == library:
            return self.raw
        return checkpoint_of_student(in_library(self.checkpoint, library, option="--to"), self.base)

    @property
    def has_logits(self) -> bool:
        """Whether the base has logits with the module: by a head that comes with it, or because it speaks."""
        return bool(self.raw.head) or self.raw.task is Task.CAUSAL_LM

    def outputs(self, raw: RawCheckpoint) -> tuple[Tensor, Tensor]:
        """What the loaded base says to a probe batch with a module of its, and without."""
        attached = attach(raw, self.base, self.labels, speaks=raw.task is Task.CAUSAL_LM)
        # Modules of adapters are float32 and do not read a base's bfloat16; those of peft do.
        mixed = attached.bf16 and raw.library == Library.ADAPTERS
        with torch.autocast(attached.device.type, torch.bfloat16, enabled=mixed):
            with_module = outputs(attached.model, self.probe(attached.device), logits=self.has_logits)
            with attached.without() as bare:
                return with_module, outputs(bare, self.probe(attached.device), logits=self.has_logits)

    def probe(self, device: torch.device) -> dict[str, Tensor]:
        """A batch of random inputs."""
        return {name: value.to(device) for name, value in probe(self.base).items()}


def outputs(model: Any, batch: dict[str, Tensor], *, logits: bool) -> Tensor:
    """A model's logits in float32, or its last hidden state; of two towers what both say."""
    with torch.inference_mode():
        found = model(**batch, output_hidden_states=True)
    given = found.get("logits", found.get("start_logits")) if logits else None
    return (last_state(found) if given is None else given).float()


def compare(before: Tensor, after: Tensor, bare: Tensor, *, logits: bool, most: float, where: str) -> Comparison:
    """Compare outputs with a module as it was, as it was written, and without it.

    Args:
        logits: whether these are logits. most: the largest part of the module's effect that may be lost.
            where: for messages.

    Raises:
        VerificationError: more is lost, or the output is not finite.
    """
    effect = float((before - bare).norm())
    lost = float((after - before).norm()) / max(effect, 1e-12)
    if not lost <= most:  # also where it is no number
        raise VerificationError(
            "what was written answers otherwise than the module does",
            where=where,
            expected=f"at most {most:.0%} of what the module changes in the model's outputs lost",
            found=f"{lost:.0%}",
            fix="export it with another --dtype or a higher --max-rank, or without --drop",
        )
    same = float((after.argmax(-1) == before.argmax(-1)).float().mean()) if logits else None
    return Comparison(lost=lost, same_choices=same)
