"""What every graft learns from and is judged by: the teacher's answers, of whatever sort."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student
from peft_graft.models.devices import trainable_attention
from peft_graft.models.loading import ModelPair

if TYPE_CHECKING:
    from peft_graft.distill.agreement import Agreement


#: Texts by which the speed of models is compared.
READ = 16
#: The stage in which the teacher says what is learned.
ASKING = "asking the teacher"


@dataclass(frozen=True)
class Distillation(ABC):
    """What a graft learns from and is judged by.

    Attributes:
        models: teacher and student. teacher: the teacher with its module inside.
        labels: names of the classes, empty without a head. bf16: forward passes in mixed precision.
        samples: the text that is learned from.
        gradient_checkpointing: whether activations are computed anew in the backward pass.
    """

    models: ModelPair
    teacher: AttachedModel
    labels: tuple[str, ...]
    bf16: bool
    samples: Sequence[Sample]
    gradient_checkpointing: bool = field(default=False, kw_only=True)

    #: Whether the student needs its output layer. Rows in a batch.
    speaks: ClassVar[bool] = False
    batch_size: ClassVar[int] = 32

    def attach(self, checkpoint: PeftCheckpoint) -> AttachedModel:
        """The student with a checkpoint inside, ready to be measured and trained."""
        raw = checkpoint_of_student(checkpoint, self.models.student)
        found = attach(raw, self.models.student, self.labels, trainable=True, bf16=self.bf16, speaks=self.speaks)
        if self.gradient_checkpointing:
            name = "activation_checkpointing_enable"  # as transformers 5 calls it
            enable = getattr(found.base, name, None) or found.base.gradient_checkpointing_enable
            # What is computed anew must be computed as before, and the forward pass's attention is over by then.
            again = partial(trainable_attention, found.device, bf16=self.bf16)
            enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), again())})
        return found

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of every row that can be learned from, as the student reads it."""

    @abstractmethod
    def loss(self, attached: AttachedModel, rows: Sequence[int], done: float = 0.0) -> Tensor:
        """How far the student with a module is from the teacher on some of the rows, differentiable.

        Args:
            done: the share of the steps that are done.
        """

    @abstractmethod
    def weight(self, rows: Sequence[int]) -> float:
        """What the loss of these rows is a mean over: losses so weighted add up to that of all of them."""

    @abstractmethod
    def measure(self, attached: AttachedModel) -> Agreement:
        """How the student with a module agrees with the teacher on what grafts are chosen by."""

    @abstractmethod
    def read(self, attached: AttachedModel) -> int:
        """Let the teacher, or a student with a module, read ``READ`` of the texts that judge in one batch, to see how
        long that takes; how many they were."""

    @abstractmethod
    def judge(self, attached: AttachedModel) -> Agreement:
        """The same, with intervals, on what nothing is learned from or chosen by."""
