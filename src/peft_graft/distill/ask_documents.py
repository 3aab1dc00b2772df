"""What a language model's teacher says of plain text: documents, as the completions of no prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from peft_graft.alignment.distinct import Parts
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Agreement
from peft_graft.distill.ask_prompts import check_speaks, longest_text
from peft_graft.distill.completions import CompletionDistillation, CompletionRecord, Templates
from peft_graft.distill.distillation import ASKING
from peft_graft.distill.generate import Answer
from peft_graft.distill.likelihood import answer_losses
from peft_graft.distill.prompt_targets import PromptTargets
from peft_graft.errors import ModelError, PairingError, PlanError, TextError
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.output import LanguageModel, language_model
from peft_graft.models.spec import LM_HEAD_ROLE
from peft_graft.models.tasks import Task
from peft_graft.planning.sources import ModelSources
from peft_graft.prompts.conversation import NO_PROMPT, Prompt
from peft_graft.prompts.pairing import PairingShares
from peft_graft.prompts.template import Completion, Template
from peft_graft.prompts.token_bytes import shared_tokens, token_bytes
from peft_graft.run import Run

#: Documents that judge, and that choose, at most.
HELD_OUT = 100
#: Tokens of a document that are read where nothing is said.
LONGEST = 512
#: Documents whose tokens are paired before any weights are loaded.
LOOKED_AT = 200
#: No token of a text that is cut has more signs.
_SIGNS = 32
#: A text that is cut ends where a word does, if there is an end in its last part of so many.
_LAST = 4
#: What a model reads that is tried.
_EXAMPLE = "the dog and the cat"
_FEATURES = "FEATURE_EXTRACTION"


class DocumentRecord(CompletionRecord):
    """Plain text that a language model's graft learned the teacher's distributions on, and how its tokens pair.

    Attributes:
        documents: that are learned from.
        cut: of which only the first ``longest`` tokens are read. too_short: left out, being of a single token.
        tokens: of the student, of what is learned from.
        nats_a_byte: minus the log-likelihood of the text that judges, by who reads it: ``teacher``, ``teacher base``,
            ``student`` and ``graft``.
        bare_divergence: of the student without the module from the teacher, at strict positions of that text, nats.
    """

    documents: int
    cut: int
    longest: int
    too_short: int
    tokens: int
    nats_a_byte: dict[str, float]
    bare_divergence: float = 0.0

    def verdict(self, measured: Agreement) -> list[str]:
        """The figures of a verdict in sentences."""
        nats = {who: f"{value:.3f}" for who, value in self.nats_a_byte.items()}
        return [
            f"At {measured.answers:,} positions of held-out text it is {measured.divergence:.3f} nats from the "
            f"teacher; the student without it, {self.bare_divergence:.3f}.",
            f"Minus the log-likelihood of that text is {nats['graft']} nats a byte, for the student alone "
            f"{nats['student']}; for the teacher {nats['teacher']} with its module and {nats['teacher base']} without.",
        ]


@dataclass(frozen=True, kw_only=True)
class DocumentDistillation(CompletionDistillation):
    """The teacher's distributions on plain text.

    Attributes:
        record: what reports say about it.
    """

    record: DocumentRecord

    undefined: ClassVar[str | None] = (
        "the student says of the held-out text what the teacher does without any module, so nothing can be seen of the "
        "graft; give text of the kind that the module was trained for"
    )

    def record_with(self, graft: AttachedModel) -> DocumentRecord:
        """The record, with what the graft and the student without it say of the text that judges."""
        own = _nats_a_byte(graft, self.templates.student, self.answers)
        bare = sum(self.bare_judging) / max(1, self.judging.positions)
        known = self.record.nats_a_byte | {"graft": own}
        return self.record.model_copy(update={"nats_a_byte": known, "bare_divergence": bare})


@dataclass(frozen=True)
class DocumentTargets(PromptTargets):
    """The same of documents: what they say is not the teacher's, and so is not learned."""

    idle: ClassVar[str] = "the module changes nothing on this text, so nothing of it can be seen"
    what_to_give: ClassVar[str] = "give text of the kind that the module was trained for"

    def _text(self, number: int, side: Completion, strict: Sequence[int], index: Tensor) -> Tensor:
        return torch.empty(0, 2, dtype=torch.int64)

    def _effect(self, gains: Tensor) -> Tensor:
        return gains.abs()

    def _name(self, row: int) -> str:
        return self.answered[row][1].text


@dataclass
class Documents:
    """Documents, as far as they are read.

    Attributes:
        answers: each as an answer to no prompt; one that is whole has an end. numbers: which of the samples they are.
        cut: how many are not whole. too_short: how many were left out.
    """

    answers: list[Answer] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    cut: int = 0
    too_short: int = 0

    @property
    def answered(self) -> list[tuple[Prompt, Answer]]:
        """Each with its prompt, which is none."""
        return [(NO_PROMPT, answer) for answer in self.answers]


@dataclass(frozen=True)
class DocumentAsking:
    """How the teacher is asked about documents.

    Attributes:
        templates: of no prompts. longest: tokens of a document that are read. seed: of the intervals.
        bf16, gradient_checkpointing: see ``Distillation``.
    """

    templates: Templates
    longest: int = LONGEST
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False

    @staticmethod
    def of(config: GraftConfig, sources: ModelSources, shapes: ModelPair, raw: RawCheckpoint) -> DocumentAsking:
        """How documents are put to the models; tokenizers are loaded, and no weights.

        Args:
            raw: the teacher's module. shapes: of the models that ``sources`` name.

        Raises:
            ModelError: a model has no output layer, the module is for none, or a tokenizer's tokens cannot be told.
            PairingError: the vocabularies have no token in common.
        """
        if raw.config.get("task_type") == _FEATURES:
            raise ModelError("the module is for features, its configuration says", where=f"task_type {_FEATURES}")
        for model in (shapes.teacher, shapes.student):
            check_has_output(model)
        teacher, student = (
            Template.of(
                tokenizer,
                format="{prompt}",
                name=model.name,
                embeddings=model.architecture.num_embeddings,
                role=role,
            )
            for tokenizer, model, role in zip(
                sources.tokenizer_pair(), (shapes.teacher, shapes.student), ("teacher", "student"), strict=True
            )
        )
        templates = Templates(teacher, student)
        if not templates.same_tokens:
            shared_tokens(token_bytes(teacher.tokenizer), token_bytes(student.tokenizer))
        limits = (longest_text(model, config.max_length or LONGEST) for model in (shapes.teacher, shapes.student))
        return DocumentAsking(
            templates,
            min(limits),
            config.seed,
            config.dtype == "bfloat16",
            config.gradient_checkpointing,
        )

    def read(self, samples: Iterable[Sample]) -> Documents:
        """Documents, as far as both models read them."""
        whole = all(template.tokenizer.eos_token_id is not None for template in self._both)
        found = Documents()
        for number, sample in enumerate(samples):
            text, is_cut = self._cut("\n".join(sample.texts))
            if all(len(template.encode(NO_PROMPT, text, ended=False)) for template in self._both):
                found.answers.append(Answer(text, ended=whole and not is_cut))
                found.numbers.append(number)
                found.cut += is_cut
            else:
                found.too_short += 1
        return found

    def shares(self, documents: Documents) -> PairingShares:
        """How the tokens of documents pair."""
        return self.templates.encoded(documents.answered).shares

    def check_pairs(self, samples: Sequence[Sample]) -> None:
        """Refuse models that read no token of a text alike.

        Raises:
            PairingError: they do not, in the first samples. TextError: these are all too short.
        """
        read = self.read(samples[:LOOKED_AT])
        _check_length([read])
        if not self.shares(read).strict:
            raise PairingError("no token of the text is the same bytes to both models")

    def check_speaks(self, models: ModelPair) -> None:
        """Refuse models whose logits are not made as is known here.

        Raises:
            ModelError: a model has no output layer, or one that is used in another way.
        """
        for model, template in zip((models.teacher, models.student), self._both, strict=True):
            check_speaks(language_model(model, bf16=self.bf16), template.encode(NO_PROMPT, _EXAMPLE, ended=False).ids)

    def ask(
        self, checkpoint: PeftCheckpoint, models: ModelPair, parts: Parts[Sample], run: Run, *, train: int
    ) -> DocumentDistillation:
        """Ask the teacher about documents, and prepare what the student learns from that.

        Args:
            checkpoint: the teacher's module. parts: of the text. train: how many to learn from at most.

        Raises:
            TextError: documents that are too short, or a module that changes nothing on them.
            NotFiniteError: what the teacher says is not finite.
        """
        with run.stage(ASKING):
            read = [self.read(part) for part in (parts.judging, parts.choosing, parts.learning[:train])]
            _check_length(read)
            judging, choosing, learning = read
            held = len(judging.answers) + len(choosing.answers)
            student, base = (language_model(model, bf16=self.bf16) for model in (models.student, models.teacher))
            teacher = attach(checkpoint.raw, models.teacher, bf16=self.bf16, speaks=True)
            rows = [row for part in read for row in part.answered]
            learned = DocumentTargets(teacher, student, self.templates, rows, held, len(judging.answers)).made(run)
            of_teacher, of_student = self._both
            known = {
                "teacher": _nats_a_byte(teacher, of_teacher, judging.answers),
                "teacher base": _nats_a_byte(base, of_teacher, judging.answers),
                "student": _nats_a_byte(student, of_student, judging.answers),
            }
        record = DocumentRecord(
            **dict(learned.record),
            documents=len(learned.train),
            cut=sum(part.cut for part in read),
            longest=self.longest,
            too_short=sum(part.too_short for part in read),
            tokens=learned.train.tokens,
            nats_a_byte=known,
        )
        return DocumentDistillation(
            models,
            teacher,
            (),
            self.bf16,
            [Sample(answer.text) for answer in learning.answers],
            templates=self.templates,
            columns=learned.columns,
            train=learned.train,
            held_out=learned.held_out,
            judging=learned.judging,
            asked=[NO_PROMPT] * len(judging.answers),
            answers=judging.answers,
            groups=[parts.groups[number] for number in judging.numbers],
            seed=self.seed,
            processes=run.processes,
            record=record,
            gradient_checkpointing=self.gradient_checkpointing,
        ).beside(student)

    @property
    def _both(self) -> tuple[Template, Template]:
        return self.templates.teacher, self.templates.student

    def _cut(self, text: str) -> tuple[str, bool]:
        """As much of a text as both models read, and whether that is not all."""
        whole, text = len(text), text[: _SIGNS * self.longest]
        while (end := min(self._room(template, text) for template in self._both)) < len(text):
            text = text[:end]
        return text, len(text) < whole

    def _room(self, template: Template, text: str) -> int:
        """How many signs of a text a model reads, up to the end of a word."""
        found = template.tokenizer(text, add_special_tokens=True, return_offsets_mapping=True, verbose=False)
        last = self.longest - 1  # and one more for its end
        if len(found["input_ids"]) <= last:
            return len(text)
        end = min(len(text) - 1, max(end for _, end in found["offset_mapping"][:last]))
        return max((place for place in range(end - end // _LAST, end) if text[place].isspace()), default=end)


def check_documents(config: GraftConfig) -> None:
    """Refuse choices that are about answers to prompts.

    Raises:
        PlanError: the teacher's text is to be learned, or the student's own answers are.
    """
    for option, chosen in (("--learn text", config.learn == "text"), ("--on-policy", bool(config.on_policy))):
        if chosen:
            raise PlanError(
                "this is about answers to prompts, and the text is plain",
                where=option,
                fix="leave it out, or give prompts",
            )


def check_has_output(model: ModelHandle) -> None:
    """Refuse a model that has no output layer of its own, as its configuration or the live model says.

    Raises:
        ModelError: it has none.
    """
    named = model.base.config.architectures or ()
    speaks = any(Task.of_class(name) is Task.CAUSAL_LM for name in named)
    if model.output is None and not (speaks and LM_HEAD_ROLE in model.architecture.vocabulary):
        raise ModelError("the model has no output layer", where=model.name)


def _check_length(parts: Sequence[Documents]) -> None:
    """Refuse documents of which none is left, in one of the parts.

    Raises:
        TextError: they are too short.
    """
    if not all(part.answers for part in parts):
        raise TextError(
            "the documents are too short: of a single token nothing can be foreseen",
            where="--text",
            expected="documents of some words",
            found=f"{sum(part.too_short for part in parts)} of one token or none",
        )


def _nats_a_byte(model: AttachedModel | LanguageModel, template: Template, answers: Sequence[Answer]) -> float:
    texts = [answer.text for answer in answers]
    losses = answer_losses(model, template, [NO_PROMPT] * len(texts), texts, ended=False)
    return sum(loss.nats for loss in losses) / max(1, sum(loss.size for loss in losses))
