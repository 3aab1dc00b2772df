"""Answers that are marked in a text: from the tokens of one model to those of another, and from tokens to words.

A head of question answering gives every token of a question and a text two logits: to be the first token of the answer,
and the last one. Which characters these are both models can be asked, whatever their tokens are: an answer that begins
with a teacher's token begins with the student's token that holds its first character.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_graft.alignment.tokens import Span
from peft_graft.distill.targets import NEVER

#: Tokens that are read of a question and its text, at most: what modules of question answering are trained at.
LONGEST = 384
#: Tokens of an answer, at most, where it is chosen among all (as ``run_qa`` of transformers has it).
LONGEST_ANSWER = 30
#: The text that answers are in; the first is the question.
PASSAGE = 1
#: The token that says that the text holds no answer: the first, whether it is special, as in BERT, or a word's.
NOWHERE = 0
#: A probability that is less is held to be this.
_LEAST = 1e-30


class Places:
    """Which tokens hold a text's characters.

    Args:
        spans: the characters of the tokens, None of those that are of no word.
    """

    def __init__(self, spans: Sequence[Span | None]) -> None:
        self._known = [(index, span) for index, span in enumerate(spans) if span is not None]
        self._starts = [(span.segment, span.start) for _, span in self._known]

    def of(self, span: Span) -> tuple[int, int]:
        """The tokens that hold its first and its last character; ``NOWHERE`` where none does."""
        return self._holding(span.segment, span.start, last=False), self._holding(span.segment, span.end - 1, last=True)

    def _holding(self, segment: int, character: int, *, last: bool) -> int:
        known, at = self._known, bisect_right(self._starts, (segment, character)) - 1
        if at < 0 or known[at][1].segment != segment or known[at][1].end <= character:
            return NOWHERE
        while not last and at and known[at - 1][1].segment == segment and known[at - 1][1].end > character:
            at -= 1  # tokens of bytes share the characters that they are of
        return known[at][0]


def token_places(teacher: Sequence[Span | None], student: Sequence[Span | None]) -> list[tuple[int, int]]:
    """For every token of the teacher the student's tokens that hold its first and its last character.

    The first token of both is that of no answer, and so is the place of what the student does not read. Other special
    tokens belong to the student's in their order, if both have as many.

    Args:
        teacher, student: the characters of their tokens, None of special ones.
    """
    own, others = ([index for index, span in enumerate(spans) if span is None] for spans in (student, teacher))
    special = dict(zip(others, own, strict=True)) if len(own) == len(others) else {}
    places = Places(student)
    found = [
        (special.get(index, NOWHERE),) * 2 if span is None else places.of(span) for index, span in enumerate(teacher)
    ]
    return [(NOWHERE, NOWHERE), *found[1:]]


def moved_to(log_probabilities: Tensor, places: Sequence[tuple[int, int]], length: int) -> Tensor:
    """The teacher's log-probabilities [2, own tokens or more] over the student's tokens, [1, 2, length]."""
    given = log_probabilities[:, : len(places)].double().exp()
    found = given.new_zeros(2, length).scatter_add_(1, torch.tensor(places, dtype=torch.long).T, given)
    return found.clamp_min(_LEAST).log().float()[None]


@dataclass(frozen=True)
class Answered:
    """The tokens [first, last] of an answer, and its text; nothing where there is none."""

    first: int
    last: int
    text: str

    @staticmethod
    def of(logits: Tensor, texts: Sequence[str], spans: Sequence[Span | None], *, may_be_none: bool) -> Answered:
        """The likeliest answer: an end does not come before its start, nor ``LONGEST_ANSWER`` tokens after.

        Args:
            logits: [2, own tokens or more], or log-probabilities. texts: the question and the text.
            spans: the characters of the tokens. may_be_none: whether there may be no answer in the text.
        """
        inside = [index for index, span in enumerate(spans) if span is not None and span.segment == PASSAGE]
        if not inside:
            return Answered(NOWHERE, NOWHERE, "")
        first, last = inside[0], inside[-1] + 1
        of_no_word = torch.tensor([span is None for span in spans[first:last]])
        begins, ends = logits[:, first:last].double().masked_fill(of_no_word, 4 * NEVER)
        ends = torch.nn.functional.pad(ends, (0, LONGEST_ANSWER - 1), value=4 * NEVER)
        both = begins[:, None] + ends.unfold(0, LONGEST_ANSWER, 1)  # [where it begins, how many more tokens it has]
        best = int(both.argmax())
        if may_be_none and float(logits[:, NOWHERE].double().sum()) > float(both.max()):
            return Answered(NOWHERE, NOWHERE, "")
        start, more = first + best // LONGEST_ANSWER, best % LONGEST_ANSWER
        return Answered(start, start + more, text_of(texts, spans, start, start + more))


def text_of(texts: Sequence[str], spans: Sequence[Span | None], first: int, last: int) -> str:
    """What stands from one token to another, nothing where one of them is special or they are not of one text."""
    start, end = spans[first], spans[last]
    if start is None or end is None or start.segment != end.segment:
        return ""
    return texts[start.segment][start.start : end.end]
