"""How far a graft agrees with its teacher on text that nothing was fitted to: the label-free score, and the verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.generate import Answer
from peft_graft.distill.targets import Kind, Targets, student_answers
from peft_graft.distill.training import length_batches
from peft_graft.models.loading import ModelHandle
from peft_graft.record import Record

#: A graft this close to its teacher, in nats, is exact: it is left alone.
EXACT = 1e-6
#: Words, and the marks between them.
WORD = re.compile(r"\w+|[^\w\s]")
Level = Literal["exact", "strong", "useful", "weak", "none"]

#: Least agreement of each level, and what to expect of such a graft. Chance-corrected, so a graft that always gives the
#: teacher's commonest class has 0; docs/results/quality.md shows how agreement ranks the measured gains.
LEVELS: tuple[tuple[Level, float, str], ...] = (
    ("exact", 0.995, "computes what the teacher does"),
    ("strong", 0.8, "expected to keep most of the teacher's skill as it is"),
    ("useful", 0.5, "expected to be well above a fresh module; some labelled examples will still help"),
    ("weak", 0.15, "a better start than a fresh module, of little use without fine-tuning"),
    ("none", -1.0, "expected to be no better than a fresh module"),
)


class Agreement(Record):
    """Agreement with the teacher on held-out text.

    Attributes:
        agreement: for classes Cohen's kappa of the student's and the teacher's decisions (1: always the same; 0: no
            better than chance). For modules without a head the share of the teacher's mapped shift of the last hidden
            state that the student's shift reproduces, 1 - squared error / squared shift.
        divergence: for classes the mean Kullback-Leibler divergence of the student's from the teacher's
            distribution, nats. Without a head 1 - agreement.
            For prompts the mean divergence at strict positions, over tokens that both models know, and as agreement
            1 - divergence / the bare student's.
        answers: words, samples, tokens or positions compared.
    """

    agreement: float
    divergence: float
    answers: int


class GenerationAgreement(Record):
    """Agreement of greedy answers with the teacher's on held-out prompts.

    Attributes:
        agreement: (token F1 - the bare student's) / (1 - the bare student's): 0 for an idle graft, 1 for a perfect one.
        exact: share of answers that are the teacher's, white space aside. token_f1: mean F1 of their words.
        bare_exact, bare_token_f1: the same of the student without the module. answers: how many.
    """

    agreement: float
    exact: float
    token_f1: float
    bare_exact: float
    bare_token_f1: float
    answers: int


class Verdict(Record):
    """What to expect of a graft, from its agreement with the teacher alone.

    Attributes:
        level, text: the conclusion in a word and in a sentence.
        measured: the agreement of the graft as written; None where no text was given to measure on.
        moved: of the modules and head as moved by the maps, nothing fitted; None where not measured.
    """

    level: Level | None
    text: str
    measured: Agreement | None = None
    moved: Agreement | None = None
    generated: GenerationAgreement | None = None


def judge(
    measured: Agreement | None, moved: Agreement | None = None, generated: GenerationAgreement | None = None
) -> Verdict:
    """The verdict on a graft; by what it generates where that is known, which a small divergence does not promise."""
    if measured is None:
        return Verdict(level=None, text="not measured: give --text to compare the graft with its teacher")
    agreement = measured.agreement if generated is None else generated.agreement
    level, _, text = next(entry for entry in LEVELS if agreement >= entry[1] or entry[0] == "none")
    return Verdict(level=level, text=text, measured=measured, moved=moved, generated=generated)


def compare_answers(given: Sequence[Answer], teacher: Sequence[Answer], bare: Sequence[Answer]) -> GenerationAgreement:
    """Agreement of a graft's answers with the teacher's, beside that of the student without the module."""
    exact, f1 = _same(given, teacher), _word_f1(given, teacher)
    own_exact, own_f1 = _same(bare, teacher), _word_f1(bare, teacher)
    corrected = (f1 - own_f1) / (1 - own_f1) if own_f1 < 1 else float(f1 == 1)
    return GenerationAgreement(
        agreement=corrected, exact=exact, token_f1=f1, bare_exact=own_exact, bare_token_f1=own_f1, answers=len(given)
    )


def _same(given: Sequence[Answer], wanted: Sequence[Answer]) -> float:
    pairs = zip(given, wanted, strict=True)
    return sum(first.text.split() == second.text.split() for first, second in pairs) / max(1, len(given))


def _word_f1(given: Sequence[Answer], wanted: Sequence[Answer]) -> float:
    """Mean F1 of the words, and of the marks between them, of each answer."""
    total = 0.0
    for first, second in zip(given, wanted, strict=True):
        words, others = (Counter(WORD.findall(answer.text)) for answer in (first, second))
        both = words.total() + others.total()
        total += 2 * (words & others).total() / both if both else 1.0
    return total / max(1, len(given))


def compare(given: Tensor, targets: Tensor, kind: Kind, shift: Tensor | None = None) -> Agreement:
    """Agreement of answers [n, classes] logits with targets [n, classes] log-probabilities (``hidden``: [n, d_s])."""
    if kind == "hidden":
        assert shift is not None
        error = float((given - targets).double().square().sum() / shift.double().square().sum().clamp_min(1e-30))
        return Agreement(agreement=1 - error, divergence=error, answers=len(targets))
    student = given.double().log_softmax(-1)
    teacher = targets.double()
    divergence = float((teacher.exp() * (teacher - student)).sum(-1).mean())
    chosen, wanted = student.argmax(-1), teacher.argmax(-1)
    classes = targets.shape[1]
    same = float((chosen == wanted).double().mean())
    shares = [torch.bincount(side, minlength=classes).double() / len(targets) for side in (chosen, wanted)]
    chance = float(shares[0] @ shares[1])
    kappa = (same - chance) / (1 - chance) if chance < 1 else float(same == 1)
    return Agreement(agreement=kappa, divergence=max(0.0, divergence), answers=len(targets))


def measure(attached: AttachedModel, student: ModelHandle, held_out: Targets) -> Agreement:
    """Agreement of a student with a module inside with the teacher on held-out text.

    Args:
        student: for its tokenizer.
    """
    given, order = [], []
    attached.model.eval()
    with torch.inference_mode():
        for rows in length_batches(held_out.lengths):
            given.append(student_answers(attached, student, held_out, rows).float().cpu())
            order.extend(rows)
    values = torch.cat([held_out.values[row] for row in order])
    shift = torch.cat([held_out.shift[row] for row in order]) if held_out.shift else None
    return compare(torch.cat(given), values, held_out.kind, shift)
