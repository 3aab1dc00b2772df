"""What every graft learns from and is judged by: the teacher's answers, of whatever sort."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from peft_graft.checkpoints.attach import AttachedModel, attach
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student
from peft_graft.models.loading import ModelPair

if TYPE_CHECKING:
    from peft_graft.distill.agreement import Agreement


@dataclass(frozen=True)
class Distillation(ABC):
    """What a graft learns from and is judged by.

    Attributes:
        models: teacher and student. teacher: the teacher with its module inside.
        labels: names of the classes, empty without a head. bf16: forward passes in mixed precision.
    """

    models: ModelPair
    teacher: AttachedModel
    labels: tuple[str, ...]
    bf16: bool

    #: Whether the student needs its output layer. Rows in a batch.
    speaks: ClassVar[bool] = False
    batch_size: ClassVar[int] = 32

    def attach(self, checkpoint: PeftCheckpoint) -> AttachedModel:
        """The student with a checkpoint inside, ready to be measured and trained."""
        raw = checkpoint_of_student(checkpoint, self.models.student)
        return attach(raw, self.models.student, self.labels, trainable=True, bf16=self.bf16, speaks=self.speaks)

    @property
    @abstractmethod
    def lengths(self) -> Sequence[int]:
        """Tokens of every row that can be learned from, as the student reads it."""

    @abstractmethod
    def loss(self, attached: AttachedModel, rows: Sequence[int]) -> Tensor:
        """How far the student with a module is from the teacher on some of the rows, differentiable."""

    @abstractmethod
    def measure(self, attached: AttachedModel) -> Agreement:
        """How the student with a module agrees with the teacher on what is held out."""
