"""Prompts as messages, and the forms in which data sets hold them.

Messages, never token ids, are what two models share: each renders them by its own template (``prompts.template``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from peft_graft.alignment.text import check_columns
from peft_graft.errors import TextError

#: What data sets call who speaks -> what chat templates call it.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
#: Columns of the answer to a ``prompt`` and to an ``instruction``, the first that is there; names of Alpaca and Dolly.
_ANSWERS = {"prompt": ("completion", "response", "answer", "chosen"), "instruction": ("output", "response")}
_INPUTS = ("input", "context")
#: The columns of which one tells a row of prompts from plain text.
FORMS = "prompt, messages, conversations or instruction"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; roles are those of chat templates: system, user, assistant, tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What an assistant is to answer.

    Attributes:
        messages: the conversation so far, a system message first if any, the last one to be answered.
        answer: the answer that came with it.
        references: all answers that are accepted, for scoring; the answer where only that one is known.
    """

    messages: tuple[Message, ...]
    answer: str | None = None
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.answer is not None and not self.references:
            object.__setattr__(self, "references", (self.answer,))

    @classmethod
    def of_text(cls, text: str, answer: str | None = None) -> Prompt:
        """A prompt of one message of the user."""
        return cls((Message("user", text),), answer)

    @property
    def text(self) -> str:
        """The last message of the user."""
        return next((message.content for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked: what follows is a document, which a model reads from its first word on."""
        return not self.messages

    @property
    def opening(self) -> tuple[str, ...]:
        """What the user begins with; of one message all that tells the prompt from others."""
        return tuple(message.content for message in self.messages if message.role == "user")[:1]

    @cached_property
    def key(self) -> str:
        """The messages in one string, the same for the same messages."""
        return json.dumps([[message.role, message.content] for message in self.messages], ensure_ascii=False)


#: What comes before a document.
NO_PROMPT = Prompt(())


def prompts_of_row(row: Mapping[str, Any], columns: Sequence[str] | None, where: str) -> list[Prompt] | None:
    """The prompts in one row of a data set; none where its prompt is blank.

    Known forms, in this order where a row has several: ``messages`` (role, content) and ``conversations`` (from,
    value), with a prompt for each answer of the assistant; ``prompt`` (text or messages) with ``completion``,
    ``response``, ``answer`` or ``chosen``, and ``references``; ``instruction`` with ``input`` or ``context``,
    ``output`` or ``response``, and ``system``.

    Args:
        columns: the column of the prompt, or those of prompt and answer; found by the names above when not given.
        where: the source and the row, for messages.

    Returns:
        None for a row in no known form, which is plain text.

    Raises:
        TextError: missing columns, no messages, an unknown role, or content that is not text.
    """
    if columns:
        return _flat(row, *_named(row, columns, where), where)
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return _of_conversation(_messages(row[column], f"{where} column {column}"), f"{where} column {column}")
    for column, answers in _ANSWERS.items():
        if column in row:
            answer = next((name for name in answers if row.get(name) is not None), None)
            return _flat(row, column, answer, where)
    return [] if {"messages", "conversations"} & row.keys() else None


def no_prompt(where: str, found: str) -> TextError:
    """The error of a row that is plain text where prompts came before it."""
    return TextError(
        "there is no prompt", where=where, expected=FORMS, found=found, fix="name the prompt's column with --columns"
    )


def _named(row: Mapping[str, Any], columns: Sequence[str], where: str) -> tuple[str, str | None]:
    check_columns(row, columns, where, "name the prompt's column, or those of prompt and answer, with --columns")
    return columns[0], columns[1] if len(columns) == 2 else None


def _flat(row: Mapping[str, Any], column: str, answer: str | None, where: str) -> list[Prompt]:
    """The prompt of a row that holds it in one column and its answer in another."""
    value, place = row[column], f"{where} column {column}"
    if isinstance(value, list) and not _is_parts(value):
        messages = _messages(value, place)
    else:
        text = _content(value, place) if value is not None else ""
        if not text.strip():
            return []
        messages = _instructed(row, text, where) if column == "instruction" else (Message("user", text),)
    if messages[-1].role in ("assistant", "system"):
        raise TextError(
            "the prompt does not end with a message to answer", where=place, expected="user", found=messages[-1].role
        )
    references = _references(row.get("references"), f"{where} column references")
    known = None if answer is None else _answer(row[answer], f"{where} column {answer}")
    return [Prompt(messages, references[0] if known is None and references else known, references)]


def _instructed(row: Mapping[str, Any], instruction: str, where: str) -> tuple[Message, ...]:
    name = next((name for name in _INPUTS if row.get(name) is not None), None)
    given = _content(row[name], f"{where} column {name}") if name else ""
    user = Message("user", f"{instruction}\n\n{given}" if given.strip() else instruction)
    system = _content(row["system"], f"{where} column system") if row.get("system") is not None else ""
    return (Message("system", system), user) if system.strip() else (user,)


def _answer(value: Any, where: str) -> str | None:
    """An answer: text, or a conversation that ends with it."""
    if value is None:
        return None
    if not isinstance(value, list) or _is_parts(value):
        return _content(value, where)
    last = _messages(value, where)[-1]
    if last.role != "assistant":
        raise TextError("the answer is not the assistant's", where=where, expected="assistant", found=last.role)
    return last.content


def _references(value: Any, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise TextError(
            "the accepted answers are no list", where=where, expected="a list of strings", found=type(value).__name__
        )
    return tuple(_content(one, where) for one in value)


def _of_conversation(messages: tuple[Message, ...], where: str) -> list[Prompt]:
    """One prompt for each answer of the assistant, and one for a last message that has none."""
    prompts = []
    for end in range(1, len(messages) + 1):
        answered = messages[end].role == "assistant" if end < len(messages) else None
        if messages[end - 1].role in ("user", "tool") and answered is not False:
            prompts.append(Prompt(messages[:end], messages[end].content if answered else None))
    if not prompts:
        raise TextError(
            "no message that an assistant could answer",
            where=where,
            expected="a message of the user",
            found=", ".join(message.role for message in messages),
        )
    return prompts


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list | tuple) or not value:
        found = "none" if isinstance(value, list | tuple) else type(value).__name__
        raise TextError("there are no messages", where=where, expected="a list of role and content", found=found)
    return tuple(_message(one, f"{where} message {number}") for number, one in enumerate(value, start=1))


def _message(value: Any, where: str) -> Message:
    if isinstance(value, Message):
        return value
    keys = next((keys for keys in (("role", "content"), ("from", "value")) if _has(value, keys)), None)
    if keys is None:
        raise TextError(
            "this is no message",
            where=where,
            expected="role and content, or from and value",
            found=", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__,
        )
    role = value[keys[0]]
    if not isinstance(role, str) or role not in _ROLES:
        raise TextError("unknown role", where=where, expected=f"one of {', '.join(_ROLES)}", found=role)
    return Message(_ROLES[role], _content(value[keys[1]], where))


def _has(value: Any, keys: Sequence[str]) -> bool:
    return isinstance(value, Mapping) and all(key in value for key in keys)


def _is_parts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(part, Mapping) and "type" in part and "role" not in part for part in value)


def _content(value: Any, where: str) -> str:
    """Text, from a string or a list of parts."""
    if isinstance(value, list | tuple) and _is_parts(list(value)):
        other = next((part["type"] for part in value if part["type"] != "text"), None)
        if other is None:
            return "".join(_content(part.get("text"), where) for part in value)
        raise TextError("content that is not text", where=where, expected="parts of type text", found=other)
    if not isinstance(value, str):
        raise TextError("content that is not text", where=where, expected="a string", found=type(value).__name__)
    # JSON may hold half of a character that takes two units of UTF-16, which no tokenizer reads.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
