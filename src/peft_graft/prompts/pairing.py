"""Which tokens of one answer correspond where two models write it in unlike tokens.

Tokens are cut into the smallest groups that end at the same byte of the answer on both sides. Distributions are
compared only where a group is one token on each side, which is a strict position: there both models say how the
same bytes go on, and what the next token is means the same to both.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_graft.prompts.template import Completion

_DIGITS = frozenset(b"0123456789")


@dataclass(frozen=True)
class CompletionPairs:
    """The strict positions of one answer.

    Attributes:
        teacher, student: their indices in either completion, 0 for the first token after the prompt.
        groups: number of groups, strict or not, the ends of the turn being one.
        student_tokens: number of the student's tokens after the prompt.
    """

    teacher: list[int]
    student: list[int]
    groups: int
    student_tokens: int


@dataclass
class PairingShares:
    """How many of the student's positions are strict, summed over samples; ``digit`` ones hold a digit."""

    samples: int = 0
    tokens: int = 0
    strict: int = 0
    digit_tokens: int = 0
    digit_strict: int = 0

    def add(self, pairs: CompletionPairs, student: Completion, answer: str) -> None:
        """Count one sample. Without spans it is not known which tokens hold digits, and none are counted as such."""
        self.samples += 1
        self.tokens += pairs.student_tokens
        self.strict += len(pairs.student)
        content = answer.encode()
        digits = {k for k, (start, end) in enumerate(student.spans or ()) if _DIGITS & set(content[start:end])}
        self.digit_tokens += len(digits)
        self.digit_strict += len(digits & set(pairs.student))

    @property
    def share(self) -> float:
        """Share of all positions that are strict; 0 of none."""
        return self.strict / max(1, self.tokens)

    @property
    def digit_share(self) -> float | None:
        """Share of the positions with digits that are strict; None where there are none."""
        return self.digit_strict / self.digit_tokens if self.digit_tokens else None


def pair_completions(teacher: Completion, student: Completion, *, same_tokens: bool = False) -> CompletionPairs:
    """The strict positions of one answer; without the bytes of both sides only the ends of the turn are.

    Args:
        same_tokens: whether both have one vocabulary, by which the same ids are the same tokens.
    """
    if same_tokens and teacher.ids[teacher.start :] == student.ids[student.start :]:
        every = list(range(len(student)))
        return CompletionPairs(every, every, len(every), len(every))
    strict, groups = list[tuple[int, int]](), 0
    if teacher.spans is not None and student.spans is not None:
        ends, others = ([end for _, end in spans] for spans in (teacher.spans, student.spans))
        starts = [spans[0][0] if spans else 0 for spans in (teacher.spans, student.spans)]
        if ends and others and ends[-1] != others[-1]:
            raise ValueError(f"tokens of two answers, of {ends[-1]} and {others[-1]} bytes")
        for first, last in _groups(ends, others):
            groups += 1
            # A space before the answer on one side only makes the first tokens other ones in a shared vocabulary; and
            # of documents either side may lack its first token, which takes the place of a prompt.
            unlike = groups == 1 and (teacher.prefixed != student.prefixed or starts[0] != starts[1])
            if not unlike and all(b - a == 1 for a, b in zip(first, last, strict=True)):
                strict.append(first)
    if teacher.ended and student.ended:
        groups += 1
        strict.append((len(teacher) - 1, len(student) - 1))
    return CompletionPairs([k for k, _ in strict], [k for _, k in strict], groups, len(student))


def _groups(teacher: list[int], student: list[int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(First tokens, tokens after the last) of every group, from the bytes at which tokens end."""
    found = []
    i = j = 0
    while i < len(teacher) and j < len(student):
        first = i, j
        while teacher[i] != student[j]:
            if teacher[i] < student[j]:
                i += 1
            else:
                j += 1
        i, j = i + 1, j + 1
        found.append((first, (i, j)))
    return found
