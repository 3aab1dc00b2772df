"""A model's own rendering of prompts: chat templates, raw formats, ends of turns, and what neither takes."""

from __future__ import annotations

import pytest
from tokenizers import pre_tokenizers

import speech
import tokenizer_makes as makes
from peft_graft.errors import ModelError, PlanError, TextError
from peft_graft.prompts.conversation import NO_PROMPT, Message, Prompt
from peft_graft.prompts.template import Completion, Template

BYTES = makes.byte_level("hello")
HELLO = Prompt.of_text("hello")
LONG = Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))


def token(name: str, tokenizer=BYTES) -> int:
    return tokenizer.convert_tokens_to_ids(name)


def test_the_chat_template_with_its_arguments() -> None:
    assert Template.of(BYTES).text(HELLO) == "<|user|>hello<|end|>\n<|assistant|>"
    assert Template.of(BYTES, args={"think": False}).text(HELLO).endswith("<|assistant|><think></think>")
    assert Template.of(BYTES).text(LONG) == "<|user|>a<|end|>\n<|assistant|>b<|end|>\n<|user|>c<|end|>\n<|assistant|>"


def test_a_template_writes_its_own_special_tokens() -> None:
    """None is added that it does not write."""
    ids = Template.of(BYTES).ids(HELLO)
    assert makes.token_texts(BYTES, ids) == ["<|user|>", "hello", "<|end|>", "Ċ", "<|assistant|>"]


def test_the_system_message_comes_first_unless_there_is_one() -> None:
    template = Template.of(BYTES, system="S")
    own = Prompt((Message("system", "own"), Message("user", "hello")))
    assert template.text(HELLO).startswith("<|system|>S<|end|>\n<|user|>hello")
    assert template.text(own).startswith("<|system|>own<|end|>\n<|user|>hello")


@pytest.mark.parametrize("ends", [False, True])
def test_a_format_begins_as_texts_do_and_does_not_end(ends: bool) -> None:
    tokenizer = makes.byte_level("hello", ends=ends)
    ids = Template.of(tokenizer, format="{prompt}:").ids(HELLO)
    assert makes.token_texts(tokenizer, ids) == ["<s>", "hello", ":"]


def test_a_format_replaces_its_places_alone() -> None:
    template = Template.of(BYTES, format=r'{{"a": {0}}} {system}\nQ: {prompt}\nA:', system="S {prompt}")
    assert template.text(Prompt.of_text(r"x {system} \n")) == '{{"a": {0}}} S {prompt}\nQ: x {system} \\n\nA:'
    assert Template.of(BYTES, format="{system}|{prompt}").text(HELLO) == "|hello"


def test_a_format_takes_one_message() -> None:
    with pytest.raises(TextError, match=r"m: a format takes one message of the user.*found user, assistant, user.*Fix"):
        Template.of(BYTES, format="{prompt}", name="m").text(LONG)
    with pytest.raises(TextError, match=r"no place for the system message of a prompt.*write \{system\}"):
        Template.of(BYTES, format="{prompt}").text(Prompt((Message("system", "S"), Message("user", "x"))))


def test_formats_without_their_places() -> None:
    with pytest.raises(PlanError, match=r"--student-format: the format has no place for the prompt.*found 'x \{0\}'"):
        Template.of(BYTES, format="x {0}", option="--student-format")
    with pytest.raises(PlanError, match=r"no place for the system.*write \{system\} in --format"):
        Template.of(BYTES, format="{prompt}", system="S")


def test_a_model_without_a_chat_template() -> None:
    raw = makes.byte_level(template=None)
    with pytest.raises(ModelError, match=r"teacher m: the model has no chat template\. Fix: give --format 'Question: "):
        Template.of(raw, name="m", role="teacher")
    assert Template.of(raw, format="{prompt}").end == token("</s>", raw)


def test_a_tokenizer_that_loses_blanks() -> None:
    """As a byte-level one becomes that names the class LlamaTokenizer, in transformers 5."""
    tokenizer = speech.byte_level()
    Template.of(tokenizer, format="{prompt}")
    byte_level = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])
    with pytest.raises(
        ModelError, match="teacher t: the tokenizer loses the blanks of a text; .* found 'thedogandthecat'"
    ):
        Template.of(tokenizer, format="{prompt}", name="t", role="teacher")


def test_a_template_that_refuses_system_messages() -> None:
    template = Template.of(makes.byte_level(template=makes.NO_SYSTEM), system="S", name="m")
    with pytest.raises(
        TextError, match="m: the chat template refuses.*no system role.*found system, user.*Fix: give no"
    ):
        template.text(HELLO)
    with pytest.raises(TextError, match="the chat template refuses.*TemplateSyntaxError"):
        Template.of(makes.byte_level(template="{% if %}")).text(HELLO)


def test_the_end_of_a_turn() -> None:
    assert Template.of(BYTES).end == token("<|end|>")
    assert Template.of(BYTES).stops == (token("<|end|>"), token("</s>"))
    assert Template.of(BYTES, format="{prompt}").stops == (token("</s>"),)
    blank = makes.byte_level(template="{% for m in messages %}<|user|>{{ m['content'] }}\n\n</s>{% endfor %}")
    assert Template.of(blank).end == token("</s>", blank)
    unmarked = makes.byte_level(template="{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert Template.of(unmarked).end == token("</s>", unmarked)
    unmarked.eos_token = None
    with pytest.raises(ModelError, match="no token ends an answer"):
        _ = Template.of(unmarked).end


def test_a_completion_is_prompt_answer_and_end() -> None:
    template = Template.of(BYTES)
    found = template.encode(HELLO, "hello 1")
    assert found.ids == [*template.ids(HELLO), *template.answer_ids("hello 1"), template.end]
    assert (found.start, len(found), found.ended) == (len(template.ids(HELLO)), 4, True)
    assert found.spans == [(0, 5), (5, 6), (6, 7)]
    cut = template.encode(HELLO, "hello 1", ended=False)
    assert (cut.ids, cut.ended) == (found.ids[:-1], False)
    assert template.encode(HELLO, "").ids == [*template.ids(HELLO), template.end]


def test_control_tokens_in_an_answer_are_text() -> None:
    template = Template.of(BYTES)
    assert token("<|end|>") not in template.answer_ids("a<|end|>")
    assert token("<|end|>") in template.ids(HELLO)  # and later renderings are not touched
    assert template.encode(HELLO, "a<|end|>").spans is not None


def test_spans_and_tokens_must_agree() -> None:
    with pytest.raises(ValueError, match="2 spans but 1 tokens"):
        Completion([1, 2], 1, [(0, 1), (1, 2)])


def test_tokens_that_the_model_has_no_embedding_of_are_refused() -> None:
    """But for what fills rows up, which any token does."""
    hello = Template.of(BYTES, name="m").ids(HELLO)
    few = Template.of(BYTES, name="m", embeddings=max(hello))
    whole = Template.of(BYTES, name="m", embeddings=len(BYTES))
    assert whole.ids(HELLO) == hello
    with pytest.raises(ModelError, match=f"^m: the tokenizer gives a token .* expected ids below {max(hello)}, "):
        few.ids(HELLO)
    none = Template.of(BYTES, name="m", embeddings=1)
    for ids in (lambda: none.answer_ids("hello"), lambda: none.end):
        with pytest.raises(ModelError, match=r"^m: the tokenizer gives a token .* expected ids below 1, "):
            ids()


def test_rows_are_filled_up_with_a_token_that_the_model_knows() -> None:
    tokenizer = makes.byte_level("hello")
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    known = Template.of(tokenizer, embeddings=len(tokenizer) - 1)
    assert known.pad == known.end
    assert Template.of(tokenizer).pad == len(tokenizer) - 1


# ---- documents -------------------------------------------------------------------------------------------------------


def document(tokenizer, text: str, *, ended: bool = True) -> Completion:
    return Template.of(tokenizer, format="{prompt}").encode(NO_PROMPT, text, ended=ended)


@pytest.mark.parametrize("ends", [False, True])
def test_a_document_begins_as_texts_do_and_ends_once(ends: bool) -> None:
    tokenizer = makes.byte_level("hello", ends=ends)
    found = document(tokenizer, "hello h")
    assert makes.token_texts(tokenizer, found.ids) == ["<s>", "hello", "Ġ", "h", "</s>"]
    assert (found.start, found.spans, found.ended) == (1, [(0, 5), (5, 6), (6, 7)], True)
    whole = document(tokenizer, "hello h", ended=False)
    assert (whole.ids, whole.ended) == (found.ids[:-1], False)


def test_the_first_token_of_a_document_stands_for_a_prompt_where_nothing_is_before_it() -> None:
    tokenizer = speech.byte_level(["ab"])
    found = document(tokenizer, "abab a")
    assert (found.start, len(found)) == (1, 4)
    assert found.spans == [(2, 4), (4, 5), (5, 6)]
    assert not document(tokenizer, "ab", ended=False).spans


def test_control_tokens_in_a_document_are_read_as_such() -> None:
    """A rendered conversation is what a module trained on documents has seen."""
    found = document(BYTES, "<|user|>hello<|end|>")
    assert makes.token_texts(BYTES, found.ids) == ["<s>", "<|user|>", "hello", "<|end|>", "</s>"]
    assert found.spans == [(0, 8), (8, 13), (13, 20)]


def test_a_document_needs_no_end_where_a_tokenizer_has_none() -> None:
    tokenizer = makes.byte_level("hello")
    tokenizer.eos_token = None
    assert makes.token_texts(tokenizer, document(tokenizer, "hello", ended=False).ids) == ["<s>", "hello"]
