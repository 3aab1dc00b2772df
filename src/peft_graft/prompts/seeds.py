"""A few example prompts, and new ones like them: how a model is asked for more, and what of its words is taken."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from peft_graft.alignment.distinct import words_of
from peft_graft.alignment.text import shuffled_rows
from peft_graft.errors import TextError
from peft_graft.prompts.conversation import Message, Prompt
from peft_graft.prompts.read import PromptLike, PromptSource

#: Examples at least and at most; with more of them there is no need to make any.
LEAST, MOST = 3, 100
#: ROUGE-L from which two prompts count as the same.
ALIKE = 0.7
#: Lengths of new prompts, in those of the shortest and the longest example.
_SHORTEST, _LONGEST = 0.3, 3.0
#: Prompts that a model is asked for at a time.
_MORE = 20
#: Lines that stand between prompts of several lines, the first that no example has.
_SEPARATORS = ("###", "=====", "-----", "<<<>>>")
#: A number or a bullet before an item of a list.
_MARK = re.compile(r"\s*(?:\(?\d{1,4}(?:[.:、](?!\d)|\))\s*|[-*•]\s+)(?=\S)")
_WRAPPED = (("**", "**"), ('"', '"'), ("“", "”"), ("'", "'"), ("`", "`"))

Misfit = Literal["wrong_length", "wrong_shape"]


@dataclass(frozen=True)
class Seeds:
    """Examples of prompts.

    Attributes:
        texts: what the user says in each; sorted where they were read, so that the source's order is of no matter.
        system: the system message before all of them, if any.
        name: where they come from.
    """

    texts: tuple[str, ...]
    system: str | None = None
    name: str = "given in memory"

    @classmethod
    def of(cls, given: PromptLike, columns: tuple[str, ...] | None = None, seed: int = 0) -> Seeds:
        """Read examples.

        Args:
            given: as for ``PromptSource``; also a .txt file with a prompt a line.
            columns, seed: as for ``PromptSource``.

        Raises:
            TextError: they cannot be read, are too few or too many, or are not of one message of the user each.
        """
        name = str(given) if isinstance(given, str | Path) else cls.name
        if isinstance(given, str | Path):
            if Path(given).suffix.lower() == ".txt":
                given = [str(row["text"]) for _, row in shuffled_rows(name, seed)]
        else:
            given = list(given)
        prompts = list(PromptSource(given, columns, seed).prompts()) if given else []
        return cls(tuple(sorted(prompt.text.strip() for prompt in prompts)), _checked(prompts, name), name)

    @property
    def key(self) -> str:
        """What tells them from other examples."""
        return hashlib.sha256(json.dumps([self.texts, self.system]).encode()).hexdigest()

    @property
    def prompts(self) -> list[Prompt]:
        """The examples as prompts."""
        return [self.prompt(text) for text in self.texts]

    def prompt(self, text: str) -> Prompt:
        """A new prompt in the place of an example."""
        user = Message("user", text)
        return Prompt((user,) if self.system is None else (Message("system", self.system), user))

    @cached_property
    def separator(self) -> str | None:
        """The line between prompts, where one of them has several lines itself."""
        if not any("\n" in text for text in self.texts):
            return None
        lines = {line.strip() for text in self.texts for line in text.splitlines()}
        return next((line for line in _SEPARATORS if line not in lines), _SEPARATORS[-1])

    def request(self, chosen: Sequence[str], *, chat: bool) -> str:
        """What asks a model for more prompts.

        Args:
            chosen: the examples that are shown. chat: whether the model takes requests; others go on with a list.
        """
        line = self.separator
        if line is None:
            shown = "\n".join(f"{number}. {text}" for number, text in enumerate(chosen, start=1))
            how, rest = "one per line, numbered", f"\n{len(chosen) + 1}."
        else:
            shown = f"\n{line}\n".join(chosen)
            how, rest = f"with a line {line} between them", f"\n{line}\n"
        if not chat:
            return shown + rest
        return (
            f"Here are examples of requests:\n{shown}\n\nWrite {_MORE} more of the same kind and form, all different, "
            f"{how}. Write nothing else."
        )

    def items(self, said: str, *, whole: bool, chat: bool) -> list[str]:
        """The prompts in a model's answer to ``request``.

        Args:
            whole: whether the model ended it; else its last prompt may be cut and is left out.
        """
        said = said.rpartition("</think>")[2]
        if self.separator is None:
            begun = not chat and said.partition("\n")[0].strip()  # the number of its first item stands in the request
            found = _listed(f"1. {said}" if begun else said)
        else:
            found = re.split(rf"^\s*{re.escape(self.separator)}\s*$", said, flags=re.MULTILINE)
            if chat and found[0].rstrip().endswith(":"):  # what comes before a list
                found = found[1:]
            if not any(_MARK.match(text) for text in self.texts):
                found = [_MARK.sub("", block, count=1) if _MARK.match(block) else block for block in found]
        if not whole and not (self.separator is None and said.endswith("\n")):
            found = found[:-1]
        return [text for text in map(self._bare, found) if text]

    def misfit(self, text: str) -> Misfit | None:
        """Why a text is no prompt like the examples; None for a good one."""
        shortest, longest = (end(map(len, self.texts)) for end in (min, max))
        if not _SHORTEST * shortest <= len(text) <= _LONGEST * longest:
            return "wrong_length"
        begin, end = self._edges
        fits = text.startswith(begin) and text.endswith(end) and (self.separator is not None or "\n" not in text)
        return None if fits else "wrong_shape"

    @cached_property
    def _edges(self) -> tuple[str, str]:
        """What all examples begin and end with, up to a sign or a blank, so that no part of a word counts."""
        begin, end = _beginning(self.texts), _beginning([text[::-1] for text in self.texts])[::-1]
        while begin and begin[-1].isalnum():
            begin = begin[:-1]
        while end and end[0].isalnum():
            end = end[1:]
        return begin, end

    def _bare(self, text: str) -> str:
        """Without quotes or stars around it that the examples lack."""
        text = text.strip()
        for begin, end in _WRAPPED:
            inside = text[len(begin) : -len(end)]
            wrapped = inside and text == begin + inside + end and begin not in inside and end not in inside
            if wrapped and not all(seed.startswith(begin) and seed.endswith(end) for seed in self.texts):
                text = inside.strip()
        return text


class Unlike:
    """Texts no two of which are alike by ROUGE-L, the F1 of the longest common subsequence of words.

    Words that all examples have are left out, as they tell none from another: ``name`` of ``name[The Mill]``.

    Args:
        texts: examples. alike: from which score two texts count as the same.
    """

    def __init__(self, texts: Sequence[str], alike: float = ALIKE) -> None:
        self._alike = alike
        known = [set(words_of(text)) for text in texts]
        self._common = set.intersection(*known) if known else set()
        self._kept: list[list[str]] = []
        self._with = defaultdict[str, list[tuple[int, int]]](list)
        for text in texts:
            self._add(self._telling(text))

    def add(self, text: str) -> bool:
        """Keep a text; False where one like it is kept already."""
        words = self._telling(text)
        masks = defaultdict[str, int](int)
        for place, word in enumerate(words):
            masks[word] |= 1 << place
        shared = Counter[int]()
        for word, count in Counter(words).items():
            for number, theirs in self._with.get(word, ()):
                shared[number] += min(count, theirs)
        for number, most in shared.items():  # the words in common, in any order, bound those in the same order
            other = self._kept[number]
            enough = self._alike * (len(words) + len(other)) / 2
            if most >= enough and _subsequence(masks, len(words), other) >= enough:
                return False
        self._add(words)
        return True

    def _add(self, words: list[str]) -> None:
        for word, count in Counter(words).items():
            self._with[word].append((len(self._kept), count))
        self._kept.append(words)

    def _telling(self, text: str) -> list[str]:
        words = words_of(text)
        return [word for word in words if word not in self._common] or words


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts), max(texts)
    return first[: next((place for place, letter in enumerate(first) if letter != last[place]), len(first))]


def _subsequence(masks: dict[str, int], size: int, other: Iterable[str]) -> int:
    """Length of the longest common subsequence, of a text given by the places of its words, all places at once."""
    full = (1 << size) - 1
    row = full
    for word in other:
        hits = row & masks.get(word, 0)
        row = ((row + hits) | (row - hits)) & full
    return size - row.bit_count()


def _listed(said: str) -> list[str]:
    """Items of a list, those that go on in the next line with it; all lines where none has a number or bullet."""
    found, inside = list[str](), False
    for line in said.splitlines():
        mark = _MARK.match(line)
        if mark:
            found.append(line[mark.end() :])
        elif inside and line.strip():
            found[-1] += f"\n{line}"
        inside = bool(mark) or (inside and bool(line.strip()))
    return found or [line for line in said.splitlines() if line.strip() and not line.rstrip().endswith(":")]


def _checked(prompts: Sequence[Prompt], name: str) -> str | None:
    """The system message of examples.

    Raises:
        TextError: too few or too many of them, or conversations.
    """
    where = f"--seeds {name}"
    if len(prompts) < LEAST:
        raise TextError(
            "too few examples to make prompts from",
            where=where,
            expected=f"at least {LEAST}, better 5 to 15",
            found=len(prompts),
            fix="add prompts of the kind that the module was trained for",
        )
    if len(prompts) > MOST:
        raise TextError(
            "so many examples are prompts already",
            where=where,
            expected=f"at most {MOST}",
            found=len(prompts),
            fix="give them with --text",
        )
    for prompt in prompts:
        roles = [message.role for message in prompt.messages]
        if roles not in (["user"], ["system", "user"]):
            raise TextError(
                "an example takes one message of the user",
                where=where,
                expected="user, or system and user",
                found=", ".join(roles),
                fix="leave conversations out",
            )
    systems = {prompt.messages[0].content if len(prompt.messages) > 1 else None for prompt in prompts}
    if len(systems) > 1:
        raise TextError(
            "the examples have several system messages",
            where=where,
            expected="the same before all of them, or none",
            found=len(systems),
            fix="make prompts of one kind at a time",
        )
    return systems.pop()
