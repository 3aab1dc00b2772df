"""Named entity recognition: sentences with entities marked, and tagged ones as a model is trained on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_graft.labelled.examples import TaggedSentence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
_ENTITY = re.compile(r"\[([^\[\]]+)\]\(([A-Z]+)\)")
_TOKEN = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def read_annotated(path: Path) -> list[TaggedSentence]:
    """A sentence a line with entities marked inline: ``[Marie Curie](PER) was born in [Warsaw](LOC).``"""
    return [parse_annotated(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def parse_annotated(line: str) -> TaggedSentence:
    """One inline-annotated sentence.

    Example:
        >>> parse_annotated("[Ada Lovelace](PER) wrote.").tags
        ('B-PER', 'I-PER', 'O', 'O')
    """
    tokens: list[str] = []
    tags: list[str] = []

    def add(text: str, kind: str | None) -> None:
        words = _TOKEN.findall(text)
        tokens.extend(words)
        tags.extend("O" if kind is None else f"{'I' if index else 'B'}-{kind}" for index in range(len(words)))

    end = 0
    for match in _ENTITY.finditer(line):
        add(line[end : match.start()], None)
        add(match[1], match[2])
        end = match.end()
    add(line[end:], None)
    return TaggedSentence(tuple(tokens), tuple(tags))


def tag_names(sentences: Sequence[TaggedSentence]) -> tuple[str, ...]:
    """The tags in use, ``O`` first, then in alphabetical order."""
    used = {tag for sentence in sentences for tag in sentence.tags}
    return ("O", *sorted(used - {"O"}))


def encode(
    sentences: Sequence[TaggedSentence],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int = 128,
) -> list[dict[str, Any]]:
    """Model inputs with a label at the first piece of every word and ``IGNORED`` elsewhere; and ``words``, the numbers
    of the words that these pieces begin, in their order: some tokenizers have no piece for some words."""
    index = {label: number for number, label in enumerate(labels)}
    rows = []
    for sentence in sentences:
        encoding = tokenizer(list(sentence.tokens), is_split_into_words=True, truncation=True, max_length=max_length)
        words = encoding.word_ids(0)
        first = [word is not None and word not in words[:position] for position, word in enumerate(words)]
        targets = [
            index[sentence.tags[word]] if is_first else IGNORED for word, is_first in zip(words, first, strict=True)
        ]
        begun = [word for word, is_first in zip(words, first, strict=True) if is_first]
        rows.append({**{key: encoding[key] for key in encoding}, "labels": targets, "words": begun})
    return rows
