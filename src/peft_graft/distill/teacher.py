"""Asking the teacher: what it says with its module about a text that nobody has labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_graft.alignment.activations import pad, tokenize
from peft_graft.alignment.maps import SpaceMap
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import Span, pair_tokens
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import WORD, Agreement, measure
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.targets import Encoded, Kind, Targets, distillation_loss, kind_of, pooled, student_answers
from peft_graft.distill.training import length_batches
from peft_graft.environment import version_of
from peft_graft.errors import DependencyError, TextError
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spaces import TOKENS_OUT, Space
from peft_graft.planning.checks import asking_option, asks_teacher
from peft_graft.run import Run

#: Samples that are looked at beyond the alignment: to judge, fit and polish.
POOL = 20_000
#: Samples that judge, at most and at least, and their share of a short text; samples that a head is fitted to.
HELD_OUT, LEAST_HELD_OUT, _HELD_OUT_SHARE, FIT = 300, 10, 5, 1500
#: Samples with which the teacher can be asked, at least.
LEAST_SAMPLES = LEAST_HELD_OUT * _HELD_OUT_SHARE
MAX_LENGTH = 128
#: The space of the last hidden state.
TOKENS = Space(-1, TOKENS_OUT)

#: Tokens [start, end) of a sample.
Place = tuple[int, int]

_STAGE = "asking the teacher"


@dataclass(frozen=True)
class TextDistillation(Distillation):
    """The teacher's classes, or hidden states, on unlabelled text.

    Attributes:
        samples: the text of ``train``.
        train: to be learned from. held_out: to be judged by; nothing is ever fitted or trained on it.
    """

    samples: Sequence[Sample]
    train: Targets
    held_out: Targets

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample that can be learned from, as the student reads it."""
        return self.train.lengths

    def loss(self, attached: AttachedModel, rows: Sequence[int], done: float = 0.0) -> Tensor:
        """``targets.distillation_loss`` on some of the samples."""
        given = student_answers(attached, self.models.student, self.train, rows).float()
        return distillation_loss(given, self.train, rows)

    def measure(self, attached: AttachedModel) -> Agreement:
        """How the student with a module agrees with the teacher on the held-out text."""
        return measure(attached, self.models.student, self.held_out)


def ask_teacher(
    checkpoint: PeftCheckpoint,
    models: ModelPair,
    pool: Sequence[Sample],
    run: Run,
    *,
    train: int,
    shift_map: SpaceMap | None = None,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
) -> TextDistillation:
    """Ask the teacher about a text.

    Args:
        checkpoint: the teacher's module and, where it shall be carried, its head.
        pool: the text. The first ``held_out_size(len(pool))`` samples judge, the next ``train`` are learned from;
            sentence pairs, where there are fewer, are learned from the other way round too.
        shift_map: the map of the last hidden state from teacher to student, needed for modules without a head.
        bf16: forward passes in mixed precision. gradient_checkpointing: see ``Distillation``.
    """
    judging = held_out_size(len(pool))
    chosen = list(pool[: judging + train])
    lacking = judging + train - len(chosen)
    chosen += [Sample(pair.second, pair.first) for pair in chosen[judging:] if pair.second is not None][:lacking]
    labels = checkpoint.head.labels if checkpoint.head else ()
    with run.stage(_STAGE):
        teacher = attach(checkpoint.raw, models.teacher, labels, bf16=bf16)
        write = (lambda shift: shift_map.apply(shift, 1, "write")) if shift_map else None
        found = _targets(models, teacher, chosen, kind_of(checkpoint.head), write, run)
    return TextDistillation(
        models,
        teacher,
        labels,
        bf16,
        chosen[judging:],
        found.part(judging),
        found.part(0, judging),
        gradient_checkpointing=gradient_checkpointing,
    )


def can_ask(config: GraftConfig, library: str, samples: int) -> tuple[bool, list[str]]:
    """Whether the teacher can be run on the text, and remarks if not.

    Args:
        library: of the teacher's module. samples: how many there are; a count beyond what is needed will do.

    Raises:
        DependencyError: what the config says needs the teacher's answers, and its module's library is not installed.
        TextError: it needs them, and there is too little text.
    """
    needed = asks_teacher(config)
    if not samples:
        return False, []
    if version_of(library) is None:
        if needed:
            raise DependencyError(
                f"{library} is not installed, so the teacher cannot be asked",
                where=asking_option(config),
                fix="pip install 'peft-graft[adapters]'",
            )
        return False, [f"neither fitted nor judged: {library} is not installed, so the teacher could not be asked"]
    if held_out_size(samples) < LEAST_HELD_OUT:
        if needed:
            raise TextError(
                "too few samples to learn from and be judged by",
                where="--text",
                expected=f"at least {LEAST_SAMPLES}",
                found=samples,
            )
        return False, [f"neither fitted nor judged: {samples} samples of text are too few"]
    return True, []


def held_out_size(samples: int) -> int:
    """How many of the samples judge."""
    return min(HELD_OUT, samples // _HELD_OUT_SHARE)


def _targets(
    models: ModelPair,
    teacher: AttachedModel,
    samples: Sequence[Sample],
    kind: Kind,
    write: Callable[[Tensor], Tensor] | None,
    run: Run,
) -> Targets:
    """The teacher's answers.

    Args:
        write: ``hidden`` only: takes shifts of the teacher's last hidden state [n, d_t] to the student's [n, d_s].
    """
    inputs_t, spans_t = tokenize(models.teacher, samples, MAX_LENGTH)
    inputs_s, spans_s = tokenize(models.student, samples, MAX_LENGTH)
    places_t, places_s = [], []
    for row, sample in enumerate(samples):
        pair = _places(kind, sample, spans_t[row], spans_s[row])
        places_t.append(pair[0])
        places_s.append(pair[1])
    done = 0
    values: list[Tensor] = [torch.empty(0)] * len(samples)
    shift: list[Tensor] = [torch.empty(0)] * len(samples) if kind == "hidden" else []
    with torch.inference_mode():
        for rows in length_batches([len(row["input_ids"]) for row in inputs_t]):
            batch = pad(models.teacher, [inputs_t[row] for row in rows], teacher.device)
            logits, state = teacher.forward(batch)
            bare = teacher.forward(batch, module=False)[1] if kind == "hidden" else None
            for index, row in enumerate(rows):
                if kind == "samples":
                    assert logits is not None
                    values[row] = logits[index : index + 1].float().log_softmax(-1).cpu()
                elif kind == "words":
                    assert logits is not None
                    values[row] = pooled(logits[index], places_t[row]).float().log_softmax(-1).cpu()
                else:
                    assert bare is not None
                    assert write is not None
                    shift[row] = write(pooled(state[index] - bare[index], places_t[row]).float().cpu())
            done += len(rows)
            run.progress(_STAGE, done, len(samples))
        if kind == "hidden":
            values = [own + by for own, by in zip(_bare_states(models.student, inputs_s, places_s), shift, strict=True)]
    # Tensors made in inference mode cannot take part in training.
    clone = [value.clone() for value in values]
    return Targets(kind, inputs_s, places_s, clone, [value.clone() for value in shift])


def _bare_states(student: ModelHandle, inputs: Sequence[Encoded], places: Sequence[Sequence[Place]]) -> list[Tensor]:
    """The last hidden states of the student without a module, at its places of every sample."""
    found: list[Tensor] = [torch.empty(0)] * len(inputs)
    for rows in length_batches([len(row["input_ids"]) for row in inputs]):
        state = student.base(**pad(student, [inputs[row] for row in rows], student.device)).last_hidden_state
        for index, row in enumerate(rows):
            found[row] = pooled(state[index], places[row]).float().cpu()
    return found


def _places(
    kind: Kind, sample: Sample, teacher: Sequence[Span | None], student: Sequence[Span | None]
) -> tuple[list[Place], list[Place]]:
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
) -> tuple[list[Place], list[Place]]:
    """The first token [start, end) of every word in both models, for words that a token of each begins with."""
    first_t, first_s = _first_tokens(teacher), _first_tokens(student)
    starts = [(segment, match.start()) for segment, text in enumerate(sample.texts) for match in WORD.finditer(text)]
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
