"""What the teacher with its module says about a text, at the places where the student can be asked the same.

This is all that fitting, polishing and judging a graft know of the teacher: no label is ever used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peft_graft.alignment.activations import pad, tokenize
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import Span, pair_tokens
from peft_graft.checkpoints.attach import LiveModule
from peft_graft.models.loading import ModelHandle
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head
from peft_graft.options import Progress

#: ``words``: class logits at the first token of every word; ``samples``: class logits of a whole sample;
#: ``hidden``: the last hidden state, for modules without a head of their own.
Kind = Literal["words", "samples", "hidden"]
Encoded = dict[str, list[int]]
MAX_LENGTH = 128

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Predictions:
    """The teacher's answers to a list of samples.

    Attributes:
        kind: what was asked.
        inputs: each sample as the student reads it. spans: its token ranges [start, end) that answers belong to, one
            for each answer; unused for ``samples``.
        targets: for each sample [answers, classes], log-probabilities, float32; for ``hidden`` [answers, d_s], what the
            student's last hidden state should be.
        shift: ``hidden`` only: for each sample [answers, d_s], by how much that differs from the bare student's.
    """

    kind: Kind
    inputs: Sequence[Encoded]
    spans: Sequence[Sequence[tuple[int, int]]]
    targets: Sequence[Tensor]
    shift: Sequence[Tensor] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def part(self, start: int, end: int | None = None) -> Predictions:
        """The samples [start, end)."""
        of = slice(start, end)
        return Predictions(self.kind, self.inputs[of], self.spans[of], self.targets[of], self.shift[of])


def kind_of(head: Head | None) -> Kind:
    """What a module with this head can be asked."""
    if head is None:
        return "hidden"
    return "words" if head.task == Task.TOKEN_CLASSIFICATION else "samples"


def predict(
    teacher: ModelHandle,
    student: ModelHandle,
    module: LiveModule,
    samples: Sequence[Sample],
    kind: Kind,
    *,
    write: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Ask the teacher.

    Args:
        teacher, student: for their tokenizers, and the bare student's hidden states.
        module: the teacher with its module inside.
        write: ``hidden`` only: takes shifts of the teacher's last hidden state [n, d_t] to the student's [n, d_s].
    """
    inputs_t, spans_t = tokenize(teacher, samples, MAX_LENGTH)
    inputs_s, spans_s = tokenize(student, samples, MAX_LENGTH)
    places_t, places_s = [], []
    for row, sample in enumerate(samples):
        pair = _places(kind, sample, spans_t[row], spans_s[row])
        places_t.append(pair[0])
        places_s.append(pair[1])
    done = 0
    targets: list[Tensor] = [torch.empty(0)] * len(samples)
    shift: list[Tensor] = [torch.empty(0)] * len(samples) if kind == "hidden" else []
    with torch.inference_mode():
        for rows in batches([len(row["input_ids"]) for row in inputs_t]):
            batch = pad(teacher, [inputs_t[row] for row in rows], module.device)
            logits, state = module.forward(batch)
            bare = module.forward(batch, module=False)[1] if kind == "hidden" else None
            for index, row in enumerate(rows):
                if kind == "samples":
                    assert logits is not None
                    targets[row] = logits[index : index + 1].float().log_softmax(-1).cpu()
                elif kind == "words":
                    assert logits is not None
                    targets[row] = pooled(logits[index], places_t[row]).float().log_softmax(-1).cpu()
                else:
                    assert bare is not None
                    assert write is not None
                    shift[row] = write(pooled(state[index] - bare[index], places_t[row]).float().cpu())
            done += len(rows)
            if progress:
                progress("asking the teacher", done, len(samples))
        if kind == "hidden":
            for rows in batches([len(row["input_ids"]) for row in inputs_s]):
                batch = pad(student, [inputs_s[row] for row in rows], student.device)
                state = student.base(**batch).last_hidden_state
                for index, row in enumerate(rows):
                    targets[row] = pooled(state[index], places_s[row]).float().cpu() + shift[row]
    # Tensors made in inference mode cannot take part in training.
    clone = [value.clone() for value in targets]
    return Predictions(kind, inputs_s, places_s, clone, [value.clone() for value in shift])


def batches(lengths: Sequence[int], size: int = 32, seed: int | None = None) -> Iterator[list[int]]:
    """Rows in batches of like length, so that little is padded; with a seed in random order."""
    order = list(range(len(lengths)))
    if seed is None:
        order.sort(key=lengths.__getitem__)
        yield from (order[start : start + size] for start in range(0, len(order), size))
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    groups = [sorted(order[at : at + 8 * size], key=lengths.__getitem__) for at in range(0, len(order), 8 * size)]
    chunks = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
    yield from (chunks[index] for index in torch.randperm(len(chunks), generator=generator).tolist())


def pooled(values: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """[length, d] -> [spans, d], the mean over each span."""
    if not spans:
        return values[:0]
    return torch.stack([values[start:end].mean(0) for start, end in spans])


def answers(live: LiveModule, student: ModelHandle, predictions: Predictions, rows: Sequence[int]) -> Tensor:
    """The student's answers to some of the samples, [answers, classes] logits or [answers, d_s], with gradients."""
    batch = pad(student, [predictions.inputs[row] for row in rows], live.device)
    logits, state = live.forward(batch)
    if predictions.kind == "samples":
        assert logits is not None
        return logits
    values = state if predictions.kind == "hidden" else logits
    assert values is not None
    if predictions.kind == "words":  # every span is one token
        row_index = [index for index, row in enumerate(rows) for _ in predictions.spans[row]]
        columns = [start for row in rows for start, _ in predictions.spans[row]]
        return values[row_index, columns]
    return torch.cat([pooled(values[index], predictions.spans[row]) for index, row in enumerate(rows)])


def distillation_loss(given: Tensor, predictions: Predictions, rows: Sequence[int]) -> Tensor:
    """How far the student's answers to some of the samples are from the teacher's, differentiable.

    For classes the cross entropy with the teacher's distribution (Hinton et al. 2015, arXiv 1503.02531), for modules
    without a head the squared error of the last hidden state against the teacher's mapped one, over the shift's.
    """
    targets = torch.cat([predictions.targets[row] for row in rows]).to(given.device)
    if predictions.kind == "hidden":
        shift = torch.cat([predictions.shift[row] for row in rows]).to(given.device)
        return (given - targets).square().sum() / shift.square().sum().clamp_min(1e-12)
    return -(targets.exp() * given.log_softmax(-1)).sum(-1).mean()


def _places(
    kind: Kind, sample: Sample, teacher: Sequence[Span | None], student: Sequence[Span | None]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Token ranges of both models that belong together."""
    if kind == "samples":
        return [], []
    if kind == "hidden":
        blocks = pair_tokens(teacher, student)
        return (
            [(block.teacher_start, block.teacher_end) for block in blocks],
            [(block.student_start, block.student_end) for block in blocks],
        )
    return word_places(sample, teacher, student)


def word_places(
    sample: Sample, teacher: Sequence[Span | None], student: Sequence[Span | None]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The first token [start, end) of every word in both models, for words that a token of each begins with."""
    first_t, first_s = _first_tokens(teacher), _first_tokens(student)
    starts = [(segment, match.start()) for segment, text in enumerate(sample.texts) for match in _WORD.finditer(text)]
    shared = [start for start in starts if start in first_t and start in first_s]
    return (
        [(first_t[start], first_t[start] + 1) for start in shared],
        [(first_s[start], first_s[start] + 1) for start in shared],
    )


def _first_tokens(spans: Sequence[Span | None]) -> dict[tuple[int, int], int]:
    """(segment, character) -> the first token that starts there."""
    found: dict[tuple[int, int], int] = {}
    for index, span in enumerate(spans):
        if span is not None:
            found.setdefault((span.segment, span.start), index)
    return found
