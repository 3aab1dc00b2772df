"""How well predicted classes, or numbers, agree with the known ones: scores whose sums over examples give intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peft_graft.errors import not_installed
from peft_graft.metrics import OfSums, f1, mean, token_f1, words_of

#: ``words``: a tag for every word; ``samples``: one class of a text; ``labels``: all labels that hold of it;
#: ``numbers``: a number of it; ``spans``: answers to a question that stand in it.
LabelKind = Literal["words", "samples", "labels", "numbers", "spans"]
#: What one example has: its tags, its class alone, its labels, its number alone, or all answers that are accepted, none
#: where there is none; what is predicted of a question is one answer, empty where that is none.
Labels = Sequence[Any]
#: Predicted and known labels of every example, and the names of all -> numbers of each example, as many of every one.
Counts = Callable[[Sequence[Labels], Sequence[Labels], Sequence[str]], list[tuple[float, ...]]]
#: A variance that is less of a mean square is none.
_ROUNDING = 1e-12
#: Tags of words that are parts of entities begin like this (IOB, IOBES, BILOU).
_INSIDE = ("B-", "I-", "E-", "S-", "L-", "U-")


@dataclass(frozen=True)
class ClassMetric:
    """A way of scoring classes, or answers, from 0 to 1, or numbers.

    Attributes:
        name: as users say it. kinds: what it scores.
        counts, of_sums: numbers of each example, and the score that their sums make.
    """

    name: str
    kinds: tuple[LabelKind, ...]
    counts: Counts
    of_sums: OfSums

    def score(self, predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> float:
        """The score of all examples.

        Args:
            predicted, known: labels of n >= 1 examples. names: of all classes.
        """
        sums = [sum(column) for column in zip(*self.counts(predicted, known, names), strict=True)]
        return self.of_sums(sums, len(known))


def default_metrics(kind: LabelKind, names: Sequence[str]) -> tuple[str, ...]:
    """What is scored where nothing is said: entities where the names of the tags show some."""
    if kind == "numbers":
        return ("pearson", "rmse")
    if kind == "spans":
        return ("exact-match", "token-f1")
    if kind == "words":
        return ("entity-f1",) if any(name.startswith(_INSIDE) for name in names) else ("accuracy",)
    return ("micro-f1", "macro-f1") if kind == "labels" else ("accuracy", "macro-f1")


def _accuracy(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Of the words, or of the texts: how many are right, and how many there are."""
    return [
        (sum(one == other for one, other in zip(given, wanted, strict=True)), len(wanted))
        for given, wanted in zip(predicted, known, strict=True)
    ]


def _exact(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Of the texts: whether all labels are right."""
    return [(float(set(given) == set(wanted)), 1.0) for given, wanted in zip(predicted, known, strict=True)]


def _micro(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Labels that are right, that are given and that are wanted."""
    return [_common(set(given), set(wanted)) for given, wanted in zip(predicted, known, strict=True)]


def _macro(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """The same of every class in turn."""
    return [
        tuple(count for name in names for count in _common({name} & set(given), {name} & set(wanted)))
        for given, wanted in zip(predicted, known, strict=True)
    ]


def _entities(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """The same of entities, as seqeval finds them."""
    try:
        from seqeval.metrics.sequence_labeling import get_entities
    except ImportError as error:
        raise not_installed("seqeval", "evaluate") from error
    return [
        _common(set(get_entities(list(given))), set(get_entities(list(wanted))))
        for given, wanted in zip(predicted, known, strict=True)
    ]


def _products(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Of each pair of numbers x, y: x, y, x^2, y^2 and x y."""
    return [(x, y, x * x, y * y, x * y) for (x,), (y,) in zip(predicted, known, strict=True)]


def _squares(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    return [((x - y) ** 2,) for (x,), (y,) in zip(predicted, known, strict=True)]


def _same_answer(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    """Whether it is an accepted answer, as SQuAD compares them."""
    return [
        (float(any(words_of(given) == words_of(wanted) for wanted in accepted or ("",))),)
        for (given,), accepted in zip(predicted, known, strict=True)
    ]


def _answer_f1(predicted: Sequence[Labels], known: Sequence[Labels], names: Sequence[str]) -> list[tuple[float, ...]]:
    return token_f1([given for (given,) in predicted], [accepted or ("",) for accepted in known])


def _common(given: set[Any], wanted: set[Any]) -> tuple[float, ...]:
    return (len(given & wanted), len(given), len(wanted))


def _share(sums: Sequence[float], count: int) -> float:
    return sums[0] / sums[1]


def _f1(sums: Sequence[float], count: int) -> float:
    return f1(*sums)


def _mean_f1(sums: Sequence[float], count: int) -> float:
    """A class that is neither given nor wanted counts 0, as for scikit-learn with ``zero_division=0``."""
    each = [f1(*sums[start : start + 3]) for start in range(0, len(sums), 3)]
    return sum(each) / len(each)


def _pearson(sums: Sequence[float], count: int) -> float:
    """0 where all numbers of one side are the same."""
    x, y, xx, yy, xy = (each / count for each in sums)
    first, second = xx - x * x, yy - y * y
    differ = first > _ROUNDING * xx and second > _ROUNDING * yy
    return (xy - x * y) / math.sqrt(first * second) if differ else 0.0


def _root_mean(sums: Sequence[float], count: int) -> float:
    return math.sqrt(sums[0] / count)


CLASS_METRICS: dict[str, ClassMetric] = {
    metric.name: metric
    for metric in (
        ClassMetric("entity-f1", ("words",), _entities, _f1),
        ClassMetric("accuracy", ("words", "samples"), _accuracy, _share),
        ClassMetric("macro-f1", ("samples", "labels"), _macro, _mean_f1),
        ClassMetric("micro-f1", ("labels",), _micro, _f1),
        ClassMetric("exact", ("labels",), _exact, _share),
        ClassMetric("exact-match", ("spans",), _same_answer, mean),
        ClassMetric("token-f1", ("spans",), _answer_f1, mean),
        ClassMetric("pearson", ("numbers",), _products, _pearson),
        ClassMetric("rmse", ("numbers",), _squares, _root_mean),
    )
}
