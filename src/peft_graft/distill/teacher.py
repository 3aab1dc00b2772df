"""Asking the teacher: what it says with its module about a text that nobody has labelled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from peft_graft.alignment.activations import MAX_LENGTH, pad, tokenize
from peft_graft.alignment.distinct import Parts, each_once, split
from peft_graft.alignment.maps import SpaceMap
from peft_graft.alignment.text import Sample
from peft_graft.alignment.tokens import Span, pair_tokens
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import WORD, Agreement
from peft_graft.distill.answer_spans import LONGEST, PASSAGE, moved_to, token_places
from peft_graft.distill.distillation import ASKING, READ, Distillation
from peft_graft.distill.finite import check_finite
from peft_graft.distill.predictions import measure
from peft_graft.distill.targets import (
    WHOLE,
    Encoded,
    Kind,
    Targets,
    distillation_loss,
    kind_of,
    log_probabilities,
    loss_weight,
    of_spans,
    pooled,
    student_answers,
    variance_of,
)
from peft_graft.distill.training import length_batches
from peft_graft.environment import version_of
from peft_graft.errors import GraftError, HeadError, PairingError, TextError, not_installed
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spaces import TOKENS_OUT, Space
from peft_graft.models.tasks import Task
from peft_graft.planning.checks import asking_option, asks_teacher
from peft_graft.run import Run

#: Samples that are looked at beyond the alignment: to judge, choose, fit and polish.
POOL = 20_000
#: Samples that judge, and that choose, at most; samples that a head is fitted to.
HELD_OUT, FIT = 300, 1500
#: Different samples with which the teacher can be asked, at least.
LEAST_SAMPLES = 50
#: Signs of a sample that may be read: what comes after them makes it no other.
_READ_SIGNS = 4 * MAX_LENGTH
#: The space of the last hidden state.
TOKENS = Space(-1, TOKENS_OUT)

#: Tokens [start, end) of a sample.
Place = tuple[int, int]


@dataclass(frozen=True)
class TextDistillation(Distillation):
    """The teacher's classes, or hidden states, on unlabelled text.

    Attributes:
        train: to be learned from. held_out: to choose by; nothing is ever fitted or trained on it.
        judging: to be judged by, which nothing is chosen by either. groups: of its samples, the same for those that are
            alike. judging_samples: its text. carried: see ``agreement.Agreement``. seed: of the intervals.
        own: how many of the samples to learn from are of the text; pairs the other way round follow.
    """

    train: Targets
    held_out: Targets
    judging: Targets
    groups: Sequence[int]
    carried: float | None = None
    seed: int = 0
    judging_samples: Sequence[Sample] = ()
    own: int = FIT

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample that can be learned from, as the student reads it."""
        return self.train.lengths

    def loss(self, attached: AttachedModel, rows: Sequence[int], done: float = 0.0) -> Tensor:
        """``targets.distillation_loss`` on some of the samples."""
        given = student_answers(attached, self.models.student, self.train, rows).float()
        return distillation_loss(given, self.train, rows)

    def weight(self, rows: Sequence[int]) -> float:
        """See ``Distillation``."""
        return loss_weight(self.train, rows)

    def measure(self, attached: AttachedModel) -> Agreement:
        """How the student with a module agrees with the teacher on the text that chooses."""
        return measure(attached, self.models.student, self.held_out)

    def read(self, attached: AttachedModel) -> int:
        """See ``Distillation``."""
        model = self.models.teacher if attached is self.teacher else self.models.student
        inputs, _ = tokenize(model, self.judging_samples[:READ], tokens_read(self.judging.kind))
        with torch.inference_mode():
            float(attached.forward(pad(model, inputs, attached.device))[1].sum())  # to the CPU, and so to the end
        return len(inputs)

    def judge(self, attached: AttachedModel) -> Agreement:
        """The same on the text that judges."""
        found = measure(attached, self.models.student, self.judging, self.groups, self.seed)
        return found.model_copy(update={"carried": self.carried})


def sample_parts(samples: Iterable[Sample], most: int = HELD_OUT, *, questions: bool = False) -> Parts[Sample]:
    """The first ``POOL`` samples, each once, in parts: at most ``most`` to judge and to choose, the rest to learn.

    Args:
        questions: whether the first text of a pair is a question, which may be put to many texts; then only these tell
            whether samples are alike.
    """
    pool = list(islice(samples, POOL))
    once = each_once(pool, lambda sample: sample.texts)

    def texts(sample: Sample) -> list[str]:
        return [text[:_READ_SIGNS] for text in (sample.texts[PASSAGE:] if questions else sample.texts) or sample.texts]

    return replace(split(once, texts, least=LEAST_SAMPLES, most=most), given=len(pool))


def ask_teacher(  # what is asked of whom, and how much of it; the rest is how
    checkpoint: PeftCheckpoint,
    models: ModelPair,
    parts: Parts[Sample],
    run: Run,
    *,
    train: int,
    shift_map: SpaceMap | None = None,
    config: GraftConfig | None = None,
) -> TextDistillation:
    """Ask the teacher about a text.

    Args:
        checkpoint: the teacher's module and, where it shall be carried, its head.
        parts: the text. Of what is for learning the first ``train`` samples are learned from; sentence pairs, where
            there are fewer, the other way round too, unless one is a question.
        shift_map: the map of the last hidden state from teacher to student, needed for modules without a head.
        config: its ``dtype``, ``gradient_checkpointing`` and ``seed`` count; ``GraftConfig()`` by default.

    Raises:
        ModelError: an answer is not finite. PairingError: the models read no word alike.
    """
    config = config or GraftConfig()
    bf16 = config.dtype == "bfloat16"
    held = len(parts.held_out)
    chosen = parts.held_out + parts.learning[:train]
    kind = kind_of(checkpoint.head)
    lacking, own = (0 if kind == "spans" else held + train - len(chosen)), len(chosen) - held
    chosen += [Sample(pair.second, pair.first) for pair in chosen[held:] if pair.second is not None][:lacking]
    labels = checkpoint.head.labels if checkpoint.head else ()
    judging = len(parts.judging)
    with run.stage(ASKING):
        teacher = attach(checkpoint.raw, models.teacher, labels, bf16=bf16)
        asked = _Asked(models, teacher, chosen, kind, shift_map)
        found, carried = asked.targets(run, judging)
    if not any(map(len, found.values[judging:held])):
        raise PairingError(
            "no word of the text is read alike by both models, so the student cannot be asked what the teacher is",
            where="--text",
            fix="give text in a language that both models read",
        )
    return TextDistillation(
        models,
        teacher,
        labels,
        bf16,
        chosen[held:],
        found.part(held),
        found.part(judging, held),
        found.part(0, judging),
        parts.groups,
        carried,
        config.seed,
        judging_samples=chosen[:judging],
        own=own,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def can_ask(config: GraftConfig, raw: RawCheckpoint, parts: Parts[Sample]) -> tuple[bool, list[str]]:
    """Whether the teacher can be run on the text, and remarks if not.

    Args:
        raw: the teacher's module. parts: of the text.

    Raises:
        DependencyError: what the config says needs the teacher's answers, and its module's library is not installed.
        HeadError: it needs them, and the module's head gives numbers for words.
        TextError: it needs them, and there is too little text, or none with questions where these are answered.
    """
    needed, library = asks_teacher(config), raw.library
    if not parts.given:
        return False, []
    if (
        raw.head
        and config.head != "drop"
        and (why := _not_learned(raw, parts, asking_option(config) if needed else ""))
    ):
        error, remark = why
        if needed:
            raise error
        return False, [f"neither fitted nor judged: {remark}"]
    if version_of(library) is None:
        if needed:
            raise not_installed(library, "adapters", asking_option(config), so="so the teacher cannot be asked")
        return False, [f"neither fitted nor judged: {library} is not installed, so the teacher could not be asked"]
    if not parts.judging:
        if needed:
            raise TextError(
                "too few samples to learn from and be judged by",
                where="--text",
                expected=f"at least {LEAST_SAMPLES}",
                found=_counted(parts),
                fix="give more text; what differs by case, punctuation or one word counts once",
            )
        return False, [
            f"neither fitted nor judged: {_counted(parts)} samples of text are too few; give at least {LEAST_SAMPLES}"
        ]
    repeated = parts.given - len(parts.held_out) - len(parts.learning)
    return True, [f"{repeated} of {parts.given} samples of text repeat others, and count once"] * bool(repeated)


def _not_learned(raw: RawCheckpoint, parts: Parts[Sample], option: str) -> tuple[GraftError, str] | None:
    """An error and a remark that say why what the head gives cannot be learned from this text; None where it can."""
    if raw.task is Task.TOKEN_CLASSIFICATION and raw.gives_numbers:
        error = HeadError(
            "the head gives a number for each word, which is not learned from the teacher's predictions",
            where=option,
            expected="a head that gives classes, or numbers for whole texts",
            found=raw.task,
            fix="leave the option out, or leave the head behind with --head drop",
        )
        return error, (
            "the head gives a number for each word, for which agreement is not known; score the graft by examples of "
            "your own"
        )
    samples = (*parts.held_out, *parts.learning)
    if raw.task is Task.QUESTION_ANSWERING and any(sample.second is None for sample in samples):
        lacking = "the head marks answers to questions, and the text has none"
        fix = "give columns of questions and of the texts that answer them, with --columns question,context"
        return TextError(lacking, where="--text", expected="a question and a text", fix=fix), f"{lacking}; {fix}"
    return None


def _counted(parts: Parts[Sample]) -> str:
    return str(parts.given) if parts.different == parts.given else f"{parts.different} different of {parts.given}"


@dataclass(frozen=True)
class _Asked:
    """What the teacher is asked.

    Attributes:
        kind: of what. shift_map: ``hidden`` only: takes shifts of the teacher's last hidden state to the student's.
    """

    models: ModelPair
    teacher: AttachedModel
    samples: Sequence[Sample]
    kind: Kind
    shift_map: SpaceMap | None

    def targets(self, run: Run, judging: int) -> tuple[Targets, float | None]:
        """The teacher's answers, and without a head how much the map carries on the first ``judging`` samples."""
        side, student = read_by_both(self.models, self.samples, self.kind)
        name = f"teacher {side.model.name} with its module"
        done = 0
        answers, bare = ([torch.empty(0)] * len(self.samples) for _ in range(2))
        with torch.inference_mode():
            for rows in side.batches():
                batch = side.padded(rows, self.teacher.device)
                hidden = self.kind == "hidden"
                logits, state = self.teacher.forward(batch) if hidden else self.teacher.answer(batch)
                own_state = self.teacher.forward(batch, module=False)[1] if hidden else None
                places = [side.places[row] for row in rows]
                counts = [1 if self.kind in WHOLE else len(own) for own in places]
                if own_state is not None:
                    _put(bare, rows, pooled(own_state, places), counts)
                    found = pooled(state - own_state, places)
                else:
                    assert logits is not None
                    found = logits if self.kind in WHOLE else pooled(logits, places)
                if self.kind == "spans":
                    found = of_spans(found, list(map(len, places)))
                check_finite(found, name, (_line(self.samples[row]) for row in rows), counts)
                _put(answers, rows, found, counts)
                done += len(rows)
                run.progress(ASKING, done, len(self.samples))
            shift, carried = list[Tensor](), None
            if self.shift_map is not None:
                shift = [self.shift_map.apply(answer, 1, "write") for answer in answers]
                own_states = student.bare_states(self.samples)
                values = [own + by for own, by in zip(own_states, shift, strict=True)]
                carried = _carried(torch.cat(bare[:judging]), torch.cat(own_states[:judging]), self.shift_map)
            else:
                numbers = self.kind == "numbers"
                values = answers if numbers else [log_probabilities(answer, self.kind) for answer in answers]
            if self.kind == "spans":
                read = zip(values, side.places, student.inputs, strict=True)
                values = [moved_to(own[0], places, len(row["input_ids"])) for own, places, row in read]
        # Tensors made in inference mode cannot take part in training.
        values, shift = ([value.clone() for value in part] for part in (values, shift))
        variance = variance_of(torch.cat(values)) if self.kind == "numbers" else None
        return Targets(self.kind, student.inputs, student.places, values, shift, variance), carried


def _line(sample: Sample) -> str:
    """A sample as messages quote it."""
    return " / ".join(sample.texts)


def _carried(teacher: Tensor, student: Tensor, shift_map: SpaceMap) -> float:
    """The share of the student's states [n, d_s] that the teacher's [n, d_t] explain through a map, each unit at its
    best scale."""
    mapped, own = (value.double() - value.double().mean(0) for value in (shift_map.apply(teacher, 1, "write"), student))
    along = (own * mapped).sum(0).square() / mapped.square().sum(0).clamp_min(1e-30)
    return float(along.sum() / own.square().sum().clamp_min(1e-30))


@dataclass(frozen=True)
class ReadSamples:
    """A model and the samples as it reads them: inputs, and the token ranges [start, end) that are asked about; of
    ``spans`` the teacher has ``token_places``, and the student none."""

    model: ModelHandle
    inputs: Sequence[Encoded]
    places: Sequence[Sequence[Place]]

    def batches(self) -> Iterator[list[int]]:
        """Numbers of samples in batches of like length."""
        return length_batches([len(row["input_ids"]) for row in self.inputs])

    def padded(self, rows: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """A batch."""
        return pad(self.model, [self.inputs[row] for row in rows], device)

    def bare_states(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The last hidden states of the model without a module, at its places.

        Raises:
            NotFiniteError: one of them is not finite.
        """
        found: list[Tensor] = [torch.empty(0)] * len(samples)
        for rows in self.batches():
            state = self.model.base(**self.padded(rows, self.model.device)).last_hidden_state
            places = [self.places[row] for row in rows]
            states, counts = pooled(state, places), [len(own) for own in places]
            check_finite(states, f"student {self.model.name}", (_line(samples[row]) for row in rows), counts)
            _put(found, rows, states, counts)
        return found


def read_by_both(models: ModelPair, samples: Sequence[Sample], kind: Kind) -> tuple[ReadSamples, ReadSamples]:
    """The samples as both models read them, and the token ranges of both that belong together."""
    (inputs_t, spans_t), (inputs_s, spans_s) = (
        tokenize(model, samples, tokens_read(kind)) for model in (models.teacher, models.student)
    )
    places = [_places(kind, *entry) for entry in zip(samples, spans_t, spans_s, strict=True)]
    return (
        ReadSamples(models.teacher, inputs_t, [first for first, _ in places]),
        ReadSamples(models.student, inputs_s, [second for _, second in places]),
    )


def tokens_read(kind: Kind) -> int:
    """How many tokens of a sample are read at most."""
    return LONGEST if kind == "spans" else MAX_LENGTH


def _put(found: list[Tensor], rows: Sequence[int], values: Tensor, counts: Sequence[int]) -> None:
    """A batch's answers at their samples' numbers, so many of each."""
    for row, own in zip(rows, torch.split(values.float().cpu(), list(counts)), strict=True):
        found[row] = own


def _places(
    kind: Kind, sample: Sample, teacher: Sequence[Span | None], student: Sequence[Span | None]
) -> tuple[list[Place], list[Place]]:
    """Token ranges of both models that belong together."""
    if kind == "spans":
        return token_places(teacher, student), []
    if kind in WHOLE:
        return [], []
    if kind == "hidden":
        blocks = pair_tokens(teacher, student)
        return (
            [(block.teacher_start, block.teacher_end) for block in blocks],
            [(block.student_start, block.student_end) for block in blocks],
        )
    # The first token of every word that a token of each model begins with.
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
