"""Strict positions: where one token of each model covers the same bytes of an answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokenizer_makes as makes
from peft_graft.prompts.conversation import NO_PROMPT, Prompt
from peft_graft.prompts.pairing import CompletionPairs, PairingShares, pair_completions
from peft_graft.prompts.template import Completion, Template

QUESTION = Prompt.of_text("hello?")
WHOLE = Template.of(makes.byte_level("hello"))
BROKEN = Template.of(makes.byte_level("hello", without=1))
LLAMA = Template.of(makes.sentencepiece("▁hello", "▁world"))
GEMMA = Template.of(makes.sentencepiece("hello", "▁world", prefix=False))
ALL = [WHOLE, BROKEN, LLAMA, GEMMA]


def pairs(teacher: Template, student: Template, answer: str, *, ended: bool = True) -> CompletionPairs:
    return pair_completions(*(side.encode(QUESTION, answer, ended=ended) for side in (teacher, student)))


@pytest.mark.parametrize("template", ALL)
@pytest.mark.parametrize("ended", [True, False])
@given(answer=st.text().filter(lambda text: "▁" not in text))
def test_the_same_tokenizer_is_strict_everywhere(template: Template, ended: bool, answer: str) -> None:
    completion = template.encode(QUESTION, answer, ended=ended)
    every = list(range(len(completion)))
    assert pair_completions(completion, completion) == CompletionPairs(every, every, len(every), len(every))


def test_one_merge_less() -> None:
    """hello| |1|2|end and hell|o| |1|2|end."""
    assert pairs(WHOLE, BROKEN, "hello 12") == CompletionPairs([1, 2, 3, 4], [2, 3, 4, 5], 5, 6)
    assert pairs(BROKEN, WHOLE, "hello 12") == CompletionPairs([2, 3, 4, 5], [1, 2, 3, 4], 5, 5)


def test_tokens_that_overlap_are_one_group() -> None:
    """abc|de|f and ab|cde|f: the first two of each end together only at e."""
    teacher, student = (Completion([9] * 4, 1, spans) for spans in ([(0, 3), (3, 5), (5, 6)], [(0, 2), (2, 5), (5, 6)]))
    assert pair_completions(teacher, student) == CompletionPairs([2], [2], 2, 3)


@given(answer=st.text().filter(lambda text: "▁" not in text))
def test_strict_positions_cover_the_same_bytes(answer: str) -> None:
    for teacher in ALL:
        for student in ALL:
            theirs, ours = (side.encode(QUESTION, answer) for side in (teacher, student))
            found = pair_completions(theirs, ours)
            assert theirs.spans is not None
            assert ours.spans is not None
            assert (found.teacher[-1], found.student[-1]) == (len(theirs) - 1, len(ours) - 1)
            for k, n in zip(found.teacher[:-1], found.student[:-1], strict=True):
                assert theirs.spans[k] == ours.spans[n]


def test_a_space_before_the_answer_on_one_side() -> None:
    """▁hello and hello cover the same letters and are other tokens: " hello" and "hello" in a shared vocabulary."""
    assert pairs(LLAMA, GEMMA, "hello world") == CompletionPairs([1, 2], [1, 2], 3, 3)
    assert pairs(LLAMA, GEMMA, "\nhello") == CompletionPairs([7], [2], 3, 3)
    assert pairs(LLAMA, GEMMA, " hello") == CompletionPairs([2], [2], 2, 3)


def test_a_letter_of_several_tokens_pairs_byte_by_byte() -> None:
    assert pairs(WHOLE, GEMMA, "🤗").student == [0, 1, 2, 3, 4]


def test_line_ends_of_two_characters() -> None:
    """CR and LF are a token each; two LF in one on either side are one strict pair."""
    assert pairs(WHOLE, GEMMA, "a\r\nb\n\n") == CompletionPairs([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], 6, 6)


def test_an_empty_answer_pairs_at_its_end() -> None:
    assert pairs(WHOLE, GEMMA, "") == CompletionPairs([0], [0], 1, 1)
    assert pairs(WHOLE, GEMMA, "", ended=False) == CompletionPairs([], [], 0, 0)


def test_an_answer_without_end_pairs_no_end() -> None:
    theirs, ours = WHOLE.encode(QUESTION, "hello"), WHOLE.encode(QUESTION, "hello", ended=False)
    assert pair_completions(theirs, ours) == CompletionPairs([0], [0], 1, 1)
    assert pair_completions(ours, theirs) == CompletionPairs([0], [0], 1, 2)


def test_without_bytes_only_the_ends_pair() -> None:
    theirs = WHOLE.encode(QUESTION, "hello 12")
    assert pair_completions(theirs, replace(theirs, spans=None)) == CompletionPairs([4], [4], 1, 5)
    assert pair_completions(replace(theirs, spans=None, ended=False), theirs) == CompletionPairs([], [], 0, 5)


def test_spans_of_two_answers_are_refused() -> None:
    theirs, ours = (WHOLE.encode(QUESTION, text) for text in ("hello", "hello hello"))
    with pytest.raises(ValueError, match="two answers"):
        pair_completions(theirs, ours)


def test_shares_of_all_and_of_digits() -> None:
    shares = PairingShares()
    assert (shares.share, shares.digit_share) == (0, None)
    packed = Template.of(makes.byte_level("hello", "12"))
    for answer in ("hello 12", "hello"):
        ours = WHOLE.encode(QUESTION, answer)
        shares.add(pair_completions(packed.encode(QUESTION, answer), ours), ours, answer)
    assert (shares.samples, shares.tokens, shares.strict) == (2, 7, 5)
    assert (shares.digit_tokens, shares.digit_strict) == (2, 0)
    assert shares.share == pytest.approx(5 / 7)
    assert shares.digit_share == 0


# ---- documents -------------------------------------------------------------------------------------------------------


@given(text=st.text(min_size=1).filter(lambda text: "▁" not in text))
def test_strict_positions_of_documents_cover_the_same_bytes(text: str) -> None:
    for teacher in ALL:
        for student in ALL:
            theirs, ours = (side.encode(NO_PROMPT, text, ended=False) for side in (teacher, student))
            found = pair_completions(theirs, ours)
            for k, n in zip(found.teacher, found.student, strict=True):
                assert theirs.spans is not None
                assert ours.spans is not None
                assert theirs.spans[k] == ours.spans[n]


def test_a_first_token_that_one_side_lacks_makes_the_next_one_another() -> None:
    """<s>|Theorem|s and The|orem|s, whose first stands for a prompt: Theorem and orem end together."""
    teacher = Completion([9, 1, 2], 1, [(0, 7), (7, 8)])
    student = Completion([3, 4, 5], 1, [(3, 7), (7, 8)])
    assert pair_completions(teacher, student) == CompletionPairs([1], [1], 2, 2)
    assert pair_completions(student, student) == CompletionPairs([0, 1], [0, 1], 2, 2)


def test_one_vocabulary_pairs_without_the_bytes_of_tokens() -> None:
    """As after a normalisation; but not where the two are cut otherwise, or where ids are of other vocabularies."""
    one, other = Completion([7, 1, 2, 3], 1, None), Completion([8, 9, 1, 2, 3], 2, None)
    assert pair_completions(one, other, same_tokens=True) == CompletionPairs([0, 1, 2], [0, 1, 2], 3, 3)
    assert pair_completions(one, other) == CompletionPairs([], [], 0, 3)
    assert pair_completions(one, replace(other, ids=[8, 9, 1, 3, 2]), same_tokens=True).student == []
