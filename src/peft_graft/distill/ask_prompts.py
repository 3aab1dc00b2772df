"""Putting prompts to the teacher, and making of its answers what the student learns from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from peft_graft.alignment.distinct import Parts, split
from peft_graft.alignment.text import KNOWN_COLUMNS, Sample, TextLike
from peft_graft.checkpoints.attach import attach
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.answers_on_ray import RayTeacher
from peft_graft.distill.completions import PromptDistillation, PromptRecord, Templates
from peft_graft.distill.distillation import ASKING
from peft_graft.distill.excess import excess_of
from peft_graft.distill.generate import Answer, AnswerStore, Sampling, generate_answers
from peft_graft.distill.make_prompts import MadePrompts
from peft_graft.distill.prompt_targets import LEAST_CHANGE, PromptTargets
from peft_graft.environment import version_of
from peft_graft.errors import TextError, not_installed
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.output import LanguageModel, OutputLayer, language_model
from peft_graft.models.tasks import Task
from peft_graft.planning.sources import ModelSources
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike, PromptSource, check_plain
from peft_graft.prompts.template import Template, template_for
from peft_graft.run import Run

#: Prompts that judge, and that choose, at most.
HELD_OUT = 100
#: Different prompts at least.
LEAST_PROMPTS = 40
#: The bare student's answers are cut at the teacher's longest and one part in so many.
_SPARE = 4
#: Length limits beyond this stand for none.
_NO_LIMIT = 1 << 20


def prompts_of(text: TextLike | PromptLike | None, raw: RawCheckpoint, config: GraftConfig) -> PromptSource | None:
    """The text as prompts, where the module is a language model's and it is no plain text; else None.

    Raises:
        TextError: the text cannot be read, or is neither by its columns.
    """
    if text is None or raw.task is not Task.CAUSAL_LM or config.columns in KNOWN_COLUMNS:
        return None
    found = PromptSource.of(text, config.columns, config.seed)
    if found is None:
        check_plain(text)
    return found


def asking_of(config: GraftConfig, sources: ModelSources, shapes: ModelPair, raw: RawCheckpoint) -> Asking:
    """How prompts are put to the models; tokenizers are loaded, and no weights.

    Args:
        raw: the module. shapes: of the models that ``sources`` name.

    Raises:
        DependencyError: the module's library is not installed. ModelError: a tokenizer cannot be loaded, or reads no
            prompts. PlanError: a format has no place for the prompt.
    """
    if version_of(raw.library) is None:
        raise not_installed(raw.library, "adapters", "--text", so="so the teacher cannot be asked")
    teacher, student = sources.tokenizer_pair()
    templates = Templates(
        template_for(teacher, shapes.teacher, config, "teacher"), template_for(student, shapes.student, config)
    )
    return Asking(
        templates,
        Sampling(max_new_tokens=config.max_new_tokens, seed=config.seed),
        config.max_length,
        config.labels == "use",
        config.max_prompts,
        config.dtype == "bfloat16",
        config.on_policy,
        config.gradient_checkpointing,
        config.learn == "text",
        RayTeacher(str(sources.teacher), config) if config.ray else None,
        raw.virtual_tokens,
    )


@dataclass(frozen=True)
class Asking:
    """How prompts are put to the teacher.

    Attributes:
        templates, sampling: see ``PromptDistillation``. max_length: tokens of prompt and answer, None for the models'.
        use_given: whether answers that came with the prompts are learned in place of the teacher's.
        train: prompts to learn from at most.
        bf16: forward passes in mixed precision.
        text_only: whether the text of the answers is all that is learned (sequence-level distillation, Kim and Rush
            2016, arXiv 1606.07947).
        on_policy: see ``PromptDistillation``. gradient_checkpointing: see ``Distillation``.
        on_ray: the teacher to be asked there.
        virtual: tokens that the module puts before every text.
    """

    templates: Templates
    sampling: Sampling
    max_length: int | None = None
    use_given: bool = False
    train: int = 2000
    bf16: bool = False
    on_policy: float = 0.0
    gradient_checkpointing: bool = False
    text_only: bool = False
    on_ray: RayTeacher | None = None
    virtual: int = 0

    def ask(  # what is asked of whom; the rest tells records and stores apart
        self,
        checkpoint: PeftCheckpoint,
        models: ModelPair,
        prompts: Sequence[Prompt],
        run: Run,
        *,
        key: str = "",
        duplicates: int = 0,
        excess: bool = False,
        made: MadePrompts | None = None,
    ) -> PromptDistillation:
        """Let the teacher answer, and prepare what the student learns from that.

        Args:
            checkpoint: the teacher's module. prompts: in random order.
            key: of the teacher, its module and the prompts; names the file that answers are kept in (``run.work``).
            duplicates: prompts that were left out before.
            excess: whether to leave prompts out where the module makes the teacher's answer no likelier.
            made: how the prompts were made, for the record.

        Raises:
            TextError: too few prompts, all too long, answers that teach nothing, or a module that changes nothing.
            PairingError: the tokenizers share no token.
        """
        where = "--seeds" if made else "--text"
        with run.stage(ASKING):
            parts = self.check(prompts, models, where)
            too_long = len(prompts) - parts.given
            chosen = parts.held_out + parts.learning[: self.train]
            key = json.dumps([key, [prompt.key for prompt in chosen]]) if key else ""
            student = language_model(models.student, bf16=self.bf16)
            check_speaks(language_model(models.teacher), self.templates.teacher.ids(chosen[0]))
            check_speaks(student, self.templates.student.ids(chosen[0]))
            teacher = attach(checkpoint.raw, models.teacher, bf16=self.bf16, speaks=True)
            said = self._answers(teacher, chosen, len(parts.held_out), run, key)
            _check_answers(said, self.sampling.max_new_tokens)
            parts, by_prompt = self._read_by_both(parts, dict(zip(chosen, said, strict=True)), models, where)
            too_long += len(chosen) - len(by_prompt)
            chosen, answers = list(by_prompt), list(by_prompt.values())
            asked = len(chosen)
            if excess:
                parts = self._with_excess(teacher, by_prompt, run)
                chosen = parts.held_out + parts.learning
                answers = [by_prompt[prompt] for prompt in chosen]
            held, judging = len(parts.held_out), len(parts.judging)
            work = PromptTargets(
                teacher,
                student,
                self.templates,
                list(zip(chosen, answers, strict=True)),
                held,
                judging,
                self.text_only,
                self.use_given,
                where,
            )
            learned = work.made(run)
        with run.stage("asking the student"):
            bare_answers = generate_answers(
                student.model,
                self.templates.student,
                chosen[:judging],
                self._for_the_student(answers),
                bf16=student.bf16,
                store=AnswerStore(run.work, "student-answers", key) if run.work and key else None,
                progress=lambda done, total: run.progress("asking the student", done, total),
                processes=run.processes,
            )
        record = PromptRecord(
            **dict(learned.record),
            prompts=len(learned.train),
            too_long=too_long,
            duplicates=duplicates,
            cut=sum(not answer.ended for answer in answers),
            empty=sum(not answer.text.strip() for answer in answers),
            given=sum(prompt.answer is not None for prompt in chosen[held:]) if self.use_given else 0,
            answer_tokens=learned.train.tokens,
            made=made,
            no_excess=asked - len(chosen),
        )
        samples = [Sample(f"{prompt.text}\n{answer.text}") for prompt, answer in zip(chosen, answers, strict=True)]
        found = PromptDistillation(
            models,
            teacher,
            (),
            self.bf16,
            samples[held:],
            templates=self.templates,
            columns=learned.columns,
            train=learned.train,
            held_out=learned.held_out,
            judging=learned.judging,
            asked=chosen[:judging],
            answers=answers[:judging],
            groups=parts.groups,
            seed=self.sampling.seed,
            processes=run.processes,
            sampling=self.sampling,
            bare_answers=bare_answers,
            record=record,
            prompts=chosen[held:],
            on_policy=self.on_policy,
            gradient_checkpointing=self.gradient_checkpointing,
        )
        return found.beside(student)

    def _for_the_student(self, answers: Sequence[Answer]) -> Sampling:
        """As the teacher is asked, but cut where no answer of the teacher goes on: a student that rambles says no more
        of what is compared, and takes long to say it."""
        longest = max(len(self.templates.student.answer_ids(answer.text)) for answer in answers)
        cut = min(self.sampling.max_new_tokens, longest + longest // _SPARE + 1)
        return self.sampling.model_copy(update={"max_new_tokens": cut})

    def check(self, prompts: Sequence[Prompt], models: ModelPair, where: str = "--text") -> Parts[Prompt]:
        """The prompts that both models can read with the longest answer, in parts; of ``models`` no weights are used.

        Args:
            where: the prompts come from, for messages.

        Raises:
            TextError: there are too few that differ.
        """
        found = prompt_parts(self.fitting(prompts, models))
        check_enough(found, len(prompts) - found.given, where)
        return found

    def fitting(self, prompts: Sequence[Prompt], models: ModelPair) -> list[Prompt]:
        """The prompts that both models can read with the longest answer."""
        return [prompt for prompt in prompts if self._fits(prompt, models)]

    def _fits(self, prompt: Prompt, models: ModelPair) -> bool:
        longest = self.sampling.max_new_tokens
        return all(len(template.ids(prompt)) + longest <= self.limit(model) for template, model in self._sides(models))

    def _read_by_both(
        self, parts: Parts[Prompt], answers: Mapping[Prompt, Answer], models: ModelPair, where: str
    ) -> tuple[Parts[Prompt], dict[Prompt, Answer]]:
        """The prompts that both models read with their answers, in their parts; and these answers.

        Raises:
            TextError: they are too few.
        """
        long = {prompt for prompt, answer in answers.items() if not self._holds(prompt, answer, models)}
        kept = parts.without(long)
        if long:
            check_enough(kept, len(long), where)
        return kept, {prompt: answer for prompt, answer in answers.items() if prompt not in long}

    def _holds(self, prompt: Prompt, answer: Answer, models: ModelPair) -> bool:
        """Whether both models can read a prompt with this answer: one that was given has any length, and one that the
        teacher wrote may take the student more tokens."""
        return all(
            len(template.encode(prompt, answer.text, ended=answer.ended).ids) <= self.limit(model)
            for template, model in self._sides(models)
        )

    def _sides(self, models: ModelPair) -> list[tuple[Template, ModelHandle]]:
        return [(self.templates.teacher, models.teacher), (self.templates.student, models.student)]

    def limit(self, model: ModelHandle) -> int:
        """Tokens that a model reads at most."""
        return longest_text(model, self.max_length) - self.virtual

    def _answers(
        self, teacher: AttachedModel, prompts: Sequence[Prompt], held_out: int, run: Run, key: str
    ) -> list[Answer]:
        """The teacher's answers; those that are given instead, where they are to be used and are learned from."""
        given = {
            number: Answer(prompt.answer, ended=True)
            for number, prompt in enumerate(prompts)
            if self.use_given and number >= held_out and prompt.answer is not None
        }
        asked = [number for number in range(len(prompts)) if number not in given]
        store = AnswerStore(run.work, "teacher-answers", key) if run.work and key else None
        on_ray = self.on_ray
        found = generate_answers(
            teacher.model,
            self.templates.teacher,
            [prompts[number] for number in asked],
            self.sampling,
            bf16=teacher.bf16,
            store=store,
            progress=lambda done, total: run.progress(ASKING, done, total),
            processes=run.processes,
            elsewhere=partial(on_ray.answers, teacher.checkpoint, bf16=self.bf16) if on_ray else None,
        )
        answers = given | dict(zip(asked, found, strict=True))
        return [answers[number] for number in range(len(prompts))]

    def _with_excess(self, teacher: AttachedModel, answers: Mapping[Prompt, Answer], run: Run) -> Parts[Prompt]:
        """Those prompts where the module matters, in parts.

        Raises:
            TextError: they are too few.
        """
        template = self.templates.teacher
        excess = excess_of(
            teacher,
            template,
            [template.encode(prompt, answer.text, ended=answer.ended) for prompt, answer in answers.items()],
            run,
        )
        kept = [prompt for prompt, value in zip(answers, excess, strict=True) if value > LEAST_CHANGE]
        found = prompt_parts(kept)
        if not found.judging:
            raise TextError(
                "the module makes the teacher's answers no likelier on too many prompts",
                where="--seeds",
                expected=f"at least {LEAST_PROMPTS} where it does",
                found=f"{len(kept)} of {len(answers)}",
                fix="give examples of the module's task, in the format that it was trained with, or raise "
                "--make-prompts",
            )
        return found


def check_speaks(model: LanguageModel, ids: list[int]) -> None:
    """Refuse a model whose logits are not made as ``OutputLayer`` makes them.

    Raises:
        ModelError: see ``OutputLayer.check``.
    """
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    with torch.inference_mode():
        OutputLayer.of(model.model).check(model.model, model.forward(inputs)[1], inputs)


def longest_text(model: ModelHandle, max_length: int | None = None) -> int:
    """Tokens that a model reads at most, or shall."""
    config = getattr(model.base.config, "text_config", model.base.config)
    own = [getattr(config, "max_position_embeddings", None), max_length]
    given = [size for size in own if size and size < _NO_LIMIT]
    return min(given, default=_NO_LIMIT)


def prompt_parts(prompts: Sequence[Prompt]) -> Parts[Prompt]:
    """Prompts in parts: to judge, to choose and to learn from; turns of one conversation are in the same."""
    return split(prompts, lambda prompt: prompt.opening, least=LEAST_PROMPTS, most=HELD_OUT, common=True)


def check_enough(prompts: Parts[Prompt], too_long: int = 0, where: str = "--text") -> None:
    """Refuse too few prompts.

    Raises:
        TextError: there are none but too long ones, or too few that differ.
    """
    if too_long and not prompts.given:
        raise TextError(
            "all prompts are longer than the models read, with the answer",
            where=where,
            found=too_long,
            fix="give shorter prompts, lower --max-new-tokens, or raise --max-length",
        )
    if not prompts.judging:
        differ = prompts.different < prompts.given
        found = f"{prompts.different} different of {prompts.given}" if differ else str(prompts.given)
        raise TextError(
            "too few prompts to learn from and be judged by",
            where=where,
            expected=f"at least {LEAST_PROMPTS}",
            found=f"{found}, and {too_long} that are too long" if too_long else found,
        )


def _check_answers(answers: Sequence[Answer], longest: int) -> None:
    """Refuse answers from which nothing can be learned.

    Raises:
        TextError: all of them are empty, cut, or the same.
    """
    where, check = (
        "the teacher's answers",
        "check that the prompts are of the module's task, and --format",
    )
    if not any(answer.text.strip() for answer in answers):
        raise TextError(
            "all of them are empty",
            where=where,
            fix=check,
        )
    if not any(answer.ended for answer in answers):
        raise TextError(
            "all of them were cut before the teacher came to an end",
            where=where,
            expected="an end",
            found=f"{longest} tokens and more",
            fix="raise --max-new-tokens, or check --format",
        )
    commonest, count = Counter(answer.text for answer in answers).most_common(1)[0]
    if count == len(answers):
        raise TextError(
            "all of them are the same",
            where=where,
            found=repr(commonest[:80]),
            fix=check,
        )
