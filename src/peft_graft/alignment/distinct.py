"""Which texts are alike, and a text in parts that have nothing in common: to judge by, to choose by, to learn from.

A sentence that was learned says nothing about how well others will be understood. So a text is never split by its
lines: what is alike goes to the same part, and what counts is how many texts there are that differ.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Generic, TypeVar

from scipy.cluster.hierarchy import DisjointSet

from peft_graft.alignment.json_rows import digest_of

T = TypeVar("T")
#: Chinese and Japanese are written without blanks: a character is a word.
_WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")
#: Accents, which many tokenizers drop, and what is not seen.
_UNSEEN = re.compile(r"[\u0300-\u036f\u00ad\u200b-\u200f\u2060\ufeff]")
#: Texts of so many words are alike if one word is all that differs.
_LONG = 8
#: One text of a pair tells pairs apart from others, and is no label, from so many words or signs on.
_TELLING_WORDS, _TELLING_SIGNS = 3, 20
#: Words that such a share of the prompts have belong to their template.
_COMMON = 0.9
#: Texts that judge, and that choose, at least; their share of all; what is larger than that share is for learning only.
LEAST_JUDGING, LEAST_CHOOSING, SHARE = 8, 5, 10


def words_of(text: str) -> list[str]:
    """Words without case, accents and punctuation; of a text without any, its signs."""
    plain = _UNSEEN.sub("", unicodedata.normalize("NFKD", text)).casefold()
    return _WORD.findall(plain) or list("".join(text.split()))


def form_of(texts: Sequence[str]) -> tuple[str, ...]:
    """The same for texts that differ in nothing but case, accents, punctuation, blanks and their order."""
    return tuple(sorted("".join(words_of(text)) for text in texts))


def key_of(text: str) -> int:
    """A hash of 63 bits, the same for texts that differ in nothing but case, accents, punctuation and blanks."""
    return int.from_bytes(hashlib.blake2b("".join(words_of(text)).encode(), digest_size=8).digest()) >> 1


def without_common(rows: Sequence[list[str]]) -> list[list[str]]:
    """The words of each row that are not in nearly all of them; a row that has no other words stays as it is."""
    known = Counter(word for row in rows for word in set(row))
    common = {word for word, count in known.items() if count >= _COMMON * len(rows)}
    return [[word for word in row if word not in common] or row for row in rows]


def groups_of(rows: Sequence[Sequence[list[str]]]) -> list[int]:
    """A number for every row, the same for rows that are alike, or that are like the same third one.

    Two rows are alike if one of their texts is, whatever its case, accents, punctuation and blanks: the same; or of
    eight words or more, of which one differs, or is missing. Short texts of pairs, such as labels, do not count.

    Args:
        rows: the words of each row's texts: one, or the two of a pair in either order.
    """
    known = DisjointSet(range(len(rows)))
    first: dict[object, int] = {}
    for row, texts in enumerate(rows):
        for key in _keys(texts):
            if (other := first.setdefault(key, row)) != row:
                known.merge(row, other)
    return [known[row] for row in range(len(rows))]


def _keys(texts: Sequence[list[str]]) -> Iterator[object]:
    """What a row has in common with every row that is like it."""
    whole = ["".join(text) for text in texts]
    yield tuple(sorted(whole))
    for text, signs in zip(texts, whole, strict=True):
        if len(texts) > 1 and (len(text) >= _TELLING_WORDS or len(signs) >= _TELLING_SIGNS):
            yield (signs,)
        if len(text) >= _LONG:
            before = list(accumulate(text, lambda known, word: hash((known, word)), initial=0))
            after = list(accumulate(reversed(text), lambda known, word: hash((known, word)), initial=0))[::-1]
            yield from zip(before, after, strict=True)  # with a word more at that place
            yield from zip(before[:-1], after[1:], strict=True)  # without the word there, or with another


def each_once(items: Iterable[T], texts: Callable[[T], Sequence[str]]) -> list[T]:
    """Items without those whose texts, white space aside, came before."""
    found: dict[tuple[str, ...], T] = {}
    for item in items:
        found.setdefault(tuple(" ".join(text.split()) for text in texts(item)), item)
    return list(found.values())


@dataclass(frozen=True)
class Parts(Generic[T]):
    """A text in parts no two of which have anything alike.

    Attributes:
        judging, choosing, learning: the parts; the first two are empty where too few texts differ.
        groups: of what judges, a number each, the same for what is alike.
        given: how many there are in all. different: how many of these differ.
    """

    judging: list[T]
    choosing: list[T]
    learning: list[T]
    groups: list[int]
    given: int
    different: int

    @property
    def held_out(self) -> list[T]:
        """What is not learned from."""
        return [*self.judging, *self.choosing]

    def without(self, dropped: Collection[T]) -> Parts[T]:
        """The same without some of them; what stays is in the part where it was."""
        judging, choosing, learning = (
            [item for item in part if item not in dropped] for part in (self.judging, self.choosing, self.learning)
        )
        groups = [group for item, group in zip(self.judging, self.groups, strict=True) if item not in dropped]
        return replace(self, judging=judging, choosing=choosing, learning=learning, groups=groups)

    def digest(self, texts: Callable[[T], Sequence[str]]) -> str:
        """A hash of what is in which part, in order."""
        return digest_of([texts(item) for item in part] for part in (self.judging, self.choosing, self.learning))


def split(
    items: Sequence[T],
    texts: Callable[[T], Sequence[str]],
    *,
    least: int,
    most: int,
    common: bool = False,
) -> Parts[T]:
    """Split texts, which are in random order, into parts.

    Args:
        texts: the texts of an item, one or two. least: texts that have to differ, or all are for learning.
        most: that judge, and that choose, at most: a tenth of a short text each.
        common: whether to leave out words that nearly all have, as those of a template, before texts are compared.
    """
    rows = [[words_of(text) for text in texts(item) if text.strip()] or [[""]] for item in items]
    if common:
        rows = [[row] for row in without_common([[word for text in row for word in text] for row in rows])]
    groups = groups_of(rows)
    sizes = Counter(groups)
    largest = max(1, len(items) // SHARE)
    small = [group for group in dict.fromkeys(groups) if sizes[group] <= largest]
    different = len(small) + sum(size > largest for size in sizes.values())
    if len(small) < least:
        return Parts([], [], list(items), [], len(items), different)
    left = iter(small)
    parts = [
        _taken(left, sizes, floor, min(most, max(floor, len(small) // SHARE)), most)
        for floor in (LEAST_JUDGING, LEAST_CHOOSING)
    ]
    judging, choosing = ([n for n, group in enumerate(groups) if group in part] for part in parts)
    held = {*judging, *choosing}
    return Parts(
        [items[number] for number in judging],
        [items[number] for number in choosing],
        [item for number, item in enumerate(items) if number not in held],
        [groups[number] for number in judging],
        len(items),
        different,
    )


def _taken(groups: Iterable[int], sizes: Counter[int], least: int, most: int, items: int) -> set[int]:
    """The next ``most`` groups; fewer, but ``least``, where they make more than so many items."""
    found, count = set[int](), 0
    for group in groups:
        found.add(group)
        count += sizes[group]
        if len(found) == most or (len(found) >= least and count >= items):
            break
    return found
