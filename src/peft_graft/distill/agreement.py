"""How far a graft agrees with its teacher on text that nothing was fitted to or chosen by: the label-free verdict."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict, field_validator
from torch import Tensor

from peft_graft.distill.generate import Answer
from peft_graft.metrics import OfSums, interval
from peft_graft.record import Record

#: A graft this close to its teacher, in nats, is exact: it is left alone.
EXACT = 1e-6
#: A bare student this close to the teacher, in nats, has nothing to be taught.
TAUGHT = 1e-3
#: Words, and the marks between them.
WORD = re.compile(r"\w+|[^\w\s]")
NOT_MEASURED = "not measured"
Level = Literal["exact", "strong", "useful", "weak", "no better", "not measured"]
#: A level as reports before version 3 have it.
_FORMER: dict[str | None, str] = {None: NOT_MEASURED, "none": "no better"}
Interval = tuple[float, float]

#: Least agreement of each level, and what to expect of such a graft. Chance-corrected, so a graft that always gives the
#: teacher's commonest class has 0; docs/results/quality.md shows how agreement ranks the measured gains.
LEVELS: tuple[tuple[Level, float, str], ...] = (
    ("exact", 0.995, "computes what the teacher does"),
    ("strong", 0.8, "expected to keep most of the teacher's skill as it is"),
    ("useful", 0.5, "expected to be well above a module trained afresh on a few labels; some labels will still help"),
    ("weak", 0.15, "a better start than an untrained module, of little use without fine-tuning"),
    ("no better", -1.0, "expected to be no better than an untrained module"),
)


class Agreement(Record):
    """Agreement with the teacher on held-out text.

    Attributes:
        agreement: for classes Cohen's kappa of the student's and the teacher's decisions (1: always the same; 0: no
            better than chance), for labels that hold or not of all their decisions, for answers that are marked in a
            text of their first and last tokens. For numbers 1 - squared error /
            variance of the teacher's (R squared; 0: no better than their mean), the mean over outputs that vary. For
            modules without a head the share of the teacher's mapped shift of the last hidden state that the student's
            shift reproduces, 1 - squared error / squared shift.
            None where it is not defined; then ``undefined`` says why, and what to give.
        divergence: for classes the mean Kullback-Leibler divergence of the student's from the teacher's
            distribution, nats, of labels, and of the ends of answers, summed over them. For numbers, and without a
            head, 1 - agreement.
            For language models the mean divergence at strict positions, over tokens that both models know, and as
            agreement 1 - divergence / the bare student's.
        answers: words, samples, tokens or positions compared.
        agreement_interval, divergence_interval: 95 %, by drawing texts; None where nothing is judged by it.
        carried: without a head, the share of the student's last hidden state that the teacher's explains through the
            map: how much the mapped shift says about the teacher's own.
        constant: without a head, the agreement that one and the same shift everywhere would have at best.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    agreement: float | None
    divergence: float
    answers: int
    agreement_interval: Interval | None = None
    divergence_interval: Interval | None = None
    carried: float | None = None
    constant: float | None = None
    undefined: str | None = None


class GenerationAgreement(Record):
    """Agreement of greedy answers with the teacher's on held-out prompts, with 95 % intervals by drawing prompts.

    Attributes:
        agreement: (token F1 - base) / (1 - base), where base is the bare student's or that of one answer to all
            prompts, whichever is more: 0 for an idle graft and for one that always says the same, 1 for a perfect one.
            None where such a graft answers as the teacher does.
        exact: share of answers that are the teacher's, white space aside. token_f1: mean F1 of their words.
        bare_exact, bare_token_f1: the same of the student without the module. answers: how many.
        constant_token_f1: of the answer that is nearest to all of the teacher's.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    agreement: float | None
    exact: float
    token_f1: float
    bare_exact: float
    bare_token_f1: float
    answers: int
    agreement_interval: Interval | None = None
    exact_interval: Interval | None = None
    token_f1_interval: Interval | None = None
    constant_token_f1: float | None = None


class Verdict(Record):
    """What to expect of a graft, from its agreement with the teacher alone.

    Attributes:
        level, text: the conclusion in a word and in a sentence; ``not measured`` with the reason, and what to give.
        measured: the agreement of the graft as written, on text that nothing else has seen; None where not measured.
        moved: of the modules and head as moved by the maps, nothing fitted, on the same text.
        generated: of a language model's answers; the level is by these where they are known.
        seed: of the draws of the intervals.
    """

    level: Level
    text: str
    measured: Agreement | None = None
    moved: Agreement | None = None
    generated: GenerationAgreement | None = None
    seed: int = 0

    @property
    def figure(self) -> Agreement | GenerationAgreement | None:
        """What the level is by."""
        return self.generated or self.measured

    @field_validator("level", mode="before")
    @classmethod
    def _of_former_versions(cls, value: Any) -> Any:
        return _FORMER.get(value, value) if value is None or isinstance(value, str) else value


def judge(
    measured: Agreement | None,
    moved: Agreement | None = None,
    generated: GenerationAgreement | None = None,
    *,
    reason: str = "give --text to compare the graft with its teacher",
    seed: int = 0,
) -> Verdict:
    """The verdict on a graft; by what it generates where that is known, which a small divergence does not promise.

    No level is given where the interval reaches below the next lower one.

    Args:
        reason: why nothing was measured, where that is so. seed: of the intervals.
    """
    if measured is None:
        return Verdict(level=NOT_MEASURED, text=reason)
    agreement, spread, undefined = measured.agreement, measured.agreement_interval, measured.undefined
    if measured.constant is not None and agreement is not None:
        beyond = 1 - measured.constant
        agreement, spread = 1 - (1 - agreement) / beyond, spread and (1 - (1 - spread[0]) / beyond, spread[1])
    if generated is not None:
        agreement, spread, undefined = generated.agreement, generated.agreement_interval, _NOTHING_TO_TEACH
    found = {"measured": measured, "moved": moved, "generated": generated, "seed": seed}
    if agreement is None:
        return Verdict(level=NOT_MEASURED, text=undefined or "", **found)
    least = agreement if spread is None else spread[0]
    carried = measured.carried if generated is None else None
    if carried is not None and _level(carried) == len(LEVELS) - 1:
        return Verdict(level=NOT_MEASURED, text=_UNRELATED.format(max(0.0, carried)), **found)
    if carried is not None:  # of what is lost on the way the shift says nothing
        agreement = min(agreement, carried)
    level, _, text = LEVELS[max(_level(agreement), _level(least) - 1)]
    return Verdict(level=level, text=text, **found)


_UNRELATED = (
    "of the student's last hidden state the teacher's explains {:.0%}, so what the module does there says nothing "
    "about the graft; give more text, or evaluate the graft on labelled text"
)


def _level(agreement: float) -> int:
    last = len(LEVELS) - 1  # whatever is less
    return next((number for number, (_, least, _) in enumerate(LEVELS[:last]) if agreement >= least), last)


@dataclass(frozen=True)
class Draws:
    """How intervals are drawn: whole texts, those that are alike together.

    Attributes:
        groups: of every answer, a number, the same for those of texts that are alike. seed: of the draws.
    """

    groups: Sequence[int]
    seed: int = 0


def by_group(rows: Tensor, groups: Sequence[int]) -> Tensor:
    """[groups, n]: the sums of the rows [answers, n] of each group."""
    known = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([known[group] for group in groups])
    return rows.new_zeros(len(known), rows.shape[1]).index_add_(0, index, rows)


def drawn(counts: Tensor, of_sums: OfSums, seed: int) -> Interval:
    """95 % of what comes of sums of groups [groups, n] that are drawn at random."""
    return interval(counts.tolist(), of_sums, seed=seed)


def less(spread: Interval, texts: int, chance: float) -> Interval:
    """An interval for texts that all agree, from which draws see no other: the rule of three (Hanley 1983)."""
    return min(spread[0], max(0.0, 1 - min(1.0, 3 / texts) / (1 - chance))), spread[1]


# ---- of generated answers --------------------------------------------------------------------------------------------

_NOTHING_TO_TEACH = (
    "the student answers the held-out prompts as the teacher does without any module, or by one answer to all of them, "
    "so nothing can be seen of the graft; give prompts of the module's task"
)


def compare_answers(
    given: Sequence[Answer],
    teacher: Sequence[Answer],
    bare: Sequence[Answer],
    groups: Sequence[int] | None = None,
    seed: int = 0,
) -> GenerationAgreement:
    """Agreement of a graft's answers with the teacher's, beside that of the student without the module.

    Args:
        groups: of the prompts, the same for those that are alike; each on its own by default. seed: of the intervals.
    """
    constant = max(teacher, key=lambda one: sum(word_f1(one, wanted) for wanted in teacher))
    figures = [
        [
            1.0,
            same_text(own, wanted),
            *(word_f1(one, wanted) for one in (own, other, constant)),
            same_text(other, wanted),
        ]
        for own, wanted, other in zip(given, teacher, bare, strict=True)
    ]
    counts = by_group(torch.tensor(figures, dtype=torch.float64), groups or range(len(figures)))
    exact, f1, bare_f1, constant_f1, bare_exact = (counts.sum(0)[1:] / len(figures)).tolist()
    base, spread = max(bare_f1, constant_f1), None
    if base < 1:
        spread = drawn(counts, _corrected_f1, seed)
        spread = less(spread, len(counts), base) if f1 == 1 else spread
    return GenerationAgreement(
        agreement=(f1 - base) / (1 - base) if base < 1 else None,
        exact=exact,
        token_f1=f1,
        bare_exact=bare_exact,
        bare_token_f1=bare_f1,
        answers=len(given),
        agreement_interval=spread,
        exact_interval=drawn(counts, lambda sums, _: sums[1] / sums[0], seed),
        token_f1_interval=drawn(counts, lambda sums, _: sums[2] / sums[0], seed),
        constant_token_f1=constant_f1,
    )


def _corrected_f1(sums: Sequence[float], _: int) -> float:
    base = max(sums[3:5])
    return (sums[2] - base) / (sums[0] - base) if base < sums[0] else 0.0


def same_text(given: Answer, wanted: Answer) -> float:
    """1 for the same answer, white space aside, else 0."""
    return float(given.text.split() == wanted.text.split())


def word_f1(given: Answer, wanted: Answer) -> float:
    """F1 of the words, and of the marks between them."""
    words, others = (Counter(WORD.findall(answer.text)) for answer in (given, wanted))
    both = words.total() + others.total()
    return 2 * (words & others).total() / both if both else 1.0


def compare_divergences(
    divergences: Sequence[float], bare: Sequence[float], sizes: Sequence[int], draws: Draws | None = None
) -> Agreement:
    """Agreement of next-token distributions: 0 for a student without a module, 1 for one that speaks as the teacher.

    Args:
        divergences, bare: of each answer, with the module and without, summed over positions, nats.
        sizes: positions of each answer. draws: as for ``compare``.
    """
    rows = torch.tensor([sizes, divergences, bare], dtype=torch.float64).T
    size, own, before = rows.sum(0).tolist()
    taught = size > 0 and before / size > TAUGHT
    found = Agreement(
        agreement=1 - own / before if taught else None,
        divergence=max(0.0, own / max(1.0, size)),
        answers=int(size),
        undefined=None if taught else _NOTHING_TO_TEACH,
    )
    if draws is None or not size:
        return found
    counts = by_group(rows, draws.groups)
    spread = drawn(counts, lambda sums, _: max(0.0, sums[1] / max(1.0, sums[0])), draws.seed)
    update: dict[str, object] = {"divergence_interval": spread}
    if taught:
        update["agreement_interval"] = drawn(
            counts, lambda sums, _: 1 - sums[1] / sums[2] if sums[2] > 0 else 0.0, draws.seed
        )
    return found.model_copy(update=update)
