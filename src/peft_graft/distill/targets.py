"""What the student shall answer to a text, and how far from that it is.

This is all that fitting, polishing and judging a graft know of the teacher: no label is ever used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_graft.alignment.activations import pad
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.finite import check_finite
from peft_graft.distill.training import length_batches
from peft_graft.labels import ProblemType, are_numbers
from peft_graft.models.loading import ModelHandle
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head

#: ``words``: class logits at the first token of every word; ``samples``: class logits of a whole sample; ``labels``: of
#: a whole sample the logits of labels, each of which holds or not; ``numbers``: what a regressor or reward model gives
#: a whole sample; ``spans``: of a question and a text the logits of every token to be the first, and the last, of the
#: answer; ``hidden``: the last hidden state, for modules without a head of their own.
Kind = Literal["words", "samples", "labels", "numbers", "spans", "hidden"]
#: Kinds of one answer to a sample.
WHOLE: tuple[Kind, ...] = ("samples", "labels", "numbers", "spans")
Encoded = dict[str, list[int]]
#: The logit, and the log-probability, of a token that a sample does not have: nothing, and finite.
NEVER = -1e4
#: Numbers whose variance is a smaller share of their mean square are one number.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Targets:
    """The teacher's answers to a list of samples, at places where the student can be asked the same.

    Attributes:
        kind: what was asked.
        inputs: each sample as the student reads it. spans: its token ranges [start, end) that answers belong to, one
            for each answer; unused for ``WHOLE`` kinds.
        values: for each sample [answers, classes], log-probabilities, float32; for ``labels`` [1, labels, 2], that each
            does not hold and that it does; for ``numbers`` [1, outputs], as they are; for ``spans`` [1, 2, length], of
            the first and of the last token; for ``hidden`` [answers, d_s], what the student's last hidden state should
            be.
        shift: ``hidden`` only: for each sample [answers, d_s], by how much that differs from the bare student's.
        variance: ``numbers`` only: [outputs], of the teacher's numbers.
    """

    kind: Kind
    inputs: Sequence[Encoded]
    spans: Sequence[Sequence[tuple[int, int]]]
    values: Sequence[Tensor]
    shift: Sequence[Tensor] = ()
    variance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample, as the student reads it."""
        return [len(row["input_ids"]) for row in self.inputs]

    def text(self, row: int, student: ModelHandle) -> str:
        """A sample, as the student reads it."""
        assert student.tokenizer is not None
        return str(student.tokenizer.decode(self.inputs[row]["input_ids"], skip_special_tokens=True))

    def part(self, start: int, end: int | None = None) -> Targets:
        """The samples [start, end)."""
        of = slice(start, end)
        return Targets(self.kind, self.inputs[of], self.spans[of], self.values[of], self.shift[of], self.variance)


def kind_of(head: Head | None) -> Kind:
    """What a module with this head can be asked."""
    if head is None:
        return "hidden"
    if head.task == Task.TOKEN_CLASSIFICATION:
        return "words"
    if head.task == Task.QUESTION_ANSWERING:
        return "spans"
    if are_numbers(head.problem_type, head.num_labels):
        return "numbers"
    return "labels" if head.problem_type is ProblemType.MULTI_LABEL else "samples"


def log_probabilities(logits: Tensor, kind: Kind) -> Tensor:
    """Logits [n, classes], or [n, 2, length] -> the same of log-probabilities; for ``labels`` [n, labels, 2], as
    ``Targets`` has them."""
    if kind == "labels":
        logits = torch.stack([torch.zeros_like(logits), logits], -1)
    return logits.log_softmax(-1)


def cross_entropy(given: Tensor, wanted: Tensor) -> Tensor:
    """The mean cross entropy of log-probabilities with probabilities, nats; that of an answer's labels, or of its first
    and its last token, is their sum."""
    return -(wanted * given).flatten(1).sum(-1).mean()


def varying(numbers: Tensor) -> Tensor:
    """bool [outputs]: which of numbers [n, outputs] are not always the same."""
    numbers = numbers.double()
    return numbers.var(0, correction=0) > _CONSTANT * numbers.square().mean(0)


def variance_of(numbers: Tensor) -> Tensor:
    """[outputs] of numbers [n, outputs], 1 of an output that is always the same: what squared errors are divided by."""
    found = numbers.double().var(0, correction=0)
    return torch.where(varying(numbers), found, torch.ones_like(found)).float()


def squared_error(given: Tensor, wanted: Tensor, variance: Tensor) -> Tensor:
    """The mean squared error of numbers [n, outputs] over their variance: 1 for what always gives their mean."""
    return ((given - wanted).square() / variance).mean()


def stacked(parts: Iterable[Tensor]) -> Tensor:
    """Answers [n, ...] one below another; [n, 2, length] of samples of several lengths are filled up to the longest."""
    found = list(parts)
    if found[0].ndim < 3:
        return torch.cat(found)
    longest = max(part.shape[-1] for part in found)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[-1]), value=NEVER) for part in found])


def of_spans(logits: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits [n, length, 2] of padded samples -> [n, 2, length], ``NEVER`` beyond a sample's own tokens."""
    known = torch.arange(logits.shape[1], device=logits.device) < torch.tensor(lengths, device=logits.device)[:, None]
    return logits.float().masked_fill(~known[..., None], NEVER).transpose(1, 2)


def pooled(values: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
    """[rows, length, d] -> [all spans, d], the mean over each row's spans in their order."""
    cells = [(row, column) for row, own in enumerate(spans) for start, end in own for column in range(start, end)]
    lengths = torch.tensor([end - start for own in spans for start, end in own], device=values.device)
    rows, columns = torch.tensor(cells, dtype=torch.long, device=values.device).reshape(-1, 2).unbind(1)
    found = values[rows, columns]
    if len(found) == len(lengths):  # every span is one token
        return found
    groups = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    sums = found.new_zeros(len(lengths), values.shape[-1]).index_add(0, groups, found)
    return sums / lengths[:, None].to(sums.dtype)


def student_answers(attached: AttachedModel, student: ModelHandle, targets: Targets, rows: Sequence[int]) -> Tensor:
    """The student's answers to some of the samples, logits [answers, classes] or [answers, 2, length], or [answers,
    d_s], with gradients.

    Args:
        attached: the student with its module. student: for its tokenizer.
    """
    batch = pad(student, [targets.inputs[row] for row in rows], attached.device)
    logits, state = attached.forward(batch) if targets.kind == "hidden" else attached.answer(batch)
    if targets.kind in WHOLE:
        assert logits is not None
        return (
            of_spans(logits, [len(targets.inputs[row]["input_ids"]) for row in rows])
            if targets.kind == "spans"
            else logits
        )
    values = state if targets.kind == "hidden" else logits
    assert values is not None
    return pooled(values, [targets.spans[row] for row in rows])


def answers_to(
    attached: AttachedModel, student: ModelHandle, targets: Targets, rows: Sequence[int]
) -> Iterator[tuple[list[int], Tensor]]:
    """The student's answers to some of the samples, in batches of like length: numbers of samples, and their answers
    as ``student_answers`` has them, float32 on the CPU, without gradients.

    Raises:
        NotFiniteError: one of them is not finite.
    """
    attached.model.eval()
    lengths = targets.lengths
    for batch in length_batches([lengths[row] for row in rows]):
        chosen = [rows[index] for index in batch]
        with torch.inference_mode():
            found = student_answers(attached, student, targets, chosen).float().cpu()
        counts = [len(targets.values[row]) for row in chosen]
        check_finite(found, f"student {student.name}", (targets.text(row, student) for row in chosen), counts)
        yield chosen, found


def distillation_loss(given: Tensor, targets: Targets, rows: Sequence[int]) -> Tensor:
    """How far the student's answers to some of the samples are from the teacher's, differentiable.

    For classes the cross entropy with the teacher's distribution (Hinton et al. 2015, arXiv 1503.02531), for numbers
    the squared error over their variance, for modules without a head the squared error of the last hidden state against
    the teacher's mapped one, over the shift's.
    """
    wanted = stacked(targets.values[row] for row in rows).to(given.device)
    if targets.kind == "hidden":
        shift = torch.cat([targets.shift[row] for row in rows]).to(given.device)
        return (given - wanted).square().sum() / shift.square().sum().clamp_min(1e-12)
    if targets.kind == "numbers":
        assert targets.variance is not None
        return squared_error(given, wanted, targets.variance.to(given.device))
    return cross_entropy(log_probabilities(given, targets.kind), wanted.exp())


def loss_weight(targets: Targets, rows: Sequence[int]) -> float:
    """What ``distillation_loss`` of these samples is a mean over: answers, or the squares of the shifts."""
    if targets.kind == "hidden":
        return float(sum(targets.shift[row].square().sum() for row in rows))
    return float(sum(len(targets.values[row]) for row in rows))
