"""What bytes tokens stand for, and which bytes of a text they cover."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokenizer_makes as makes
from peft_graft.errors import ModelError, PairingError
from peft_graft.prompts.token_bytes import FallbackByte, byte_spans, shared_tokens, token_bytes

MAKES = {
    "byte level": makes.byte_level("hello", "Ġworld", "the"),
    "SentencePiece": makes.sentencepiece("▁hello", "▁world", "the"),
    "SentencePiece without prefix": makes.sentencepiece("hello", "▁world", prefix=False),
    "Metaspace": makes.sentencepiece("▁hello", "▁world", metaspace=True),
    "Metaspace without prefix": makes.sentencepiece("▁hello", prefix=False, metaspace=True),
}
TEXTS = [
    "", " ", "hello world", " hello", "  hello  world ", "hello\r\nworld\r\n", "in 1987, 3 of 10", "🤗 and 👩‍👩‍👧",
    "\n\n\n", "naïve é\u0301", "cut \ufffd off", "<0x41>", "<|end|>", "<think>hello</think>", "\t{\"a\": [1, 2]}",
]  # fmt: skip


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def bytes_of(tokenizer, token: str) -> bytes | None:
    return token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids(token)]


def assert_joins(tokenizer, text: str) -> None:
    ids = ids_of(tokenizer, text)
    found = byte_spans(ids, token_bytes(tokenizer), text)
    assert found is not None
    spans, prefixed = found
    assert len(spans) == len(ids)
    assert not spans or (spans[0][0], spans[-1][1]) == (0, len(text.encode()))
    assert makes.is_contiguous(spans)
    pieces = b"".join(token_bytes(tokenizer)[index] or b"" for index in ids)
    assert pieces == b" " * prefixed + text.encode()


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_join_to_the_text(make: str, text: str) -> None:
    assert_joins(MAKES[make], text)


@pytest.mark.parametrize("make", MAKES)
@given(text=st.text().filter(lambda text: "▁" not in text))
def test_tokens_join_to_any_text(make: str, text: str) -> None:
    assert_joins(MAKES[make], text)


def test_a_space_before_the_text_belongs_to_no_span() -> None:
    tokenizer = MAKES["SentencePiece"]
    spans = byte_spans(ids_of(tokenizer, "hello world"), token_bytes(tokenizer), "hello world")
    assert spans == ([(0, 5), (5, 11)], True)
    assert byte_spans(ids_of(tokenizer, "\nx"), token_bytes(tokenizer), "\nx") == ([(0, 0), (0, 1), (1, 2)], True)


def test_a_letter_of_several_tokens() -> None:
    for make in ("byte level", "SentencePiece without prefix"):
        tokenizer = MAKES[make]
        spans = byte_spans(ids_of(tokenizer, "a🤗"), token_bytes(tokenizer), "a🤗")
        assert spans == ([(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)], False)


def test_half_a_letter_is_no_text_of_its_tokens() -> None:
    """Generation may end inside one: its tokens do not join to what they are decoded to, which is another answer."""
    tokenizer = MAKES["byte level"]
    cut = ids_of(tokenizer, "a🤗")[:-1]
    assert byte_spans(cut, token_bytes(tokenizer), tokenizer.decode(cut)) is None
    assert_joins(tokenizer, tokenizer.decode(cut))


def test_a_text_that_was_normalised_has_no_spans() -> None:
    assert byte_spans(ids_of(MAKES["byte level"], "hello"), token_bytes(MAKES["byte level"]), "Hello") is None
    assert byte_spans([10**6], token_bytes(MAKES["byte level"]), "x") is None


def test_a_space_put_in_after_added_tokens_has_no_spans() -> None:
    tokenizer = makes.sentencepiece("▁hello", added=True)
    assert byte_spans(ids_of(tokenizer, "<think>hello"), token_bytes(tokenizer), "<think>hello") is None


def test_control_tokens_have_no_bytes_and_added_ones_their_text() -> None:
    for tokenizer in MAKES.values():
        assert [bytes_of(tokenizer, token) for token in makes.SPECIALS] == [None] * len(makes.SPECIALS)
        if tokenizer is not MAKES["SentencePiece"]:
            assert [bytes_of(tokenizer, token) for token in ("<think>", "\n\n")] == [b"<think>", b"\n\n"]
        assert len(token_bytes(tokenizer)) == len(tokenizer)


def test_bytes_of_every_make() -> None:
    assert bytes_of(MAKES["byte level"], "Ġworld") == b" world"
    assert bytes_of(MAKES["byte level"], "Ċ") == b"\n"
    assert bytes_of(MAKES["SentencePiece"], "▁world") == b" world"
    assert bytes_of(MAKES["SentencePiece"], "<0xAB>") == b"\xab"
    wordpiece = makes.wordpiece("river", "##s")
    assert [bytes_of(wordpiece, token) for token in ("river", "##s")] == [b" river", b"s"]


def test_words_and_their_pieces_join_where_nothing_is_normalised() -> None:
    tokenizer = makes.wordpiece("river", "##s", "and")
    text = "rivers and river"
    spans = byte_spans(ids_of(tokenizer, text), token_bytes(tokenizer), text)
    assert spans == ([(0, 5), (5, 6), (6, 10), (10, 16)], True)
    assert byte_spans(ids_of(tokenizer, "river  and"), token_bytes(tokenizer), "river  and") is None


def test_a_table_follows_added_tokens() -> None:
    tokenizer = makes.byte_level()
    before = token_bytes(tokenizer)
    assert token_bytes(tokenizer) is before
    tokenizer.add_tokens(["<new>"])
    assert token_bytes(tokenizer)[-1] == b"<new>"


def test_a_tokenizer_of_another_make() -> None:
    with pytest.raises(ModelError, match="do not say what bytes.*byte-level, SentencePiece or WordPiece"):
        token_bytes(makes.word_level("river"))


def test_the_same_vocabulary_shares_all_but_control_tokens() -> None:
    table = token_bytes(MAKES["byte level"])
    theirs, ours = shared_tokens(table, table)
    assert theirs.dtype == torch.int64
    assert theirs.tolist() == ours.tolist() == [index for index, token in enumerate(table) if token is not None]


def test_makes_share_what_is_the_same_bytes() -> None:
    one, other = MAKES["byte level"], MAKES["SentencePiece"]
    pairs = dict(zip(*(ids.tolist() for ids in shared_tokens(token_bytes(one), token_bytes(other))), strict=True))

    def counterpart(token: str) -> str:
        return makes.token_texts(other, [pairs[one.convert_tokens_to_ids(token)]])[0]

    assert [counterpart(token) for token in ("Ġworld", "the", "h")] == ["▁world", "the", "h"]
    assert counterpart("Ġ") == "▁"  # not <0x20>, which stands first in the vocabulary and in no text
    assert counterpart("Ċ") == "<0x0A>"


def test_of_several_ordinary_tokens_the_first() -> None:
    theirs, ours = shared_tokens([None, b"a", b"b"], [FallbackByte(b"a"), b"c", b"a", b"a"])
    assert (theirs.tolist(), ours.tolist()) == ([1], [2])


def test_nothing_in_common() -> None:
    with pytest.raises(PairingError, match="no token in common"):
        shared_tokens([b"a", None], [b"b"])
