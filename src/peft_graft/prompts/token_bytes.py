"""The bytes that tokens stand for: what tokens of unlike vocabularies have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peft_graft.alignment.vocabulary import BYTE_OF
from peft_graft.errors import ModelError, PairingError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPACE, _CONTINUED = "▁", "##"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_tables: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, list[bytes | None]]] = WeakKeyDictionary()


class FallbackByte(bytes):
    """The byte of a token such as ``<0x20>``, written only where no ordinary token is there; equal to plain bytes."""


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The UTF-8 bytes of every token by its id; None for control tokens and for ids without one. Not to be changed.

    Raises:
        ModelError: the tokenizer is slow, or of a make whose tokens do not say what bytes they stand for.
    """
    known = _tables.get(tokenizer)
    added = len(tokenizer.added_tokens_decoder)  # the length of all of it takes a third of a second to tell
    if known is None or known[0] != added:
        known = _tables[tokenizer] = added, _table(tokenizer)
    return known[1]


def shared_tokens(teacher: Sequence[bytes | None], student: Sequence[bytes | None]) -> tuple[Tensor, Tensor]:
    """Ids of the teacher's and of the student's tokens that are the same bytes, by the teacher's ids.

    Where several tokens of one side are the same bytes, an ordinary one stands for them, as it does in texts.

    Raises:
        PairingError: there are none.
    """
    theirs, ours = _by_bytes(teacher), _by_bytes(student)
    pairs = sorted((index, ours[token]) for token, index in theirs.items() if token in ours)
    if not pairs:
        raise PairingError(
            "the two vocabularies have no token in common", expected="at least one", found=f"{len(theirs)}, {len(ours)}"
        )
    ids = torch.tensor(pairs, dtype=torch.int64)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether every token has the same id in both vocabularies."""
    return first is second or first.get_vocab() == second.get_vocab()


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The control tokens by their ids, as a text has them."""
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder.items()
    return {index: token.content.encode() for index, token in added if token.special or index in special}


def byte_spans(
    ids: Sequence[int], table: Sequence[bytes | None], text: str, control: Mapping[int, bytes] | None = None
) -> tuple[list[tuple[int, int]], bool] | None:
    """The bytes of a text that each of its tokens covers, (start, end) in ``text.encode()``.

    Args:
        ids: the tokens. table: see ``token_bytes``. control: control tokens that the text may have in it.

    Returns:
        the spans, and whether the first token holds a space too that the text lacks, which is no part of its span
        (SentencePiece's dummy prefix); None where the tokens do not join to the text, as after a normalisation.
    """
    known = control or {}
    pieces = [known.get(index, table[index] if index < len(table) else None) for index in ids]
    whole = text.encode()
    joined = b"".join(piece or b"" for piece in pieces)
    prefixed = joined != whole
    if None in pieces or (prefixed and joined != b" " + whole):
        return None
    spans, end = list[tuple[int, int]](), -1 if prefixed else 0
    for piece in pieces:
        start, end = end, end + len(piece or b"")
        spans.append((max(0, start), end))
    return spans, prefixed


def _by_bytes(table: Sequence[bytes | None]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for fallback in (False, True):
        for index, token in enumerate(table):
            if token is not None and isinstance(token, FallbackByte) is fallback:
                found.setdefault(bytes(token), index)
    return found


def _table(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    read = _reader(tokenizer)
    added = tokenizer.added_tokens_decoder
    control = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * max(len(tokenizer), 1 + max(vocabulary.values(), default=-1))
    for token, index in vocabulary.items():
        if index not in control:
            table[index] = token.encode() if index in added else read(token)
    return table


def _reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes | None]:
    """What turns a token, as a vocabulary writes it, to bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [] if backend is None else [backend.normalizer, backend.pre_tokenizer, backend.decoder]
    found = {name for part in parts for name in _names(part)}
    if "ByteLevel" in found:  # first: some decoders name all that there is
        return _of_byte_level
    if backend is not None and type(backend.model).__name__ == "WordPiece":
        return _of_wordpiece
    if found & {"Metaspace", "ByteFallback", _SPACE}:
        return _of_sentencepiece
    raise ModelError(
        "a tokenizer whose tokens do not say what bytes they stand for",
        where=str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__),
        expected="a fast tokenizer of byte-level, SentencePiece or WordPiece make",
        found=", ".join(sorted(found)) or type(tokenizer).__name__,
    )


def _names(part: Any) -> Iterator[str]:
    """The types of a tokenizer's part and of the parts in it, and the text that it replaces or puts in."""
    # The whole tokenizer as JSON would take a second to read for a vocabulary of 260,000 tokens.
    open_ = [json.loads(part.__getstate__())] if part is not None else []
    while open_:
        value = open_.pop()
        if isinstance(value, dict):
            open_.extend(value.values())
        elif isinstance(value, list):
            open_.extend(value)
        elif isinstance(value, str):
            yield value


def _of_byte_level(token: str) -> bytes | None:
    try:
        return bytes(BYTE_OF[letter] for letter in token)
    except KeyError:
        return None


def _of_sentencepiece(token: str) -> bytes:
    fallback = _FALLBACK.fullmatch(token)
    return FallbackByte([int(fallback[1], 16)]) if fallback else token.replace(_SPACE, " ").encode()


def _of_wordpiece(token: str) -> bytes:
    continued = token.startswith(_CONTINUED) and token != _CONTINUED
    return (token.removeprefix(_CONTINUED) if continued else f" {token}").encode()
