"""The verdict in its parts: by class, by kind of prompt, and what is answered to some of the text that judges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from peft_graft.alignment.activations import tokenize
from peft_graft.alignment.tokens import Span
from peft_graft.distill.agreement import WORD, same_text, word_f1
from peft_graft.distill.answer_spans import Answered
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.generate import Answer
from peft_graft.distill.targets import Targets, answers_to, log_probabilities
from peft_graft.distill.teacher import TextDistillation, tokens_read
from peft_graft.prompts.conversation import Prompt
from peft_graft.record import Record

#: Samples that a report shows: the first ones, and those of the others on which teacher and graft differ most.
_FIRST, _DIFFERING = 10, 10
#: Words of prompts that are short, and of those that are of middle length, at most.
_SHORT, _MIDDLE = 12, 40


class ClassCounts(Record):
    """How often the graft gives which class where the teacher gives which, on the text that judges.

    ``labels``: names of the classes. ``counts``: (the teacher's class, the graft's, how often), of what occurs.
    """

    labels: list[str]
    counts: list[tuple[int, int, int]]

    def in_words(self, what: str) -> list[str]:
        """How much is decided alike, and how much the commonest class alone would be, in a sentence each.

        Args:
            what: is decided: words or texts.
        """
        total, alike = sum(count for *_, count in self.counts), 0
        common = Counter[int]()
        for wanted, given, count in self.counts:
            common[wanted] += count
            alike += count * (wanted == given)
        label, most = common.most_common(1)[0]
        return [
            f"Of {total:,} held-out {what} it decides {alike:,} ({alike / total:.1%}) as the teacher does.",
            f"Always saying “{self.labels[label]}” would come to {most / total:.1%}: agreement is what the graft does "
            "beyond chance.",
        ]


class Decision(Record):
    """The class that each gives to a word; ``word`` is None where the whole text has one class, or one answer.

    ``bare``: by the graft's head with the module switched off, None for modules that cannot be.
    """

    word: str | None
    teacher: str
    graft: str
    bare: str | None


class DecidedText(Record):
    """A text, or a pair, that judges, and what is decided about it.

    ``divergence``: mean over its decisions, nats. ``first``: whether it is shown since it stands among the first; all
    others are shown since teacher and graft differ most on them.
    """

    texts: list[str]
    decisions: list[Decision]
    divergence: float
    first: bool


class PromptKind(Record):
    """Agreement of greedy answers to one kind of the prompts that judge (``GenerationAgreement``)."""

    kind: str
    prompts: int
    exact: float
    token_f1: float
    bare_token_f1: float


def decided(candidate: Candidate, labels: Sequence[str]) -> tuple[ClassCounts | None, list[DecidedText]]:
    """How the attached model decides the text that judges: counts, None for labels of which several may hold and for
    answers to questions, and some of the text; nothing of what gives no classes.

    Args:
        labels: names of the classes.
    """
    distillation, attached = candidate.learning
    if not isinstance(distillation, TextDistillation) or distillation.judging.kind in ("numbers", "hidden"):
        return None, []
    student, judging = distillation.models.student, distillation.judging
    given = _by_row(answers_to(attached, student, judging, range(len(judging))), judging)
    texts = _shown(candidate, distillation, given, labels)
    if judging.kind in ("labels", "spans"):
        return None, texts
    chosen, wanted = (torch.cat([side[row].argmax(-1) for row in given]) for side in (given, judging.values))
    counts = Counter(zip(wanted.tolist(), chosen.tolist(), strict=True))
    found = ClassCounts(labels=list(labels), counts=[(*pair, count) for pair, count in sorted(counts.items())])
    return found, texts


def _by_row(answers: Iterator[tuple[list[int], Tensor]], targets: Targets) -> dict[int, Tensor]:
    """Log-probabilities of every sample, as in ``Targets``."""
    found = {
        row: log_probabilities(part, targets.kind)
        for rows, values in answers
        for row, part in zip(rows, torch.split(values, [len(targets.values[row]) for row in rows]), strict=True)
    }
    if targets.kind == "spans":  # in batches they are as long as the longest
        found = {row: part[..., : targets.values[row].shape[-1]] for row, part in found.items()}
    return dict(sorted(found.items()))


def _shown(
    candidate: Candidate, distillation: TextDistillation, given: dict[int, Tensor], labels: Sequence[str]
) -> list[DecidedText]:
    judging, samples = distillation.judging, distillation.judging_samples
    divergence = {
        row: float((judging.values[row].exp() * (judging.values[row] - own)).flatten(1).sum(-1).mean())
        for row, own in given.items()
        if len(own)
    }
    first = list(divergence)[:_FIRST]
    differ = [
        row
        for row in divergence
        if row not in first and bool((given[row].argmax(-1) != judging.values[row].argmax(-1)).any())
    ]
    rows = first + sorted(differ, key=lambda row: -divergence[row])[:_DIFFERING]
    bare = _without_module(candidate, rows)
    _, spans = tokenize(distillation.models.student, [samples[row] for row in rows], tokens_read(judging.kind))
    found = []
    for row, tokens in zip(rows, spans, strict=True):
        words: list[str | None] = [None] * len(given[row])
        if judging.kind == "words":
            words = [_word_at(samples[row].texts, tokens[start]) for start, _ in judging.spans[row]]
        if judging.kind == "spans":
            named = partial(_answers, texts=samples[row].texts, tokens=tokens)
        else:
            named = partial(_classes, labels=labels)
        names = [None if side is None else named(side[row]) for side in (judging.values, given, bare)]
        nobody: list[str | None] = [None] * len(words)
        said = zip(words, *(names_of or nobody for names_of in names), strict=True)
        found.append(
            DecidedText(
                texts=list(samples[row].texts),
                decisions=[Decision(word=word, teacher=t, graft=g, bare=b) for word, t, g, b in said],
                divergence=max(0.0, divergence[row]),
                first=row in first,
            )
        )
    return found


def _answers(values: Tensor, texts: Sequence[str], tokens: Sequence[Span | None]) -> list[str]:
    """What log-probabilities [1, 2, length] mark as the answer, in quotes; or that nothing is."""
    found = Answered.of(values[0], texts, tokens, may_be_none=True).text
    return [f"“{found}”" if found else "no answer"]


def _classes(values: Tensor, labels: Sequence[str]) -> list[str]:
    """The classes that log-probabilities [answers, ...] decide for, by name."""
    return [_name_of(decision, labels) for decision in values.argmax(-1).tolist()]


def _name_of(decision: int | list[int], labels: Sequence[str]) -> str:
    """A class by its name; of labels all that hold."""
    if isinstance(decision, int):
        return labels[decision]
    return ", ".join(label for label, holds in zip(labels, decision, strict=True) if holds) or "none"


def _word_at(texts: Sequence[str], span: tuple[int, int, int] | None) -> str:
    """The word that begins where a token does."""
    assert span is not None  # answers belong to tokens of the text
    segment, start, end = span
    match = WORD.match(texts[segment], start)
    return match[0] if match else texts[segment][start:end]


def _without_module(candidate: Candidate, rows: Sequence[int]) -> dict[int, Tensor] | None:
    """The answers below the graft's head with the module switched off; None where there is no such thing."""
    distillation, _ = candidate.learning
    assert isinstance(distillation, TextDistillation)
    before = candidate.checkpoint
    if before.raw.is_virtual:  # virtual tokens are read, whatever their values
        return None
    candidate.put(replace(before, modules={site: module.neutral() for site, module in before.modules.items()}))
    try:
        judging, attached = distillation.judging, candidate.learning[1]
        if attached.is_active:  # not of a kind that can be switched off by its values
            return None
        return _by_row(answers_to(attached, distillation.models.student, judging, rows), judging)
    finally:
        candidate.put(before)


def by_kind(
    prompts: Sequence[Prompt], given: Sequence[Answer], teacher: Sequence[Answer], bare: Sequence[Answer]
) -> list[PromptKind]:
    """Agreement by the length of the prompt and by the form of the teacher's answer, of kinds that some are not of."""
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for prompt, own, wanted, other in zip(prompts, given, teacher, bare, strict=True):
        values = same_text(own, wanted), word_f1(own, wanted), word_f1(other, wanted)
        for kind in (_length_of(prompt.text), _form_of(wanted.text)):
            groups.setdefault(kind, []).append(values)
    found = []
    for kind in (*_LENGTHS, *_FORMS):
        rows = groups.get(kind, [])
        if 0 < len(rows) < len(prompts):
            exact, f1, bare_f1 = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            found.append(PromptKind(kind=kind, prompts=len(rows), exact=exact, token_f1=f1, bare_token_f1=bare_f1))
    return found


_LENGTHS = (
    f"prompts of up to {_SHORT} words",
    f"prompts of {_SHORT + 1} to {_MIDDLE} words",
    f"prompts of more than {_MIDDLE} words",
)
_FORMS = ("answered in JSON", "answered in one word", "answered in one line", "answered in several lines")


def _length_of(prompt: str) -> str:
    words = len(prompt.split())
    return _LENGTHS[0 if words <= _SHORT else 1 if words <= _MIDDLE else 2]


def _form_of(answer: str) -> str:
    try:
        if isinstance(json.loads(answer), dict | list):
            return _FORMS[0]
    except (ValueError, RecursionError):
        pass
    if len(answer.split()) <= 1:
        return _FORMS[1]
    return _FORMS[3 if "\n" in answer.strip() else 2]
