"""How a model reads prompts and writes answers: its own chat template, or a format that its module was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from peft_graft.config import GraftConfig
from peft_graft.errors import ModelError, PlanError, TextError
from peft_graft.models.checks import check_tokens
from peft_graft.prompts.conversation import Message, Prompt
from peft_graft.prompts.token_bytes import byte_spans, control_tokens, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_graft.models.loading import ModelHandle

_PLACES = re.compile(r"\{(prompt|system)\}")
_EXAMPLE = r"'Question: {prompt}\nAnswer:'"
#: An answer that no template has in itself.
_ANSWER = "zebra"
#: A text in which any tokenizer keeps the blanks.
_WORDS = "the dog and the cat"


@dataclass(frozen=True)
class Completion:
    """A prompt and its answer as one model's tokens.

    Attributes:
        ids: of the prompt, the answer and, where ``ended``, the token that ends the turn.
        start: index of the first token after the prompt; logits that predict completion token k stand at start + k - 1.
        spans: the UTF-8 bytes of the answer that each of its tokens covers, None where the tokens do not join to it.
        prefixed: whether the first token holds a space too that the answer lacks (``byte_spans``).
    """

    ids: list[int]
    start: int
    spans: list[tuple[int, int]] | None
    ended: bool = False
    prefixed: bool = False

    def __post_init__(self) -> None:
        if self.spans is not None and len(self.spans) + self.ended != len(self):
            raise ValueError(f"{len(self.spans)} spans but {len(self)} tokens after the prompt")

    def __len__(self) -> int:
        """Number of tokens after the prompt."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Template:
    r"""How a model reads prompts.

    Attributes:
        tokenizer: a fast one, whose chat template is used unless there is a format.
        format: a text with ``{prompt}`` and, if need be, ``{system}``; other braces stand for themselves, and ``\n``
            typed as two characters is a line's end.
        system: a system message for prompts that have none.
        args: for the chat template, such as ``enable_thinking``.
        name: of the model, for messages. embeddings: number of the tokens that it knows, None where that is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    format: str | None = None
    system: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    embeddings: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: str | None = None,
        system: str | None = None,
        args: Mapping[str, Any] | None = None,
        name: str = "",
        embeddings: int | None = None,
        role: str = "student",
        option: str = "--format",
    ) -> Template:
        """The template of a model.

        Args:
            format, system, args, name, embeddings: see ``Template``.
            role: ``teacher`` or ``student``. option: what sets the format; both for messages.

        Raises:
            ModelError: the tokenizer has no chat template, and no format is given; or it loses the blanks of a text.
            PlanError: the format has no place for the prompt, or none for the system message that is given.
        """
        if format is None and not tokenizer.chat_template:
            raise ModelError(
                "the model has no chat template", where=f"{role} {name}".strip(), fix=f"give {option} {_EXAMPLE}"
            )
        for place, needed in (("prompt", True), ("system", bool(system))):
            if format is not None and needed and f"{{{place}}}" not in format:
                raise PlanError(
                    f"the format has no place for the {place}",
                    where=option,
                    expected=f"{{{place}}} in it",
                    found=repr(format),
                    fix=f"give {option} {_EXAMPLE}" if place == "prompt" else f"write {{system}} in {option}",
                )
        _check_reads_blanks(tokenizer, f"{role} {name}".strip())
        return cls(tokenizer, format, system or None, dict(args or {}), name, embeddings)

    def text(self, prompt: Prompt) -> str:
        """A prompt as the model reads it, up to where the answer begins.

        Raises:
            TextError: the template or the format does not take such a conversation.
        """
        messages = prompt.messages
        if self.system and (not messages or messages[0].role != "system"):
            messages = (Message("system", self.system), *messages)
        return self._rendered(messages) if self.format is None else self._formatted(messages, self.format)

    def ids(self, prompt: Prompt) -> list[int]:
        """A prompt as tokens.

        Raises:
            TextError: see ``text``. ModelError: the model has no embedding of one of them.
        """
        text = self.text(prompt)
        if self.format is None:  # which writes the tokens of a text's beginning itself
            return self._tokens(text)
        encoded = self.tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True, verbose=False)
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        while special and special.pop():  # a token of a text's end: the answer is still to come
            ids.pop()
        return self._known(ids)

    def answer_ids(self, text: str) -> list[int]:
        """An answer alone as tokens; what looks like a control token in it is text."""
        return self._tokens(text, split_special_tokens=True)

    def encode(self, prompt: Prompt, answer: str, *, ended: bool = True) -> Completion:
        """A prompt and its answer, or a document that no prompt comes before, as tokens.

        Args:
            ended: whether the answer is whole, so that the token that ends the turn follows.

        Raises:
            TextError: see ``text``.
            ModelError: see ``end`` and ``token_bytes``.
        """
        if prompt.is_empty:
            return self._document(answer, ended=ended)
        before, ids = self.ids(prompt), self.answer_ids(answer)
        spans, prefixed = byte_spans(ids, token_bytes(self.tokenizer), answer) or (None, False)
        return Completion(before + ids + [self.end] * ended, len(before), spans, ended, prefixed)

    @cached_property
    def _control(self) -> dict[int, bytes]:
        return control_tokens(self.tokenizer)

    def _document(self, text: str, *, ended: bool) -> Completion:
        """A text as the tokenizer reads it by itself, control tokens in it and what it writes before a text included.

        Where that is nothing, the first token takes the place of a prompt, for nothing says what it will be.
        """
        encoded = self.tokenizer(text, add_special_tokens=True, return_special_tokens_mask=True, verbose=False)
        ids, special = self._known(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        first = next((place for place, one in enumerate(special) if not one), len(ids))
        last = next((place for place in range(len(ids), first, -1) if not special[place - 1]), first)
        found = byte_spans(ids[first:last], token_bytes(self.tokenizer), text, self._control)
        spans, prefixed = found or (None, False)
        if not first and last:
            first, spans, prefixed = 1, spans and spans[1:], False
        return Completion(ids[:last] + ([self.end] if ended else []), first, spans, ended, prefixed)

    @cached_property
    def end(self) -> int:
        """The token that ends the assistant's turn.

        Raises:
            ModelError: there is none.
            TextError: the chat template refuses a question and its answer.
        """
        found = self._end_of_turn() if self.format is None else None
        found = self.tokenizer.eos_token_id if found is None else found
        if found is None:
            raise ModelError(
                "no token ends an answer",
                where=self.name or None,
                fix="set the tokenizer's eos_token and save it beside the model",
            )
        return self._known([int(found)])[0]

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which generation stops."""
        eos = self.tokenizer.eos_token_id
        return (self.end,) if eos is None or eos == self.end else (self.end, int(eos))

    @property
    def pad(self) -> int:
        """What fills rows up: the tokenizer's own, if the model knows that, else the token that ends a turn."""
        own = self.tokenizer.pad_token_id
        return self.end if own is None or (self.embeddings is not None and own >= self.embeddings) else int(own)

    def _tokens(self, text: str, **options: bool) -> list[int]:
        return self._known(self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _known(self, ids: Sequence[int]) -> list[int]:
        check_tokens([ids], self.embeddings, self.tokenizer, self.name or None)
        return list(ids)

    def _end_of_turn(self) -> int | None:
        """The first added token that the chat template writes after an answer."""
        turn = (Message("user", "x"), Message("assistant", _ANSWER))
        after = self._rendered(turn, add_generation_prompt=False).rpartition(_ANSWER)[2]
        added = self.tokenizer.added_tokens_decoder  # those of blanks alone are no ends: Gemma's of several lines
        return next((index for index in self._tokens(after) if index in added and added[index].content.strip()), None)

    def _rendered(self, messages: tuple[Message, ...], *, add_generation_prompt: bool = True) -> str:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        options = {**self.args, "add_generation_prompt": add_generation_prompt, "tokenize": False}
        try:
            return str(self.tokenizer.apply_chat_template(turns, **options))
        except (TemplateError, TypeError, ValueError) as error:
            roles = [message.role for message in messages]
            fix = "give no system message" if "system" in roles else "give a conversation that it takes, or a format"
            raise TextError(
                f"the chat template refuses a prompt ({type(error).__name__}: {error})",
                where=self.name or None,
                found=", ".join(roles),
                fix=fix,
            ) from error

    def _formatted(self, messages: tuple[Message, ...], format: str) -> str:
        roles = [message.role for message in messages]
        if roles not in (["user"], ["system", "user"]):
            raise TextError(
                "a format takes one message of the user",
                where=self.name or None,
                expected="user, or system and user",
                found=", ".join(roles) or "no messages",
                fix="give prompts of one message, or leave the format out for the model's chat template",
            )
        if roles[0] == "system" and "{system}" not in format:
            raise TextError(
                "the format has no place for the system message of a prompt",
                where=self.name or None,
                found=repr(format),
                fix="write {system} in the format",
            )
        given = {message.role: message.content for message in messages}
        texts = {"prompt": given["user"], "system": given.get("system", "")}
        return _PLACES.sub(lambda place: texts[place[1]], format.replace("\\n", "\n"))


def template_for(
    tokenizer: PreTrainedTokenizerBase, model: ModelHandle, config: GraftConfig, role: str = "student"
) -> Template:
    """How a model of a transfer reads prompts, as the config says; arguments and errors as for ``Template.of``."""
    is_student = role == "student"
    return Template.of(
        tokenizer,
        format=config.format_of_student if is_student else config.format,
        system=config.system,
        args=config.template_args,
        name=model.name,
        embeddings=model.architecture.num_embeddings,
        role=role,
        option="--student-format" if is_student and not config.format else "--format",
    )


def _check_reads_blanks(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that reads words as if nothing stood between them.

    Transformers 5 makes the tokenizers of some classes (``LlamaTokenizer``) anew from their vocabulary, without looking
    at what ``tokenizer.json`` says of blanks. One of another make that names such a class loses them without a word.
    """
    ids = tokenizer(_WORDS, add_special_tokens=False, verbose=False)["input_ids"]
    found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not any(char.isspace() for char in found.strip()):
        raise ModelError(
            "the tokenizer loses the blanks of a text",
            where=where,
            expected=repr(_WORDS),
            found=repr(found),
            fix='write "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, or use the version of '
            "transformers that it was saved with",
        )
