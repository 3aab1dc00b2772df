"""Scores of generated answers, against values worked out by hand."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest

from peft_graft.errors import DependencyError, GraftError
from peft_graft.metrics import METRICS, Metric, interval, register_metric, score_answers

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("sacrebleu", "rouge_score"))
needs_evaluate = pytest.mark.skipif(not INSTALLED, reason="the extra evaluate is not installed")


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ("  two\n words ", "two words", True),
        ("Two words", "two words", False),
        ('{"a": 1, "b": "x  y"}', '{"b":"x y","a":1.0}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": 1}', '{"a": "1"}', False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1', '{"a": 1}', False),
        ("", "", True),
        ("", "x", False),
    ],
)
def test_exact_compares_text_but_for_white_space_and_json_by_value(answer: str, reference: str, equal: bool) -> None:
    assert score_answers("exact", [answer], [[reference]]) == equal


def test_any_reference_will_do_and_one_may_be_given_alone() -> None:
    assert score_answers("exact", ["a", "b", "c"], [["x", "a"], "b", ["d"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ('{"name": "Ada", "born": 1815}', '{"name": "Ada", "born": 1815}', 1),
        ('{"name": "Ada  ", "born": 1815.0}', '{"born": 1815, "name": "Ada"}', 1),
        ('{"name": "Ada", "born": 1816}', '{"name": "Ada", "born": 1815}', 1 / 2),
        ('{"name": "Ada"}', '{"name": "Ada", "born": 1815, "in": {"city": "London"}}', 2 / 4),
        ('{"in": {"city": "London"}}', '{"in": {"city": "London", "land": "UK"}}', 2 / 3),
        ('{"city": "London"}', '{"in": {"city": "London"}}', 0),
        ('{"all": ["b", "a", "a"]}', '{"all": ["a", "b"]}', 4 / 5),
        ('{"none": null, "no": []}', '{"none": null, "no": []}', 1),
        ("Ada", '{"name": "Ada"}', 0),
        ("7", '{"name": "Ada"}', 0),
        ("", '{"name": "Ada"}', 0),
        ("{}", '{"name": "Ada"}', 0),
    ],
)
def test_json_is_scored_by_its_pairs(answer: str, reference: str, score: float) -> None:
    assert score_answers("json-f1", [answer], [reference]) == pytest.approx(score)


def test_json_pairs_of_all_answers_count_alike() -> None:
    # 1 of 1 right, wanted 1; nothing given, wanted 3: 2 * 1 / (1 + 4)
    references = ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}']
    assert score_answers("json-f1", ['{"a": 1}', "no idea"], references) == pytest.approx(2 / 5)
    # the second reference is the better one
    assert score_answers("json-f1", ['{"a": 1}'], [['{"a": 2, "b": 2}', '{"a": 1}']]) == 1
    with pytest.raises(GraftError, match="json-f1: no reference is a JSON object with a value; found plain"):
        score_answers("json-f1", ['{"a": 1}'], ["plain"])


def test_words_are_scored_as_squad_does() -> None:
    assert score_answers("token-f1", ["The cat sat."], ["a cat"]) == pytest.approx(2 / 3)  # cat of cat, sat and of cat
    assert score_answers("token-f1", ["red red blue"], ["red blue blue green"]) == pytest.approx(4 / 7)
    assert score_answers("token-f1", ["dog", ""], [["cat", "Dog!"], ["cat"]]) == pytest.approx(1 / 2)
    assert score_answers("token-f1", ["the"], [""]) == 1
    assert score_answers("token-f1", ["Äpfel"], ["äpfel"]) == 1


def test_accuracy_takes_the_first_label_of_an_answer() -> None:
    references = ["positive", "Negative", "not sure", "positive"]
    answers = ["Positive, not negative.", "It is negative!", "I am not  sure: positive", ""]
    assert score_answers("accuracy", answers, references) == pytest.approx(3 / 4)
    assert score_answers("accuracy", ["positively", "yes"], ["positive", ["no", "yes"]]) == pytest.approx(1 / 2)
    assert score_answers("accuracy", ["very good", "good"], ["very good", "very"]) == pytest.approx(1 / 2)
    with pytest.raises(GraftError, match="no reference is a label"):
        score_answers("accuracy", ["x"], ["..."])


def test_numbers_that_are_labels_keep_their_sign_and_their_point() -> None:
    assert score_answers("accuracy", ["1", "-1", "Rating: -1.", "0"], ["-1", "-1", "-1", "1"]) == 1 / 2
    assert score_answers("accuracy", ["-1", "4.5", "45."], ["1", "4", "45"]) == pytest.approx(1 / 3)
    assert score_answers("accuracy", ["4.5 stars", "45"], ["4.5", "4.5"]) == 1 / 2
    assert score_answers("accuracy", ["- 1", "(3, 4)", "1,000"], ["1", "3", "1000"]) == 1


@needs_evaluate
def test_rouge_is_of_the_longest_common_subsequence() -> None:
    # "the cat the mat" is common to 6 and 5 words: 2 * 4 / 11
    assert score_answers("rouge", ["the cat sat on the mat"], ["The cat, under the mat"]) == pytest.approx(8 / 11)
    assert score_answers("rouge", ["a b", ""], [["x", "a b"], ["c"]]) == pytest.approx(1 / 2)
    assert score_answers("rouge", ["мост над рекой"], ["мост над озером"]) == pytest.approx(2 / 3)


@needs_evaluate
def test_bleu_is_of_the_whole_list() -> None:
    right = "the cat sat on the mat"
    other = "a dog ran over the hill"
    assert score_answers("bleu", [right, other], [right, ["x y z w", other]]) == pytest.approx(1)
    # 5 of 6 words, 3 of 5 pairs and 1 of 4 triples are right; none of 3 fours, which is smoothed to half of one
    expected = (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** (1 / 4)
    assert score_answers("bleu", ["the cat sat in the mat"], [right]) == pytest.approx(expected)
    assert score_answers("bleu", ["", ""], [right, right]) == 0


@needs_evaluate
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_one_for_the_reference_and_less_for_nothing(name: str) -> None:
    references = [
        ['{"word": "green", "of": "four words or more"}'],
        ['{"word": "blue", "of": "other words, also four"}'],
    ]
    assert METRICS[name].more_is_better
    assert score_answers(name, [given[0] for given in references], references) == pytest.approx(1)
    assert score_answers(name, ["", ""], references) == 0


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(GraftError, match="no such metric; expected exact, .*, found wit"):
        score_answers("wit", ["a"], ["a"])
    with pytest.raises(GraftError, match="exact: answers and references differ in number; found 1 answers and 2 lists"):
        score_answers("exact", ["a"], ["a", "b"])
    with pytest.raises(GraftError, match="exact: there is no answer"):
        score_answers("exact", [], [])
    with pytest.raises(GraftError, match="exact, answer 1: an answer has no reference"):
        score_answers("exact", ["a", "b"], ["a", []])


@pytest.mark.parametrize(
    ("name", "module", "library"), [("rouge", "rouge_score", "rouge-score"), ("bleu", "sacrebleu", "sacrebleu")]
)
def test_a_library_that_is_not_installed_is_named(name: str, module: str, library: str, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.rouge_scorer", None)
    with pytest.raises(
        DependencyError, match=rf"{library} is not installed. Fix: pip install 'peft-graft\[evaluate\]'"
    ):
        score_answers(name, ["a"], ["a"])


def test_a_metric_can_be_registered(monkeypatch) -> None:
    monkeypatch.setattr("peft_graft.metrics.METRICS", {})

    @register_metric("length", more_is_better=False)
    def length(answers, references) -> float:
        return sum(map(len, answers)) / sum(len(given[0]) for given in references)

    from peft_graft.metrics import METRICS

    assert METRICS["length"] == Metric("length", length, more_is_better=False)
    assert score_answers("length", ["ab"], ["abcd"]) == 1 / 2


def test_an_intervals_draws_are_as_if_drawn_one_after_another() -> None:
    values, draw = np.random.default_rng(1).random((300, 1)), np.random.default_rng(2)
    means = [float(values[draw.integers(300, size=300)].mean()) for _ in range(1000)]
    assert interval(values.tolist(), lambda sums, count: sums[0] / count, seed=2) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975]))
    )
