"""The forms in which data sets hold prompts, and what is refused by name of source and row."""

from __future__ import annotations

from typing import Any

import pytest

from peft_graft.errors import TextError
from peft_graft.prompts.conversation import Message, Prompt, prompts_of_row

USER, SYSTEM = Message("user", "Q"), Message("system", "S")


def read(row: dict[str, Any], columns: list[str] | None = None) -> list[Prompt] | None:
    return prompts_of_row(row, columns, "d.jsonl line 3")


def turns(*pairs: tuple[str, Any], keys: tuple[str, str] = ("role", "content")) -> list[dict[str, Any]]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize("name", ["completion", "response", "answer", "chosen"])
def test_prompt_and_answer(name: str) -> None:
    assert read({"prompt": "Q", name: "A"}) == [Prompt.of_text("Q", "A")]
    assert read({"prompt": turns(("user", "Q")), name: turns(("assistant", "A"))}) == [Prompt.of_text("Q", "A")]


def test_a_prompt_alone_and_a_blank_one() -> None:
    assert read({"prompt": "Q"}) == read({"prompt": "Q", "completion": None}) == [Prompt((USER,))]
    assert read({"prompt": " \n"}) == read({"prompt": None}) == read({"messages": None}) == []


def test_all_accepted_answers() -> None:
    assert Prompt.of_text("Q", "A").references == ("A",)
    assert read({"prompt": "Q", "references": ["A", "B"]}) == [Prompt((USER,), "A", ("A", "B"))]
    assert read({"prompt": "Q", "answer": "C", "references": ["A", "B"]}) == [Prompt((USER,), "C", ("A", "B"))]


def test_a_prompt_for_each_turn_of_the_assistant() -> None:
    row = turns(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"), ("user", "T"))
    prompts = read({"messages": row})
    assert prompts is not None
    assert [(len(prompt.messages), prompt.answer, prompt.text) for prompt in prompts] == [
        (2, "A", "Q"),
        (4, "B", "R"),
        (6, None, "T"),
    ]
    assert prompts[1].messages[:3] == (SYSTEM, USER, Message("assistant", "A"))


def test_an_assistant_that_speaks_first_or_twice_answers_nothing() -> None:
    row = turns(("assistant", "Hi"), ("user", "Q"), ("assistant", "A"), ("assistant", "B"))
    assert read({"messages": row}) == [Prompt((Message("assistant", "Hi"), USER), "A")]


def test_answers_to_a_tool() -> None:
    prompts = read({"messages": turns(("user", "Q"), ("assistant", "call"), ("tool", "5"), ("assistant", "A"))})
    assert prompts is not None
    assert [prompt.answer for prompt in prompts] == ["call", "A"]
    assert prompts[1].text == "Q"


def test_alpaca_and_dolly() -> None:
    assert read({"instruction": "Q", "input": "", "output": "A", "text": "x"}) == [Prompt.of_text("Q", "A")]
    assert read({"instruction": "Q", "input": "x", "output": "A"}) == [Prompt.of_text("Q\n\nx", "A")]
    assert read({"instruction": "Q", "context": "x", "response": "A"}) == [Prompt.of_text("Q\n\nx", "A")]
    assert read({"instruction": "Q", "system": "S"}) == [Prompt((SYSTEM, USER))]


def test_sharegpt() -> None:
    row = turns(("system", "S"), ("human", "Q"), ("gpt", "A"), keys=("from", "value"))
    assert read({"conversations": row}) == [Prompt((SYSTEM, USER), "A")]


def test_named_columns_are_prompt_and_answer() -> None:
    row = {"question": "Q", "sql": "A", "prompt": "other"}
    assert read(row, ["question"]) == [Prompt.of_text("Q")]
    assert read(row, ["question", "sql"]) == [Prompt.of_text("Q", "A")]
    with pytest.raises(
        TextError, match=r"line 3: the text has no such columns; expected some of question, sql, prompt, found a.*--col"
    ):
        read(row, ["a", "sql"])
    with pytest.raises(TextError, match="too many columns; expected one or two, found 3"):
        read(row, ["question", "sql", "prompt"])


def test_plain_text_is_no_prompt() -> None:
    assert read({"text": "x"}) is None
    assert read({"premise": "x", "hypothesis": "y"}) is None


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
    assert read({"messages": turns(("user", parts))}) == read({"prompt": parts}) == [Prompt.of_text("Q?")]


def test_half_a_letter_in_json() -> None:
    assert read({"prompt": "a\ud83d", "completion": "\U0001f917"}) == [Prompt.of_text("a\ufffd", "🤗")]


def test_the_key_is_of_the_messages_alone() -> None:
    assert Prompt.of_text("Q").key == Prompt.of_text("Q", "A").key != Prompt((SYSTEM, USER)).key


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "column messages: there are no messages; expected a list of role and content, found"),
        ({"messages": "x"}, "there are no messages.*found str"),
        ({"messages": turns(("robot", "x"))}, "column messages message 1: unknown role; expected .*user.*found robot"),
        ({"messages": turns((["user"], "x"))}, "unknown role"),
        ({"messages": [{"text": "x"}]}, "this is no message; expected role and content, or from and value, found text"),
        ({"messages": turns(("user", None))}, "content that is not text; expected a string, found NoneType"),
        ({"messages": turns(("user", [{"type": "image"}]))}, "content that is not text.*found image"),
        ({"messages": turns(("system", "x"))}, "no message that an assistant could answer.*found system"),
        (
            {"conversations": turns(("bing", "x"), keys=("from", "value"))},
            "column conversations message 1: unknown role",
        ),
        (
            {"prompt": turns(("assistant", "x"))},
            "does not end with a message to answer; expected user, found assistant",
        ),
        ({"prompt": 3}, "column prompt: content that is not text; expected a string, found int"),
        ({"prompt": "Q", "answer": 4}, "column answer: content that is not text.*found int"),
        ({"prompt": "Q", "chosen": turns(("user", "x"))}, "the answer is not the assistant's.*found user"),
        ({"prompt": "Q", "references": "A"}, "the accepted answers are no list.*found str"),
        ({"instruction": "Q", "input": ["x"]}, "column input: content that is not text.*found list"),
    ],
)
def test_what_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TextError, match=rf"^d\.jsonl line 3.*{message}"):
        read(row)
