"""Learning what the teacher says: the text of its answers, and its next-token distributions in other tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.distill.agreement import (
    Agreement,
    Draws,
    GenerationAgreement,
    compare_answers,
    compare_divergences,
)
from peft_graft.distill.distillation import READ, Distillation
from peft_graft.distill.finite import not_finite
from peft_graft.distill.generate import Answer, Sampling, generate_answers
from peft_graft.distill.make_prompts import MadePrompts
from peft_graft.distill.token_targets import (
    Columns,
    CompletionTargets,
    divergence,
    in_chunks,
    reverse_divergence,
    text_loss,
)
from peft_graft.distill.training import length_batches
from peft_graft.models.output import LanguageModel, OutputLayer
from peft_graft.processes import ALONE, Processes
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.pairing import CompletionPairs, PairingShares, pair_completions
from peft_graft.prompts.template import Completion, Template
from peft_graft.prompts.token_bytes import same_tokens
from peft_graft.record import Record
from peft_graft.run import Run

#: Rows of a forward pass without gradients.
BATCH = 32
#: Rows are padded to multiples of this, so that processors do not keep a kernel for every length.
_MULTIPLE = 8


class CompletionRecord(Record):
    """Texts of which a graft learned what the teacher says, and how their tokens pair.

    Attributes:
        held_out: texts that choose or judge. judging: those of them that judge.
        shared_tokens: in both vocabularies.
        strict_share: of the texts' positions, those where distributions are compared; ``strict_digits`` of digits.
        module_effect: what the module does to the log-likelihood of a token, nats, on average: of the teacher's answers
            how much likelier it makes them, of other text how much likelier or less likely.
    """

    held_out: int
    judging: int = 0
    shared_tokens: int
    strict_share: float
    strict_digits: float | None
    module_effect: float


class PromptRecord(CompletionRecord):
    """What was asked, and how the answers paired.

    Attributes:
        prompts: that are learned from.
        too_long: left out, their prompt and the longest answer being longer than a model reads. duplicates: left out.
        cut: answers that came to no end. empty: answers without text. given: answers that came with the prompts.
        answer_tokens: of the student, those that are learned from.
        made: how the prompts were made, where they were. no_excess: left out, the module making the teacher's answer no
            likelier; only of prompts that were made.
    """

    prompts: int
    too_long: int
    duplicates: int
    cut: int
    empty: int
    given: int
    answer_tokens: int
    made: MadePrompts | None = None
    no_excess: int = 0


@dataclass(frozen=True)
class Templates:
    """How each model reads prompts."""

    teacher: Template
    student: Template

    @cached_property
    def same_tokens(self) -> bool:
        """Whether both models have one vocabulary."""
        return same_tokens(self.teacher.tokenizer, self.student.tokenizer)

    def encoded(self, answered: Sequence[tuple[Prompt, Answer]]) -> Sides:
        """Prompts with their answers as the tokens of either model."""
        teacher, student = (
            [template.encode(prompt, answer.text, ended=answer.ended) for prompt, answer in answered]
            for template in (self.teacher, self.student)
        )
        return Sides([answer.text for _, answer in answered], teacher, student, self.same_tokens)


@dataclass(frozen=True)
class Sides:
    """Prompts with their answers as tokens of the teacher and of the student; ``same_tokens``: of one vocabulary."""

    answers: Sequence[str]
    teacher: Sequence[Completion]
    student: Sequence[Completion]
    same_tokens: bool

    @cached_property
    def pairs(self) -> list[CompletionPairs]:
        """Which of them correspond."""
        return [
            pair_completions(*both, same_tokens=self.same_tokens)
            for both in zip(self.teacher, self.student, strict=True)
        ]

    @property
    def shares(self) -> PairingShares:
        """How much of them does."""
        found = PairingShares()
        for pair, student, answer in zip(self.pairs, self.student, self.answers, strict=True):
            found.add(pair, student, answer)
        return found


@dataclass(frozen=True, kw_only=True)
class CompletionDistillation(Distillation):
    """What the teacher says at every position of some texts: of its answers to prompts, or of documents.

    Attributes:
        templates: how the models read prompts. columns: the tokens that distributions are taken over.
        train: to be learned from. held_out: to choose by. judging: to be judged by.
        asked, answers: the prompts that judge, and the teacher's answers to them; of documents no prompts, and these.
        groups: of what judges, the same for what is alike. seed: of the intervals.
        processes: those that share the judging.
        bare, bare_judging: divergences of the student without a module on ``held_out`` and ``judging``, summed over
            the strict positions of each text.
    """

    templates: Templates
    columns: Columns
    train: CompletionTargets
    held_out: CompletionTargets
    judging: CompletionTargets
    asked: Sequence[Prompt]
    answers: Sequence[Answer]
    groups: Sequence[int]
    seed: int = 0
    processes: Processes = ALONE
    bare: Sequence[float] = ()
    bare_judging: Sequence[float] = ()

    speaks: ClassVar[bool] = True
    batch_size: ClassVar[int] = 16
    #: What is said in place of ``Agreement.undefined``, where that speaks of prompts.
    undefined: ClassVar[str | None] = None

    def beside(self, student: LanguageModel) -> Self:
        """The same, with what the student without a module says."""
        bare, judging = (self.divergences(student, part) for part in (self.held_out, self.judging))
        return replace(self, bare=bare, bare_judging=judging)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every prompt with its answer, as the student reads it."""
        return self.train.lengths

    def loss(self, attached: AttachedModel, rows: Sequence[int], done: float = 0.0) -> Tensor:
        """Nats a position: divergence from the teacher's distributions where they can be compared, else of its text."""
        strict, text, count = self._losses(attached, self.train.part(rows))
        return (strict + text) / max(1, count)

    def weight(self, rows: Sequence[int]) -> float:
        """Positions; ``Distillation``."""
        part = self.train.part(rows)
        return max(1.0, float(part.positions + sum(len(place) for place in part.text)))

    def measure(self, attached: AttachedModel) -> Agreement:
        """Agreement at the strict positions of the answers that choose (``Agreement``)."""
        return self._compared(self.divergences(attached, self.held_out), self.bare, self.held_out.sizes)

    def read(self, attached: AttachedModel) -> int:
        """See ``Distillation``; prompts with the teacher's answers."""
        template = self.templates.teacher if attached is self.teacher else self.templates.student
        answered = list(zip(self.asked, self.answers, strict=True))[:READ]
        rows = [template.encode(prompt, answer.text, ended=answer.ended).ids for prompt, answer in answered]
        with torch.inference_mode():
            float(last_states(attached, template, rows).sum())  # to the CPU, and so to the end
        return len(rows)

    def judge(self, attached: AttachedModel) -> Agreement:
        """The same of the answers that judge."""
        found, draws = self.divergences(attached, self.judging), Draws(self.groups, self.seed)
        return self._compared(found, self.bare_judging, self.judging.sizes, draws)

    def _compared(
        self, divergences: Sequence[float], bare: Sequence[float], sizes: Sequence[int], draws: Draws | None = None
    ) -> Agreement:
        found = compare_divergences(divergences, bare, sizes, draws)
        own = self.undefined if found.undefined else None
        return found.model_copy(update={"undefined": own}) if own else found

    def divergences(self, attached: AttachedModel | LanguageModel, targets: CompletionTargets) -> list[float]:
        """The divergence at the strict positions of each answer, summed, nats.

        Raises:
            NotFiniteError: one of them is not finite.
        """
        attached.model.eval()

        def summed(rows: Sequence[int]) -> dict[int, float]:
            part = targets.part(rows)
            states = last_states(attached, self.templates.student, part.inputs)
            return {
                row: float(self._strict_loss(attached, states[index : index + 1], part.part([index])))
                for index, row in enumerate(rows)
            }

        with torch.inference_mode():
            found = self.processes.of_batches(list(length_batches(targets.lengths, BATCH)), summed)
        for row, value in found.items():  # in every process alike
            if not math.isfinite(value):
                text = self.templates.student.tokenizer.decode(targets.inputs[row], skip_special_tokens=True)
                raise not_finite(f"student {self.models.student.name}", str(text))
        return [found[row] for row in range(len(targets))]

    def _strict_loss(
        self, attached: AttachedModel | LanguageModel, states: Tensor, targets: CompletionTargets
    ) -> Tensor:
        """The summed divergence at strict positions of answers, from their last hidden states [rows, length, d]."""
        output, student = OutputLayer.of(attached.model), self.columns.student
        top, log_p = (torch.cat(list(of)).to(states.device) for of in (targets.top, targets.log_p))
        return in_chunks(
            _at(states, targets.strict, targets.starts),
            len(student.ids),
            lambda rows, part: divergence(student.logits(output, rows), top[part], log_p[part]),
            frozen=output.frozen is not None,
        )

    def _losses(self, attached: AttachedModel, targets: CompletionTargets) -> tuple[Tensor, Tensor, int]:
        """Summed losses at strict positions and of text, and how many positions there are."""
        states = last_states(attached, self.templates.student, targets.inputs)
        output, student = OutputLayer.of(attached.model), self.columns.student
        column = torch.cat([place[:, 1] for place in targets.text]).to(states.device)
        text = in_chunks(
            _at(states, [place[:, 0] for place in targets.text], targets.starts),
            len(student.ids),
            lambda rows, part: text_loss(student.logits(output, rows), column[part]),
            frozen=output.frozen is not None,
        )
        return self._strict_loss(attached, states, targets), text, targets.positions + len(column)


@dataclass(frozen=True, kw_only=True)
class PromptDistillation(CompletionDistillation):
    """The teacher's answers to prompts.

    Attributes:
        sampling: how answers are drawn when a graft is judged. bare_answers: those of the student alone.
        record: what reports say about all this.
        prompts: those of ``train``. on_policy: the share of the steps, the last ones, that learn from what the student
            says itself.
    """

    sampling: Sampling
    bare_answers: Sequence[Answer]
    record: PromptRecord
    prompts: Sequence[Prompt] = ()
    on_policy: float = 0.0

    def loss(self, attached: AttachedModel, rows: Sequence[int], done: float = 0.0) -> Tensor:
        """See ``CompletionDistillation``.

        On the student's own answers it is the divergence of the teacher's from the student's (Agarwal et al. 2023,
        arXiv 2306.13649), which teaches nothing while these are no answers; so it comes last.
        """
        if done >= 1 - self.on_policy:
            return self._on_policy_loss(attached, rows)
        return super().loss(attached, rows, done)

    def _on_policy_loss(self, attached: AttachedModel, rows: Sequence[int]) -> Tensor:
        prompts, student = [self.prompts[row] for row in rows], self.templates.student
        drawn = self.sampling.model_copy(
            update={"temperature": 1.0, "top_p": 1.0, "seed": int(torch.randint(2**31, (1,)))}
        )
        said = generate_answers(attached.model, student, prompts, drawn, bf16=attached.bf16)
        attached.model.train()
        answered = list(zip(prompts, said, strict=True))
        sides = self.templates.encoded(answered)
        pairs = sides.pairs
        with torch.no_grad():
            states = last_states(self.teacher, self.templates.teacher, [side.ids for side in sides.teacher])
            places = [torch.tensor(pair.teacher, dtype=torch.int64) for pair in pairs]
            logits = self.columns.teacher.logits(
                OutputLayer.of(self.teacher.model), _at(states, places, [side.start for side in sides.teacher])
            )
            log_p = logits.log_softmax(-1).to(attached.device)
        states = last_states(attached, student, [side.ids for side in sides.student])
        places = [torch.tensor(pair.student, dtype=torch.int64) for pair in pairs]
        output, columns = OutputLayer.of(attached.model), self.columns.student
        total = in_chunks(
            _at(states, places, [side.start for side in sides.student]),
            len(columns.ids),
            lambda given, part: reverse_divergence(columns.logits(output, given), log_p[part]),
            frozen=output.frozen is not None,
        )
        return total / max(1, len(log_p))

    def generate(self, attached: AttachedModel, run: Run) -> tuple[list[Answer], GenerationAgreement]:
        """The student's own answers to the prompts that judge, and how they agree with the teacher's."""
        found = generate_answers(
            attached.model,
            self.templates.student,
            self.asked,
            self.sampling,
            bf16=attached.bf16,
            progress=lambda done, total: run.progress("asking the graft", done, total),
            processes=run.processes,
        )
        return found, compare_answers(found, self.answers, self.bare_answers, self.groups, self.seed)


def _at(states: Tensor, places: Sequence[Tensor], starts: Sequence[int]) -> Tensor:
    """[n, d]: the hidden states that say what stands at places of each completion, which begins at ``starts``."""
    found = [states[row, (place + starts[row] - 1).to(states.device)] for row, place in enumerate(places)]
    return torch.cat(found)


def last_states(
    model: AttachedModel | LanguageModel, template: Template, rows: Sequence[Sequence[int]], *, module: bool = True
) -> Tensor:
    """Last hidden states [rows, longest row, d], rows padded on the right.

    All of it is attended to, for no token sees what follows it: attention is quicker where nothing is masked.
    """
    pad = template.pad
    width = max(map(len, rows))
    width += -width % _MULTIPLE
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=model.device)
    return model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, module=module)[1]
