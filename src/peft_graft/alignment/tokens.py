"""Pairing the tokens of two tokenizers by the characters that they cover.

Two token sequences over one text are cut into the smallest blocks that start and end at the same character in
both. A block of one token on each side is a pair; a block of several tokens pairs the means of their activations.
A difference between the tokenizers costs its own block only, never the rest of the sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from peft_graft.record import Record

#: Blocks longer than this on either side say little about single tokens; they are left unpaired.
MAX_BLOCK = 8


class Span(NamedTuple):
    """The characters of one token: segment (0 or 1 in a sentence pair), start and end in the segment's text."""

    segment: int
    start: int
    end: int


class Block(NamedTuple):
    """Positions [teacher_start, teacher_end) and [student_start, student_end) that cover the same characters."""

    teacher_start: int
    teacher_end: int
    student_start: int
    student_end: int

    @property
    def is_one_to_one(self) -> bool:
        """One token on each side."""
        return self.teacher_end - self.teacher_start == 1 == self.student_end - self.student_start


@dataclass
class PairingCounts:
    """How the tokens of a corpus paired; special tokens are not counted.

    ``pairs`` = ``one_to_one`` + pooled blocks; ``paired_*_tokens`` are the tokens inside any of them.
    """

    samples: int = 0
    teacher_tokens: int = 0
    student_tokens: int = 0
    paired_teacher_tokens: int = 0
    paired_student_tokens: int = 0
    one_to_one: int = 0
    pairs: int = 0
    nonfinite_pairs: int = 0

    @property
    def record(self) -> PairingRecord:
        """The counts for a report."""
        return PairingRecord(
            samples=self.samples,
            pairs=self.pairs,
            one_to_one=self.one_to_one,
            teacher_tokens=self.teacher_tokens,
            student_tokens=self.student_tokens,
            teacher_share_paired=self.paired_teacher_tokens / max(1, self.teacher_tokens),
            student_share_paired=self.paired_student_tokens / max(1, self.student_tokens),
            nonfinite_pairs=self.nonfinite_pairs,
        )

    def add(self, teacher: Sequence[Span | None], student: Sequence[Span | None], blocks: Sequence[Block]) -> None:
        """Count one sample."""
        self.samples += 1
        self.teacher_tokens += sum(span is not None for span in teacher)
        self.student_tokens += sum(span is not None for span in student)
        self.paired_teacher_tokens += sum(block.teacher_end - block.teacher_start for block in blocks)
        self.paired_student_tokens += sum(block.student_end - block.student_start for block in blocks)
        self.one_to_one += sum(block.is_one_to_one for block in blocks)
        self.pairs += len(blocks)


class PairingRecord(Record):
    """How the text's tokens paired, with shares of each model's tokens (``PairingCounts``)."""

    samples: int
    pairs: int
    one_to_one: int
    teacher_tokens: int
    student_tokens: int
    teacher_share_paired: float
    student_share_paired: float
    nonfinite_pairs: int


def trimmed_spans(
    texts: Sequence[str], segments: Sequence[int | None], offsets: Sequence[tuple[int, int]]
) -> list[Span | None]:
    """Token spans without surrounding blanks; None for special and empty tokens.

    Tokenizers differ in whether the blank before a word belongs to its first token, so blanks are trimmed.

    Args:
        texts: the one or two texts of the sample.
        segments: for each token the text it comes from, None for special tokens.
        offsets: for each token its (start, end) in that text.
    """
    spans: list[Span | None] = []
    for segment, (start, end) in zip(segments, offsets, strict=True):
        if segment is None:
            spans.append(None)
            continue
        text = texts[segment]
        while start < end and text[start].isspace():
            start += 1
        while end > start and text[end - 1].isspace():
            end -= 1
        spans.append(Span(segment, start, end) if end > start else None)
    return spans


def pair_tokens(teacher: Sequence[Span | None], student: Sequence[Span | None]) -> list[Block]:
    """The smallest blocks that start and end at the same characters in both token sequences.

    Args:
        teacher, student: spans in text order, None for tokens that take no part.

    Example:
        >>> pair_tokens([Span(0, 0, 5), Span(0, 6, 9), Span(0, 9, 12)], [Span(0, 0, 5), Span(0, 6, 12)])
        [Block(teacher_start=0, teacher_end=1, student_start=0, student_end=1), \
Block(teacher_start=1, teacher_end=3, student_start=1, student_end=2)]
    """
    t = [(index, span) for index, span in enumerate(teacher) if span is not None]
    s = [(index, span) for index, span in enumerate(student) if span is not None]
    blocks: list[Block] = []
    i = j = 0
    while i < len(t) and j < len(s):
        here, there = t[i][1][:2], s[j][1][:2]
        if here != there:  # one side has a token where the other has none yet
            i, j = (i + 1, j) if here < there else (i, j + 1)
            continue
        i_end, j_end = _block_end(t, s, i, j)
        if i_end - i <= MAX_BLOCK >= j_end - j and t[i_end - 1][1].end == s[j_end - 1][1].end:
            blocks.append(Block(t[i][0], t[i_end - 1][0] + 1, s[j][0], s[j_end - 1][0] + 1))
        i, j = i_end, j_end
    return blocks


def _block_end(t: list[tuple[int, Span]], s: list[tuple[int, Span]], i: int, j: int) -> tuple[int, int]:
    """Extend the block that starts at t[i], s[j] until both sides end at one character, or one runs out."""
    segment = t[i][1].segment
    i_end, j_end = i + 1, j + 1

    def extends(side: list[tuple[int, Span]], at: int, limit: int) -> bool:
        return at < len(side) and side[at][1].segment == segment and side[at][1].start < limit

    while True:
        t_end, s_end = t[i_end - 1][1].end, s[j_end - 1][1].end
        # Tokens that overlap the block belong to it (byte tokens share the span of their character).
        if extends(t, i_end, max(t_end, s_end)):
            i_end += 1
        elif extends(s, j_end, max(t_end, s_end)):
            j_end += 1
        else:
            return i_end, j_end
