"""Prompts where there are none: a language model goes on with a list of examples, and what is good in it is kept."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from peft_graft.distill.generate import Answer, AnswerStore, Sampling, generate_answers
from peft_graft.errors import TextError
from peft_graft.models.output import LanguageModel
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.seeds import Seeds, Unlike
from peft_graft.prompts.template import Template
from peft_graft.record import Record

#: Continuations that are written at a time, and examples that each of them is shown at most.
BATCH, EXAMPLES = 16, 8
#: How they are drawn.
_TEMPERATURE, _TOP_P = 1.0, 0.95
#: Tokens of a continuation: so many of the longest examples, but no more than that.
_LISTED, _TOKENS = 20, 1024
#: Batches at least, and continuations for each prompt that is wanted, after which it is enough.
_BATCHES, _ATTEMPTS = 8, 2
#: So many batches in a row with fewer new prompts than that end it too.
_IDLE, _NEW = 3, 2


class MadePrompts(Record):
    """How prompts were made.

    Attributes:
        seeds: examples that were given. continuations: of a list of them, that were written.
        made: prompts in these. kept: those that were good.
        duplicates, wrong_length, wrong_shape: left out: too like an example or another one; far shorter or longer than
            the examples; of several lines, or without what all examples begin or end with.
        ended: when as many were there as wanted, when hardly any new ones came, or after so many attempts.
    """

    seeds: int
    continuations: int
    made: int
    kept: int
    duplicates: int
    wrong_length: int
    wrong_shape: int
    ended: Literal["enough", "nothing new", "attempts"]

    @property
    def text(self) -> str:
        """The counts in words."""
        left_out = f"{self.duplicates} duplicates, {self.wrong_length} of another length, {self.wrong_shape} of another"
        return f"{self.kept} of {self.made} that were made; {left_out} shape"


@dataclass(frozen=True)
class Writer:
    """Who goes on with lists.

    Attributes:
        write: continuations of some requests (``Seeds.request``); the number of the batch is all that they may depend
            on beside.
        chat: whether it takes requests, or is given a list to go on with.
        examples: that a request shows at most.
    """

    write: Callable[[Sequence[str], int], Sequence[Answer]]
    chat: bool
    examples: int = EXAMPLES


@dataclass(frozen=True)
class Listing:
    """How a language model reads requests for prompts.

    Attributes:
        template: its chat template where it has one, else no more than the list.
        examples: that a request shows. tokens: of a continuation at most.
    """

    template: Template
    examples: int
    tokens: int

    @property
    def chat(self) -> bool:
        """Whether the model takes requests."""
        return self.template.format is None

    @classmethod
    def of(cls, template: Template, seeds: Seeds, limit: int) -> Listing:
        """How a model reads requests for prompts like these.

        Args:
            template: its own or its module's; only the tokenizer matters. limit: tokens that it reads at most.

        Raises:
            TextError: the examples are too long for it.
        """
        chat = bool(template.tokenizer.chat_template)
        args = {"enable_thinking": False, **template.args}
        own = replace(template, format=None if chat else "{prompt}", system=None, args=args)
        longest = sorted(seeds.texts, key=len, reverse=True)
        for examples in range(min(EXAMPLES, len(longest)), 0, -1):
            size = len(own.ids(Prompt.of_text(seeds.request(longest[:examples], chat=chat))))
            if 2 * size <= limit:
                listed = _LISTED * -(-size // examples)
                return cls(own, examples, min(limit - size, listed, _TOKENS))
        raise TextError(
            "the examples are too long to show them to the model",
            where=f"--seeds {seeds.name}",
            expected=f"at most {limit // 2} tokens",
            found=size,
            fix="give shorter examples, or prompts with --text",
        )

    def writer(self, model: LanguageModel, seed: int) -> Writer:
        """The model as one that writes prompts."""

        def write(requests: Sequence[str], batch: int) -> list[Answer]:
            drawn = Sampling(max_new_tokens=self.tokens, temperature=_TEMPERATURE, top_p=_TOP_P, seed=seed + batch)
            prompts = [Prompt.of_text(request) for request in requests]
            return generate_answers(
                model.model, self.template, prompts, drawn, batch_size=len(prompts), bf16=model.bf16
            )

        return Writer(write, self.chat, self.examples)


def make_prompts(  # from what, by whom, how many; the rest says where work is kept and who watches
    seeds: Seeds,
    writer: Writer,
    wanted: int,
    *,
    least: int = 1,
    seed: int = 0,
    store: AnswerStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Prompt], MadePrompts]:
    """Make prompts like the examples, in random order.

    Args:
        wanted: it ends with so many, or when no new ones come. least: so many must be there in the end.
        seed: of which examples are shown in which order.
        store: continuations that are in it are not written again. progress: told of (prompts so far, wanted).

    Raises:
        TextError: fewer than ``least`` could be made.
    """
    sieve, found = _Sieve(seeds, wanted), store.load() if store else {}
    batches = max(_BATCHES, -(-_ATTEMPTS * wanted // BATCH))
    idle, written = 0, 0
    while len(sieve.kept) < wanted and idle < _IDLE and written < batches * BATCH:
        before, numbers = len(sieve.kept), range(written, written + BATCH)
        if not all(number in found for number in numbers):
            requests = [_request(seeds, writer, f"{seed} {number}") for number in numbers]
            answers = dict(zip(numbers, writer.write(requests, written // BATCH), strict=True))
            found |= answers
            if store:
                store.add(answers)
        for number in numbers:
            sieve.sift(seeds.items(found[number].text, whole=found[number].ended, chat=writer.chat))
        written += BATCH
        idle = idle + 1 if len(sieve.kept) - before < _NEW else 0
        if progress:
            progress(len(sieve.kept), wanted)
    record = sieve.record(written, "nothing new" if idle >= _IDLE else "attempts")
    if record.kept < least:
        raise TextError(
            "too few prompts could be made from the examples",
            where=f"--seeds {seeds.name}",
            expected=f"at least {least}",
            found=record.text,
            fix="give more examples that differ more in words and length, or prompts with --text",
        )
    random.Random(seed).shuffle(sieve.kept)  # those that come late are rarer, and the first ones judge
    return [seeds.prompt(text) for text in sieve.kept], record


def _request(seeds: Seeds, writer: Writer, seed: str) -> str:
    """A request that shows some of the examples in some order."""
    draw = random.Random(seed)
    most = min(writer.examples, len(seeds.texts))
    return seeds.request(draw.sample(seeds.texts, draw.randint(min(3, most), most)), chat=writer.chat)


@dataclass
class _Sieve:
    """Keeps what is good, up to so many, and counts the rest."""

    seeds: Seeds
    wanted: int
    kept: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._unlike = Unlike(self.seeds.texts)

    def sift(self, texts: Sequence[str]) -> None:
        for text in texts:
            if len(self.kept) >= self.wanted:
                return
            self.counts["made"] += 1
            problem = self.seeds.misfit(text)
            if problem is None and self._unlike.add(text):
                self.kept.append(text)
            else:
                self.counts[problem or "duplicates"] += 1

    def record(self, continuations: int, otherwise: Literal["nothing new", "attempts"]) -> MadePrompts:
        names = ("made", "duplicates", "wrong_length", "wrong_shape")
        return MadePrompts(
            seeds=len(self.seeds.texts),
            continuations=continuations,
            kept=len(self.kept),
            ended="enough" if len(self.kept) >= self.wanted else otherwise,
            **{name: self.counts[name] for name in names},
        )
