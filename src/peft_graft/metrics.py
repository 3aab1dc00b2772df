"""How well generated answers agree with references: one registry of scores, each over a whole list of answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peft_graft.errors import GraftError, not_installed

#: What an answer may be compared with: one text, or several of which the best counts.
References = Sequence["str | Sequence[str]"]
Score = Callable[[Sequence[str], Sequence[Sequence[str]]], float]
#: Numbers of each answer, as many of every one.
Counts = Callable[[Sequence[str], Sequence[Sequence[str]]], list[tuple[float, ...]]]
#: From the sums of such numbers, and how many answers there are, to a score.
OfSums = Callable[[Sequence[float], int], float]
_PUNCTUATION = re.compile(r"[^\w\s]|_")
#: The same but for the signs and the points of numbers, by which labels may differ.
_BESIDE_NUMBERS = re.compile(r"(?!(?<!\w)-(?=\.?\d)|(?<=\d)\.(?=\d))(?:[^\w\s]|_)")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")
_NOT_JSON = object()
#: Of the draws of an interval; and what share of them it holds.
_DRAWS, _INSIDE = 1000, 0.95
#: Answers that are drawn at a time: few enough for a processor's cache.
_AT_A_TIME = 1 << 17


@dataclass(frozen=True)
class Metric:
    """A way of scoring answers.

    Attributes:
        name: as in study files and tables.
        function: from n answers and the references of each, at least one, to a number.
        more_is_better: whether a greater number is a better one.
        counts, of_sums: numbers of each answer, and the score that their sums make; None where it is not made so.
    """

    name: str
    function: Score
    more_is_better: bool = True
    counts: Counts | None = None
    of_sums: OfSums | None = None

    @property
    def is_built_in(self) -> bool:
        """Whether it is this module's own, and so computes the same wherever this version runs."""
        return (self.counts or self.function).__module__ == __name__


METRICS: dict[str, Metric] = {}


def register_metric(name: str, *, more_is_better: bool = True) -> Callable[[Score], Score]:
    """Decorator: score answers by this function under a name. See ``Metric`` for what it takes and gives."""

    def register(function: Score) -> Score:
        METRICS[name] = Metric(name, function, more_is_better)
        return function

    return register


def register_counts(name: str, of_sums: OfSums) -> Callable[[Counts], Counts]:
    """Decorator: score answers by what the sums of this function's numbers make, so that there can be intervals."""

    def register(counts: Counts) -> Counts:
        def function(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
            return of_sums([sum(column) for column in zip(*counts(answers, references), strict=True)], len(answers))

        METRICS[name] = Metric(name, function, True, counts, of_sums)
        return counts

    return register


def interval(counts: Sequence[Sequence[float]], of_sums: OfSums, *, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of the scores of as many answers, drawn from these with replacement.

    Args:
        counts: numbers of each answer. of_sums: see ``Metric``. seed: of the draws.
    """
    values, draw = np.asarray(counts, dtype=np.float64), np.random.default_rng(seed)
    count = len(values)
    found: list[float] = []
    at_a_time = max(1, _AT_A_TIME // count)
    for start in range(0, _DRAWS, at_a_time):
        rows = min(at_a_time, _DRAWS - start)
        drawn = draw.integers(count, size=(rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        found += [of_sums(sums, count) for sums in (times @ values).tolist()]
    low, high = np.quantile(found, [(1 - _INSIDE) / 2, (1 + _INSIDE) / 2])
    return float(low), float(high)


def mean(sums: Sequence[float], count: int) -> float:
    """The mean of one number of each answer, as ``OfSums``."""
    return sums[0] / count


def score_answers(name: str, answers: Sequence[str], references: References) -> float:
    """The score of answers against references, from 0 to 1 by every metric of this module.

    Args:
        name: one of ``METRICS``. answers: n texts, of which any may be empty.
        references: for each answer one text or several; where there are several the best counts.

    Raises:
        GraftError: no such metric, no answers, an answer without a reference, or lists of unequal lengths.
        DependencyError: the library that the metric needs is not installed.
    """
    if name not in METRICS:
        raise GraftError("no such metric", expected=", ".join(METRICS), found=name)
    if len(answers) != len(references):
        found = f"{len(answers)} answers and {len(references)} lists of references"
        raise GraftError("answers and references differ in number", where=name, found=found)
    if not answers:
        raise GraftError("there is no answer to score", where=name)
    several = [[given] if isinstance(given, str) else list(given) for given in references]
    for number, given in enumerate(several):
        if not given:
            raise GraftError("an answer has no reference", where=f"{name}, answer {number}")
    return METRICS[name].function(answers, several)


# ---- of whole answers ------------------------------------------------------------------------------------------------


@register_counts("exact", mean)
def exact(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Share of answers that equal a reference, but for white space; as JSON where both are JSON."""
    return [
        (float(any(_equal(answer, reference) for reference in given)),)
        for answer, given in zip(answers, references, strict=True)
    ]


@register_counts("accuracy", mean)
def accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Share of answers in which the label that comes first is a reference's; labels are all texts that are references.

    Case and punctuation do not matter, but for a number's minus and point; labels are found as whole words, and of two
    that begin together the longer one counts.
    """
    right = [{_plain(reference, _BESIDE_NUMBERS) for reference in given} for given in references]
    labels = sorted(set().union(*right) - {""}, key=len, reverse=True)
    if not labels:
        raise GraftError("no reference is a label", where="accuracy", expected="words")
    any_label = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, labels))})(?![\w.])")
    found = [any_label.search(_plain(answer, _BESIDE_NUMBERS)) for answer in answers]
    return [(float(label is not None and label[0] in given),) for label, given in zip(found, right, strict=True)]


def _equal(answer: str, reference: str) -> bool:
    if _collapsed(answer) == _collapsed(reference):
        return True
    first, second = _parsed(answer), _parsed(reference)
    return first is not _NOT_JSON and second is not _NOT_JSON and bool(_comparable(first) == _comparable(second))


def _comparable(value: Any) -> Any:
    """A JSON value that equals another where JSON says so: Python holds ``True`` to be 1."""
    if isinstance(value, dict):
        return {key: _comparable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_comparable(inner) for inner in value]
    if isinstance(value, bool):
        return (value,)
    return _collapsed(value) if isinstance(value, str) else value


# ---- of JSON ---------------------------------------------------------------------------------------------------------


def _f1_of_sums(sums: Sequence[float], count: int) -> float:
    return f1(*sums)


@register_counts("json-f1", _f1_of_sums)
def json_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Micro F1 over the keys and values of JSON objects, all answers' together.

    A pair is the path of keys to a value and the value, as text without spare white space; the order of a list does not
    matter. An answer that is no JSON object or list has no pair.

    Raises:
        GraftError: no reference has a pair.
    """
    found: list[tuple[float, ...]] = []
    for answer, alternatives in zip(answers, references, strict=True):
        own = Counter(_pairs_of(answer))
        candidates = [Counter(_pairs_of(reference)) for reference in alternatives]
        best = max(candidates, key=lambda pairs: f1((own & pairs).total(), own.total(), pairs.total()))
        found.append(((own & best).total(), own.total(), best.total()))
    if not any(wanted for *_, wanted in found):
        raise GraftError("no reference is a JSON object with a value", where="json-f1", found=references[0][0][:80])
    return found


def _pairs_of(text: str) -> list[tuple[tuple[str, ...], str]]:
    value = _parsed(text)
    return list(_pairs(value)) if isinstance(value, dict | list) and value else []


def _pairs(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _pairs(inner, (*path, key))
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _pairs(inner, (*path, "[]"))
    elif isinstance(value, str):
        yield path, _collapsed(value)
    else:
        whole = isinstance(value, float) and value.is_integer()
        yield path, json.dumps(int(value) if whole else value)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NOT_JSON


# ---- of words --------------------------------------------------------------------------------------------------------


@register_counts("token-f1", mean)
def token_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Mean F1 over the words of an answer and a reference, as SQuAD counts: without case, punctuation and articles."""

    def one(answer: str, reference: str) -> float:
        own, other = (Counter(words_of(text)) for text in (answer, reference))
        return f1((own & other).total(), own.total(), other.total()) if own or other else 1.0

    return [(max(one(answer, text) for text in given),) for answer, given in zip(answers, references, strict=True)]


@register_counts("rouge", mean)
def rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """Mean F1 of the longest common subsequence of words (ROUGE-L of rouge-score, without stemming).

    Words are of letters and digits of every script; of those of ASCII the score is what rouge-score's own words give.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise not_installed("rouge-score", "evaluate") from error

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text.lower())

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return [
        (max(float(scorer.score(reference, answer)["rougeL"].fmeasure) for reference in given),)
        for answer, given in zip(answers, references, strict=True)
    ]


def _bleu_of_sums(sums: Sequence[float], count: int) -> float:
    from sacrebleu import BLEU

    numbers = [round(value) for value in sums]
    orders = (len(numbers) - 2) // 2
    found = BLEU.compute_bleu(numbers[2 : 2 + orders], numbers[2 + orders :], *numbers[:2], smooth_method="exp")
    return min(1.0, float(found.score) / 100)


@register_counts("bleu", _bleu_of_sums)
def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """BLEU of the whole list of answers (sacrebleu with its usual tokens and smoothing), from 0 to 1."""
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise not_installed("sacrebleu", "evaluate") from error
    scorer = BLEU(effective_order=True)  # which changes no count, and says that scores of one answer are not asked for
    each = [scorer.sentence_score(answer, list(given)) for answer, given in zip(answers, references, strict=True)]
    return [(found.sys_len, found.ref_len, *found.counts, *found.totals) for found in each]


# ---- what they share -------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """What SQuAD compares of an answer: its words without case, punctuation and articles."""
    return _ARTICLES.sub(" ", _plain(text)).split()


def f1(right: float, given: float, wanted: float) -> float:
    """F1 from how many are right, are given and are wanted; 0 where none is."""
    return 2 * right / (given + wanted) if right else 0.0


def _collapsed(text: str) -> str:
    return " ".join(text.split())


def _plain(text: str, punctuation: re.Pattern[str] = _PUNCTUATION) -> str:
    """In lower case, without punctuation and spare white space."""
    return _collapsed(punctuation.sub("", text.lower()))
