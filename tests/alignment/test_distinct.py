"""Texts that are alike are one text: they go to the same part, and what counts is how many differ."""

from __future__ import annotations

import time

import pytest

import tiny
from peft_graft.alignment.distinct import Parts, each_once, form_of, groups_of, split, words_of
from peft_graft.alignment.text import Sample
from peft_graft.distill.ask_prompts import check_enough, prompt_parts
from peft_graft.distill.teacher import sample_parts
from peft_graft.errors import TextError
from peft_graft.prompts.conversation import Message, Prompt

LONG = "The old captain moored his boat in the northern harbour"


def alike(first: str | tuple[str, str], second: str | tuple[str, str]) -> bool:
    rows = [[words_of(text) for text in ([given] if isinstance(given, str) else given)] for given in (first, second)]
    groups = groups_of(rows)
    return groups[0] == groups[1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("A boat.", "a  BOAT !"),
        ("café au lait", "Cafe\u0301 AU lait"),
        ("soft\u00adware up\u200bdate", "software update"),
        ("well-known fact", "well known fact"),
        ("ﬁne weather today", "fine weather today"),
        ("今天天气怎么样？", "今天天气怎么样"),
        ("...", " . . ."),
        (LONG, LONG.replace("captain", "sailor")),
        (LONG, LONG + " 17"),
        (LONG, "1. " + LONG),
        (LONG, LONG.replace("northern ", "")),
        (("a boat on a lake", "two men"), ("two men", "a boat on a lake")),
        (("a boat on a lake", "yes"), ("a boat on a lake", "no")),
        (("a boat on a lake", "yes"), "A boat on a lake"),
    ],
)
def test_alike(first, second) -> None:
    assert alike(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a boat", "two boats"),
        ("Play some jazz", "Play some rock"),  # short texts that differ in a word say other things
        (LONG, LONG.replace("captain", "sailor").replace("boat", "ship")),
        (("a boat on a lake", "yes"), ("two men at a table", "yes")),
        ("...", "???"),
    ],
)
def test_not_alike(first, second) -> None:
    assert not alike(first, second)


def test_what_is_like_the_same_third_one_is_one_group() -> None:
    assert len({*groups_of([[words_of(text)] for text in (LONG, LONG.upper(), "x " + LONG, "x y " + LONG)])}) == 1


def test_the_order_and_the_case_of_a_pair_make_no_other_form() -> None:
    assert form_of(("A b.", "c")) == form_of(("C", "a B"))
    assert form_of(("a", "b")) != form_of(("ab",))


def test_samples_are_taken_once() -> None:
    given = [Sample("a b"), Sample("a  b "), Sample("A b"), Sample("a b", "c"), Sample("c", "a b")]
    assert each_once(given, lambda sample: sample.texts) == [given[0], *given[2:]]


def same_side(parts: Parts[Sample]) -> bool:
    """Whether no two parts have anything alike."""
    every = [*parts.judging, *parts.choosing, *parts.learning]
    groups = groups_of([[words_of(text) for text in sample.texts] for sample in every])
    sides = [0] * len(parts.judging) + [1] * len(parts.choosing) + [2] * len(parts.learning)
    return len({*zip(groups, sides, strict=True)}) == len({*groups})


def test_the_parts_of_a_text() -> None:
    for count, held in ((50, (8, 5)), (100, (10, 10)), (460, (46, 46)), (5000, (300, 300))):
        pool = [Sample(f"word{number}") for number in range(count)]
        parts = sample_parts(pool)
        assert (len(parts.judging), len(parts.choosing)) == held
        assert [*parts.judging, *parts.choosing, *parts.learning] == pool
        assert parts.groups == list(range(held[0]))
    assert sample_parts(pool[:49]).judging == []


@pytest.mark.parametrize("distinct", [1, 5, 20])
@pytest.mark.parametrize("change", ["none", "marks", "word"])
def test_lines_made_of_a_few_sentences_judge_nothing(distinct: int, change: str) -> None:
    few = [line for line in tiny.sentences(200, seed=3) if len(line.split()) >= 8][:distinct]
    changed = {
        "none": lambda line, _: line,
        "marks": lambda line, n: (line.upper() if n % 2 else line).replace(" ", " " * (1 + n % 7)) + "!" * (n // 20),
        "word": lambda line, n: f"{line} {n}",
    }[change]
    parts = sample_parts(Sample(changed(few[number % distinct], number)) for number in range(400))
    assert not parts.judging
    assert not parts.choosing
    assert parts.different == distinct


def test_pairs_made_of_a_few_sentences_judge_nothing() -> None:
    few = tiny.sentences(20, seed=3)
    assert not sample_parts(Sample(a, b) for a in few for b in few).judging


def test_pairs_both_ways_and_with_a_text_in_common_are_on_one_side() -> None:
    texts = tiny.sentences(600, seed=4)
    pairs = [Sample(a, b) for a, b in zip(texts[:200], texts[200:400], strict=True)]
    pairs += [Sample(pair.second or "", pair.first) for pair in pairs]
    pairs += [Sample(a, b) for a, b in zip(texts[:200], texts[400:], strict=True)]
    parts = sample_parts(pairs[::7] + [pair for number, pair in enumerate(pairs) if number % 7])
    assert parts.different == 200
    assert len({*parts.groups}) == 20
    assert same_side(parts)


def test_what_is_alike_beyond_a_tenth_of_the_text_is_for_learning() -> None:
    pool = [Sample(line) for line in (*tiny.sentences(150, seed=5), *(f"{LONG} {n}" for n in range(50)))]
    parts = sample_parts(pool)
    assert all(LONG in sample.first for sample in parts.learning[-50:])
    assert len(parts.judging) == 15


def test_labels_in_a_second_column_make_no_texts_alike() -> None:
    parts = sample_parts(Sample(line, ("sports", "world news")[n % 2]) for n, line in enumerate(tiny.sentences(200)))
    assert len(parts.judging) == 20


def test_prompts_differ_by_what_their_template_leaves() -> None:
    head = "Below is an instruction. Write an answer of one word to the question that follows it: "
    parts = prompt_parts([Prompt.of_text(f"{head}word{number}") for number in range(100)])
    assert len(parts.judging) == len(parts.choosing) == 10
    few = [f"{line} with some other words" for line in tiny.sentences(5, seed=8)]
    assert not prompt_parts([Prompt.of_text(f"{head}{few[n % 5]} {n}") for n in range(100)]).judging


def test_prompts_that_hardly_differ_are_too_few() -> None:
    few = [line for line in tiny.sentences(200, seed=8) if len(line.split()) >= 8]
    parts = prompt_parts([Prompt.of_text(f"{few[n % 5]} {n}") for n in range(100)])
    with pytest.raises(TextError, match="--text: too few prompts .* expected at least 40, found 5 different of 100"):
        check_enough(parts)


def test_turns_of_one_conversation_are_on_one_side() -> None:
    prompts = []
    for line in tiny.sentences(60, seed=6):
        turn = (Message("user", line),)
        prompts += [Prompt(turn), Prompt((*turn, Message("assistant", "yes"), Message("user", "and then?")))]
    parts = prompt_parts(prompts)
    assert len(parts.judging) == 16
    begun = {prompt.messages[0] for prompt in parts.learning}
    assert not begun & {prompt.messages[0] for prompt in parts.held_out}


def test_a_whole_pool_is_split_in_a_moment() -> None:
    start = time.perf_counter()
    pool = [Sample(f"{line} {n} {n * 7} {n * 13}") for n, line in enumerate(tiny.sentences(400) * 25)]
    assert split(pool, lambda sample: sample.texts, least=50, most=300).different > 1000
    assert time.perf_counter() - start < 20
