"""What a student learns of the teacher's answers: which tokens pair, and what the teacher says there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.completions import BATCH, CompletionRecord, Templates, last_states
from peft_graft.distill.distillation import ASKING
from peft_graft.distill.excess import gains_of
from peft_graft.distill.finite import check_finite
from peft_graft.distill.generate import Answer
from peft_graft.distill.token_targets import Columns, CompletionTargets, VocabularyPart, chunks, likeliest
from peft_graft.distill.training import length_batches
from peft_graft.errors import TextError
from peft_graft.models.output import LanguageModel, OutputLayer
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.template import Completion
from peft_graft.prompts.token_bytes import shared_tokens, token_bytes
from peft_graft.run import Run

#: Tokens beside the shared ones that a student of a larger vocabulary is watched for: the likeliest by its own answer.
_OTHERS, _ASKED_FOR_OTHERS = 4096, 64
#: Nats a token by which the module must change the teacher's answers, to be worth moving on these prompts.
LEAST_CHANGE = 1e-3


@dataclass(frozen=True)
class Learned:
    """What a student learns of answers, and what it is chosen and judged by.

    Attributes:
        columns, train, held_out, judging: see ``CompletionDistillation``. record: what is said of them.
    """

    columns: Columns
    train: CompletionTargets
    held_out: CompletionTargets
    judging: CompletionTargets
    record: CompletionRecord


@dataclass(frozen=True)
class PromptTargets:
    """Makes what the student learns of the teacher's answers.

    Attributes:
        teacher: with its module inside. student: without one. templates: how they read prompts.
        answered: prompts with their answers. held_out: how many of them, the first ones, are not learned from.
        judging: how many of these, again the first ones, judge.
        text_only, use_given: see ``ask_prompts.Asking``. where: the prompts come from, for messages.
    """

    teacher: AttachedModel
    student: LanguageModel
    templates: Templates
    answered: Sequence[tuple[Prompt, Answer]]
    held_out: int
    judging: int
    text_only: bool = False
    use_given: bool = False
    where: str = "--text"

    #: What is said where the module has no effect.
    idle: ClassVar[str] = (
        "the module makes the teacher's answers no likelier, so nothing of it can be seen on these prompts"
    )
    what_to_give: ClassVar[str] = (
        "give prompts of the task that the module was trained for, in the format that it was trained with"
    )

    def made(self, run: Run) -> Learned:
        """Ask the teacher.

        Raises:
            TextError: the module makes the answers no likelier. PairingError: the tokenizers share no token.
            NotFiniteError: what the teacher says is not finite.
        """
        sides = self.templates.encoded(self.answered)
        pairs, students, shares = sides.pairs, sides.student, sides.shares
        columns = self._columns(students)
        top, log_p, effect = self._teacher_says(sides.teacher, [pair.teacher for pair in pairs], columns, run)
        index = columns.index()
        text = [self._text(number, side, pairs[number].student, index) for number, side in enumerate(students)]
        targets = CompletionTargets(
            [side.ids for side in students],
            [side.start for side in students],
            [torch.tensor(pair.student, dtype=torch.int64) for pair in pairs],
            top,
            log_p,
            text,
        )
        if effect < LEAST_CHANGE:
            raise TextError(
                self.idle,
                where=self.where,
                expected=f"at least {LEAST_CHANGE} nats a token",
                found=f"{effect:.5f}",
                fix=self.what_to_give,
            )
        rows = range(len(targets))
        train = targets.part(rows[self.held_out :])
        if self.text_only:
            none = torch.empty(0, top[0].shape[1], dtype=torch.int64)
            blank = [none] * len(train)
            train = replace(train, strict=[none[:, 0]] * len(train), top=blank, log_p=[none.float()] * len(train))
        record = CompletionRecord(
            held_out=self.held_out,
            judging=self.judging,
            shared_tokens=columns.shared,
            strict_share=shares.share,
            strict_digits=shares.digit_share,
            module_effect=effect,
        )
        choosing, judging = rows[self.judging : self.held_out], rows[: self.judging]
        return Learned(columns, train, targets.part(choosing), targets.part(judging), record)

    def _text(self, number: int, side: Completion, strict: Sequence[int], index: Tensor) -> Tensor:
        """Positions whose text is learned: those that are not strict; all of an answer that was given."""
        given = self.use_given and number >= self.held_out and self.answered[number][0].answer is not None
        known = set() if given or self.text_only else set(strict)
        rows = [(place, int(index[token])) for place, token in enumerate(side.ids[side.start :]) if place not in known]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)

    def _columns(self, students: Sequence[Completion]) -> Columns:
        """Shared tokens and the ends of turns, then tokens of the answers' text, then what else the student may say.

        Of one vocabulary all tokens, as they are numbered.
        """
        # A tokenizer may have more tokens than its model's output layer: Gemma 3's has one for images.
        bytes_t, bytes_s = (
            token_bytes(side.tokenizer)[: OutputLayer.of(who.model).width]
            for side, who in ((self.templates.teacher, self.teacher), (self.templates.student, self.student))
        )
        ends = self._ends
        size = len(bytes_s)
        if self.templates.same_tokens and all(one == other for one, other in ends):
            size = min(size, len(bytes_t))
            every = VocabularyPart(torch.arange(size), size)
            return Columns(every, every)
        first, second = shared_tokens(bytes_t, bytes_s)
        first, second = (
            torch.cat([tokens, torch.tensor([pair[side] for pair in ends], dtype=torch.int64)])
            for side, tokens in enumerate((first, second))
        )
        known = torch.zeros(size, dtype=torch.bool)
        known[second] = True
        wanted = torch.tensor(sorted({token for side in students for token in side.ids[side.start :]}))
        more = wanted[~known[wanted]]
        known[more] = True
        if 2 * int(known.sum()) < size:
            likely = self._likely(students, known)
            more = torch.cat([more, likely])
        else:
            more = torch.cat([more, (~known).nonzero().flatten()])
        return Columns(VocabularyPart(torch.cat([second, more]), size), VocabularyPart(first, len(bytes_t)))

    def _effect(self, gains: Tensor) -> Tensor:
        """What the module does to tokens of an answer, by how much likelier it makes them."""
        return gains

    def _name(self, row: int) -> str:
        """What messages call a prompt with its answer."""
        return self.answered[row][0].text

    @property
    def _ends(self) -> list[tuple[int, int]]:
        """The teacher's and the student's token of a turn's end, if answers have one."""
        if not any(answer.ended for _, answer in self.answered):
            return []
        return [(self.templates.teacher.end, self.templates.student.end)]

    def _likely(self, students: Sequence[Completion], known: Tensor) -> Tensor:
        """Tokens that the bare student thinks likeliest in these answers, among those that are not known yet."""
        output, total = OutputLayer.of(self.student.model), torch.zeros(len(known))
        asked = students[self.held_out :][:_ASKED_FOR_OTHERS]
        with torch.inference_mode():
            for rows in length_batches([len(side.ids) for side in asked], BATCH):
                states = last_states(self.student, self.templates.student, [asked[row].ids for row in rows])
                for index, row in enumerate(rows):
                    side = asked[row]
                    logits = output.logits(states[index, side.start - 1 : len(side.ids) - 1])[:, : len(known)]
                    total += logits.softmax(-1).sum(0).cpu()
        total[known] = -1.0
        return total.topk(min(_OTHERS, int((~known).sum()))).indices

    def _teacher_says(
        self, sides: Sequence[Completion], strict: Sequence[Sequence[int]], columns: Columns, run: Run
    ) -> tuple[list[Tensor], list[Tensor], float]:
        """Columns and log-probabilities of its likeliest tokens at strict positions, and the module's effect."""
        template, output = self.templates.teacher, OutputLayer.of(self.teacher.model)
        name = f"teacher {template.tokenizer.name_or_path} with its module"

        def ask(rows: Sequence[int]) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
            """Columns, log-probabilities and, of what is held out, what the module does to each token, by row."""
            inputs, held_out = [sides[row].ids for row in rows], rows[0] < self.held_out
            states, effects = last_states(self.teacher, template, inputs), [torch.empty(0)] * len(rows)
            if held_out:
                bare = last_states(self.teacher, template, inputs, module=False)
                gains = gains_of(self.teacher, [sides[row] for row in rows], states, bare)
                effects = [self._effect(value).cpu() for value in gains]
            found = {}
            for index, row in enumerate(rows):
                side = sides[row]
                said = states[index, side.start - 1 : len(side.ids) - 1]
                check_finite(said, name, [self._name(row)], [len(said)])
                parts = [
                    likeliest(columns.teacher.logits(output, said[list(strict[row][part])]).log_softmax(-1))
                    for part in chunks(len(strict[row]), columns.shared)
                ]
                top, log_p = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
                found[row] = top, log_p, effects[index]
            return found

        # What is held out is asked without the module too, so it has batches of its own.
        batches = [*_batches(sides, 0, self.held_out), *_batches(sides, self.held_out, len(sides))]
        with torch.inference_mode():
            found = run.processes.of_batches(batches, ask, partial(run.progress, ASKING))
        top, log_p, effects = zip(*(found[row] for row in range(len(sides))), strict=True)
        effect = torch.cat(effects)
        return list(top), list(log_p), float(effect.sum()) / max(1, len(effect))


def _batches(sides: Sequence[Completion], start: int, end: int) -> Iterator[list[int]]:
    """The completions [start, end) in batches of like length."""
    for rows in length_batches([len(side.ids) for side in sides[start:end]], BATCH):
        yield [start + row for row in rows]
