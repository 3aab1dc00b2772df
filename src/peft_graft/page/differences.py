"""What two answers do not share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

Parts = list[tuple[str, bool]]
_TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
#: Words, blanks and marks that are compared, and signs that are shown, at most.
_MOST_TOKENS, _MOST_SIGNS = 600, 1500


def shortened(text: str) -> str:
    """A text that is not too long to be shown."""
    return text if len(text) <= _MOST_SIGNS else f"{text[:_MOST_SIGNS]} …"


def differences(first: str, second: str) -> tuple[Parts, Parts, float]:
    """Both texts in parts, each with whether the other lacks it, and how much they share, from 0 to 1."""
    one, other = (_TOKEN.findall(shortened(text.strip()))[:_MOST_TOKENS] for text in (first, second))
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    mine, theirs = Parts(), Parts()
    for what, start, end, other_start, other_end in matcher.get_opcodes():
        mine += [("".join(one[start:end]), what != "equal")] * (end > start)
        theirs += [("".join(other[other_start:other_end]), what != "equal")] * (other_end > other_start)
    return _merged(mine), _merged(theirs), matcher.ratio()


def _merged(parts: Iterable[tuple[str, bool]]) -> Parts:
    """Neighbours of the same sort as one part; a blank between two parts that differ differs too."""
    found: Parts = []
    for text, differs in parts:
        if differs and len(found) > 1 and found[-1][0].isspace() and found[-2][1]:
            blank = found.pop()[0]
            found[-1] = (found[-1][0] + blank + text, True)
        elif found and found[-1][1] == differs:
            found[-1] = (found[-1][0] + text, differs)
        else:
            found.append((text, differs))
    return found
