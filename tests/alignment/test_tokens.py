"""Pairing tokens by characters: nothing after a difference is lost, and blocks cover the same characters."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from peft_graft.alignment.tokens import MAX_BLOCK, Block, PairingCounts, Span, pair_tokens, trimmed_spans


def spans(text: str, cuts: list[int], segment: int = 0) -> list[Span]:
    edges = sorted({0, len(text), *cuts})
    return [Span(segment, start, end) for start, end in itertools.pairwise(edges)]


def test_equal_tokenisations_pair_one_to_one() -> None:
    tokens = spans("abcdef", [2, 3])
    assert pair_tokens(tokens, tokens) == [Block(i, i + 1, i, i + 1) for i in range(3)]


def test_a_difference_costs_its_own_block_only() -> None:
    teacher, student = spans("abcdefgh", [2, 3, 6]), spans("abcdefgh", [3, 5, 6])
    assert pair_tokens(teacher, student) == [Block(0, 2, 0, 1), Block(2, 3, 1, 3), Block(3, 4, 3, 4)]


def test_specials_and_gaps_take_no_part() -> None:
    teacher = [None, Span(0, 0, 3), Span(0, 4, 6), None]
    student = [None, Span(0, 0, 3), Span(0, 3, 4), Span(0, 4, 6), None]
    assert pair_tokens(teacher, student) == [Block(1, 2, 1, 2), Block(2, 3, 3, 4)]


def test_the_sentences_of_a_pair_stay_apart() -> None:
    teacher = [Span(0, 0, 4), Span(1, 0, 4)]
    student = [Span(0, 0, 2), Span(0, 2, 4), Span(1, 0, 4)]
    assert pair_tokens(teacher, student) == [Block(0, 1, 0, 2), Block(1, 2, 2, 3)]


def test_byte_tokens_of_one_character_are_one_block() -> None:
    teacher = [Span(0, 0, 1), Span(0, 0, 1), Span(0, 1, 3)]
    student = [Span(0, 0, 1), Span(0, 1, 3)]
    assert pair_tokens(teacher, student) == [Block(0, 2, 0, 1), Block(2, 3, 1, 2)]


def test_long_blocks_are_left_out() -> None:
    text = "a" * 20
    assert pair_tokens(spans(text, list(range(1, 20))), spans(text, [])) == []
    assert len(pair_tokens(spans("a" * MAX_BLOCK, list(range(1, MAX_BLOCK))), spans("a" * MAX_BLOCK, []))) == 1


@given(st.lists(st.integers(1, 29)), st.lists(st.integers(1, 29)))
def test_blocks_cover_the_same_characters_and_every_shared_token(first: list[int], second: list[int]) -> None:
    text = "x" * 30
    teacher, student = spans(text, first), spans(text, second)
    blocks = pair_tokens(teacher, student)
    for block in blocks:
        assert teacher[block.teacher_start].start == student[block.student_start].start
        assert teacher[block.teacher_end - 1].end == student[block.student_end - 1].end
    one_to_one = {teacher[block.teacher_start] for block in blocks if block.is_one_to_one}
    assert one_to_one == set(teacher) & set(student)


def test_blanks_do_not_belong_to_tokens() -> None:
    assert trimmed_spans(["a bc "], [None, 0, 0, 0], [(0, 0), (0, 1), (1, 4), (4, 5)]) == [
        None,
        Span(0, 0, 1),
        Span(0, 2, 4),
        None,
    ]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_real_tokenizers_pair_most_words(tmp_path, kind: str) -> None:
    one, other = tiny.tokenizer(tmp_path / "a"), tiny.tokenizer(tmp_path / "b", kind=kind)
    counts = PairingCounts()
    for text in tiny.sentences(50):
        sides = []
        for tokenizer in (one, other):
            encoding = tokenizer(text, return_offsets_mapping=True)
            sides.append(trimmed_spans([text], encoding.sequence_ids(0), encoding["offset_mapping"]))
        counts.add(*sides, pair_tokens(*sides))
    assert counts.samples == 50
    assert counts.paired_teacher_tokens > 0.9 * counts.teacher_tokens
    if kind == "wordpiece":
        assert counts.pairs == counts.one_to_one == counts.teacher_tokens
