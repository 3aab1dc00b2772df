"""What a transfer learns from: unlabelled text or prompts, and what the teacher says to them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from peft_graft.alignment.aligner import Aligner, AlignmentText, check_tokenizers
from peft_graft.alignment.distinct import Parts, form_of
from peft_graft.alignment.methods import Method
from peft_graft.alignment.sharding import RayPass
from peft_graft.alignment.text import Sample, TextLike, TextSource
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Verdict, judge
from peft_graft.distill.ask_documents import HELD_OUT as MOST_DOCUMENTS
from peft_graft.distill.ask_documents import LOOKED_AT, DocumentAsking, DocumentDistillation, check_documents
from peft_graft.distill.ask_prompts import HELD_OUT, Asking, asking_of, prompt_parts, prompts_of
from peft_graft.distill.ask_seeds import listing_of, prompts_from, seeds_of
from peft_graft.distill.breakdown import by_kind, decided
from peft_graft.distill.choose import Outcome, judged
from peft_graft.distill.completions import CompletionDistillation, PromptDistillation
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.fit_layers import SAMPLES
from peft_graft.distill.make_prompts import MadePrompts
from peft_graft.distill.polish import PROMPT_RATES, PolishSettings
from peft_graft.distill.teacher import FIT, POOL, TOKENS, ask_teacher, can_ask, sample_parts
from peft_graft.errors import GraftError, ModelError, PairingError, TextError
from peft_graft.models.loading import ModelPair
from peft_graft.models.tasks import Task
from peft_graft.planning.plan import Plan
from peft_graft.planning.sources import ModelSources, ModuleSource
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike, PromptSource
from peft_graft.prompts.seeds import Seeds
from peft_graft.report import AnswerSample
from peft_graft.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Answers that the report shows.
_SAMPLES = 20
#: What a text is to a module: samples of what it was trained on; what a language model says; questions, each with the
#: text that its answer is in.
Form = Literal["samples", "documents", "questions"]


@dataclass(frozen=True)
class TextMaterial:
    """Unlabelled text: its first samples in parts, and all that follow.

    ``asked``: whether the teacher is asked about it; where it is not ``remarks`` give the reason. ``of_states``: why a
    language model's last hidden states are compared and not what it says, where that is so. ``form``: what the text is.
    """

    source: TextSource | None
    parts: Parts[Sample]
    rest: Iterable[Sample]
    asked: bool
    remarks: Sequence[str]
    of_states: str | None = None
    form: Form = "samples"

    speaks: ClassVar[bool] = False

    @staticmethod
    def of(
        source: TextSource | None, raw: RawCheckpoint, sources: ModelSources, shapes: ModelPair, config: GraftConfig
    ) -> TextMaterial:
        """The text, whether the teacher can be asked about it (``can_ask``), and what.

        Raises:
            PlanError: see ``check_documents``.
        """
        form = _form_of(raw)
        parts, samples = _read(source, form)
        asked, remarks = can_ask(config, raw, parts)
        found = TextMaterial(source, parts, samples, asked, remarks, form=form)
        if not (form == "documents" and asked):
            return found
        try:
            asking = DocumentAsking.of(config, sources, shapes, raw)
            asking.check_pairs(parts.held_out + parts.learning)
        except (ModelError, PairingError) as error:
            return found.by_states(error)
        check_documents(config)
        return DocumentMaterial(source, parts, samples, asked, remarks, form=form, asking=asking)

    def by_states(self, error: GraftError) -> TextMaterial:
        """The same of a language model whose last hidden states are compared, and why."""
        why = f"the last hidden states are compared, and not what the models say next: {error}"
        return TextMaterial(self.source, self.parts, self.rest, self.asked, [*self.remarks, why], why, self.form)

    def of_models(self, models: ModelPair) -> TextMaterial:
        """The same for these loaded models."""
        return self

    @property
    def compares_states(self) -> bool:
        """Whether last hidden states are compared, of a module without a head."""
        return self.asked

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples in parts."""
        return [*self.parts.held_out, *self.parts.learning]

    @property
    def plain(self) -> Sequence[Sample]:
        """Samples that neither judge nor choose."""
        return self.parts.learning

    @property
    def judging(self) -> Sequence[Sequence[str]]:
        """The texts of every sample that judges."""
        return [sample.texts for sample in self.parts.judging] if self.asked else []

    @property
    def content(self) -> str:
        """A hash of what is learned from, chosen by and judged by."""
        return self.parts.digest(lambda sample: sample.texts)

    def to_align(self) -> AlignmentText | None:
        """All but what judges or chooses."""
        if self.source is None:
            return None
        held = self.parts.held_out if self.asked else []
        first = self.parts.learning if self.asked else self.samples
        key = [self.source.key, "each once", len(held), *(["questions"] if self.form == "questions" else [])]
        known = {form_of(sample.texts) for sample in held}
        rest = (sample for sample in self.rest if not known or form_of(sample.texts) not in known)
        count = len(first) if self.parts.given < POOL else None  # else there may be more than was read
        return AlignmentText(chain(first, rest), self.source.name, json.dumps(key) if self.source.key else None, count)

    def on_ray(self, plan: Plan) -> RayPass | None:
        """The pass over it to align the models on, where it is run on Ray."""
        if plan.config.ray is None or self.source is None:
            return None
        samples = partial(_to_align_anew, self.source, self.form, asked=self.asked)
        return RayPass.of(plan.models, samples, plan.config)

    def check_length(self, tokenizer: PreTrainedTokenizerBase, needed: int) -> None:
        """Refuse text that ends before it has as many tokens as have to pair.

        Args:
            tokenizer: the student's. needed: pairs of tokens at the least.

        Raises:
            TextError: it is too short, said in its own lines.
        """
        samples = self.parts.learning if self.asked else self.samples
        if len(self.samples) >= POOL // 2:  # there may be more than was read
            return
        tokens = 0
        for sample in samples:
            tokens += len(tokenizer(*sample.texts, add_special_tokens=False)["input_ids"])
            if tokens >= needed:
                return
        lines = round(needed / max(tokens, 1) * len(samples))
        raise TextError(
            "the text is too short to align the two models on",
            where=f"--text {self.source.name}" if self.source else "--text",
            expected=f"at least {needed:,} tokens, some {lines:,} lines like these",
            found=f"{tokens:,} tokens in {len(samples):,} line" + "s" * (len(samples) != 1),
            fix="give more text, or a saved alignment with --alignment",
        )

    def polishing(self, config: GraftConfig) -> PolishSettings:
        """How the polish trains."""
        return PolishSettings(steps=config.polish_steps if self.asked else 0, seed=config.seed)

    def ask(self, plan: Plan, aligner: Aligner, maps_of: dict[str, Method], run: Run) -> Distillation | None:
        """The teacher's classes or hidden states; None where it is not asked."""
        if not self.asked:
            return None
        check_tokenizers(plan.models)
        config, settings = plan.config, self.polishing(plan.config)
        fit = FIT if plan.moved.head and config.head in ("auto", "fit") else 0
        layers = SAMPLES if any(method.fits_layers for method in plan.methods) else 0
        shift_map = None if plan.moved.head else aligner.alignment(_shift_method(maps_of)).map((TOKENS, TOKENS))
        return ask_teacher(
            plan.module,
            plan.models,
            self.parts,
            run,
            train=max(fit, layers, settings.steps * settings.batch_size),
            shift_map=shift_map,
            config=config,
        )

    def judged(self, outcome: Outcome, config: GraftConfig, run: Run) -> tuple[Verdict, dict[str, object]]:
        """The verdict, and what else the report says about the text: how it is decided."""
        if self.source is not None and not self.asked:
            return judge(None, reason="; ".join(self.remarks) or "there is no text to judge by"), {}
        verdict, head = judged(outcome, run, seed=config.seed), outcome.candidate.head
        if outcome.candidate.attached is None or head is None:
            return verdict, {}
        with run.stage("judging"):
            classes, texts = decided(outcome.candidate, head.labels)
        return verdict, {"classes": classes, "decisions": texts}


def _form_of(raw: RawCheckpoint) -> Form:
    """What the text is to a module."""
    if raw.task is Task.CAUSAL_LM and not raw.head:
        return "documents"
    return "questions" if raw.task is Task.QUESTION_ANSWERING and raw.head else "samples"


def _read(source: TextSource | None, form: Form) -> tuple[Parts[Sample], Iterator[Sample]]:
    """The first samples in parts, and those that follow."""
    samples = source.samples() if source else iter(())
    most = [MOST_DOCUMENTS] if form == "documents" else []
    return sample_parts(samples, *most, questions=form == "questions"), samples


def _to_align_anew(source: TextSource, form: Form, *, asked: bool) -> Iterator[Sample]:
    """What ``TextMaterial.to_align`` gives, for a process that reads the text for itself."""
    text = TextMaterial(source, *_read(source, form), asked, (), form=form).to_align()
    return text.samples if text else iter(())


@dataclass(frozen=True, kw_only=True)
class DocumentMaterial(TextMaterial):
    """Plain text of which a language model learns what the teacher says next; ``asking``: how the teacher is asked."""

    asking: DocumentAsking

    speaks: ClassVar[bool] = True

    def of_models(self, models: ModelPair) -> TextMaterial:
        """The same, or what is left to do with models whose logits are not made as is known here."""
        try:
            self.asking.check_speaks(models)
        except ModelError as error:
            return self.by_states(error)
        return self

    @property
    def compares_states(self) -> bool:
        """Not."""
        return False

    def polishing(self, config: GraftConfig) -> PolishSettings:
        """How the polish trains."""
        return _polishing(config, min(len(self.parts.learning), config.max_prompts))

    def learned(self, plan: Plan) -> int:
        """How many documents are learned from: no more than a polish sees."""
        settings = self.polishing(plan.config)
        layers = SAMPLES if any(method.fits_layers for method in plan.methods) else 0
        needed = max(LOOKED_AT, layers, settings.steps * settings.batch_size)
        return min(len(self.parts.learning), plan.config.max_prompts, needed)

    def ask(self, plan: Plan, aligner: Aligner, maps_of: dict[str, Method], run: Run) -> Distillation:
        """The teacher's distributions."""
        return self.asking.ask(plan.module, plan.models, self.parts, run, train=self.learned(plan))

    def judged(self, outcome: Outcome, config: GraftConfig, run: Run) -> tuple[Verdict, dict[str, object]]:
        """The verdict by what the graft says next, and what the report says about the documents."""
        found = judged(outcome, run, seed=config.seed)
        distillation, attached = outcome.candidate.learning
        assert isinstance(distillation, DocumentDistillation)
        with run.stage("judging"):
            return found, {"documents": distillation.record_with(attached)}


@dataclass
class PromptMaterial:
    """Prompts for the teacher to answer, or examples to make them from.

    ``fitting``: the prompts that both models can read, in parts; None of those that are still to be made.
    ``made``: how they were made. ``asked``: what came of it.
    """

    source: PromptSource | Seeds
    prompts: Sequence[Prompt]
    fitting: Parts[Prompt] | None
    asking: Asking
    key: str
    made: MadePrompts | None = None
    asked: PromptDistillation | None = None

    speaks: ClassVar[bool] = True

    @property
    def compares_states(self) -> bool:
        """Not."""
        return False

    def of_models(self, models: ModelPair) -> PromptMaterial:
        """The same: what is amiss with the models is said when they are asked."""
        return self

    @property
    def remarks(self) -> list[str]:
        """What the report says about the text."""
        if isinstance(self.source, PromptSource) and (count := self.source.rows_without):
            return [f"{count} row{'s' * (count > 1)} of {self.source.name} without a prompt left out"]
        if self.made is None or self.made.ended == "enough":
            return []
        why = "hardly any new ones came" if self.made.ended == "nothing new" else "that took all attempts"
        return [f"fewer prompts were made than asked for, since {why}: {self.made.text}"]

    def make(self, models: ModelPair, config: GraftConfig, run: Run) -> None:
        """Make the prompts, where there are only examples."""
        if not isinstance(self.source, Seeds):
            return
        source = self.source
        self.prompts, self.made = run.processes.of_first(
            lambda: prompts_from(source, self.asking, models, config, run, key=self.key)
        )

    @property
    def samples(self) -> Sequence[Sample]:
        """None: ``Asking.check`` has read all prompts as the models do."""
        return ()

    @property
    def plain(self) -> Sequence[Sample]:
        """The prompts alone, as text."""
        return [Sample(prompt.text) for prompt in self._parts.learning]

    @property
    def judging(self) -> Sequence[Sequence[str]]:
        """The text of every prompt that judges."""
        judging = self._parts.judging if self.asked is None else self.asked.asked
        return [[prompt.text] for prompt in judging]

    @property
    def _parts(self) -> Parts[Prompt]:
        """The prompts as they are asked, but for what is left out once the answers are known."""
        return self.fitting or prompt_parts(self.prompts)

    @property
    def content(self) -> str:
        """A hash of the prompts in their parts, and of the answers that came with them."""
        return prompt_parts(self.prompts).digest(lambda prompt: [prompt.key, prompt.answer or ""])

    def to_align(self) -> AlignmentText:
        """Prompts with their answers, but for what is held out; there once the teacher has been asked."""

        def samples() -> Iterator[Sample]:
            assert self.asked is not None
            yield from self.asked.samples

        count = min(len(self.fitting.learning), self.asking.train) if self.fitting else None
        return AlignmentText(samples(), self.source.name, None, count)

    def on_ray(self, plan: Plan) -> RayPass | None:
        """None: prompts and answers are in memory here, and few."""
        return None

    def polishing(self, config: GraftConfig) -> PolishSettings:
        """How the polish trains."""
        return _polishing(config, len(self.asked.lengths) if self.asked else len(self.prompts))

    def ask(self, plan: Plan, aligner: Aligner, maps_of: dict[str, Method], run: Run) -> Distillation:
        """The teacher's answers."""
        key = json.dumps([self.key, self.content, module_key(plan.module.raw), *plan.models.speaking_keys])
        self.asked = self.asking.ask(
            plan.module,
            plan.models,
            self.prompts,
            run,
            key=key,
            excess=self.made is not None,
            made=self.made,
            duplicates=0 if isinstance(self.source, Seeds) else self.source.dropped_duplicates,
        )
        return self.asked

    def judged(self, outcome: Outcome, config: GraftConfig, run: Run) -> tuple[Verdict, dict[str, object]]:
        """The verdict by what the graft generates, and what the report says about prompts and answers."""
        found, asked = judged(outcome, run, seed=config.seed), self.asked
        attached = outcome.candidate.attached
        assert asked is not None
        assert attached is not None
        with run.stage("asking the graft"):
            said, generated = asked.generate(attached, run)
        verdict = judge(found.measured, found.moved, generated, seed=config.seed)
        samples = [
            AnswerSample(prompt=prompt.text, teacher=teacher.text, graft=own.text, bare=bare.text)
            for prompt, teacher, own, bare in zip(asked.asked, asked.answers, said, asked.bare_answers, strict=True)
        ]
        kinds = by_kind(asked.asked, said, asked.answers, asked.bare_answers)
        return verdict, {"prompts": asked.record, "kinds": kinds, "answers": samples[:_SAMPLES]}


Material = TextMaterial | PromptMaterial


def material_of(
    text: TextLike | PromptLike | None,
    seeds: PromptLike | None,
    module: ModuleSource,
    sources: ModelSources,
    shapes: ModelPair,
    config: GraftConfig,
) -> Material:
    """The text as what it is: prompts for a language model, or examples to make them from, else plain text.

    Raises:
        GraftError: see ``seeds_of``, ``asking_of`` and ``can_ask``.
    """
    prompts = seeds_of(seeds, text, module.raw, config) or prompts_of(text, module.raw, config)
    if prompts is None:
        # Rows that are no prompts, in memory, are what a text source refuses.
        source = TextSource(cast(TextLike, text), config.columns, config.seed) if text is not None else None
        return TextMaterial.of(source, module.raw, sources, shapes, config)
    asking = asking_of(config, sources, shapes, module.raw)
    if isinstance(prompts, Seeds):
        listing_of(prompts, asking, shapes, config)
        found, fitting = [], None
    else:
        found = list(islice(prompts.prompts(), config.max_prompts + 2 * HELD_OUT))
        fitting = asking.check(found, shapes)
    settings = [asking.templates.teacher.format, asking.templates.student.format, config.record()]
    key = json.dumps([prompts.key or prompts.name, settings], default=str)
    return PromptMaterial(prompts, found, fitting, asking, key)


def _polishing(config: GraftConfig, known: int) -> PolishSettings:
    """How the polish trains on so many prompts or documents."""
    size = CompletionDistillation.batch_size
    steps = config.polish_steps_on(known, size)
    return PolishSettings(steps=steps, batch_size=size, rates=PROMPT_RATES, seed=config.seed)


def _shift_method(maps_of: dict[str, Method]) -> Method:
    """The method whose map of the last hidden state says where the teacher's shift of it points in the student."""
    return maps_of.get("ridge") or next(iter(maps_of.values()))


def module_key(raw: RawCheckpoint) -> dict[str, str] | str:
    """Hashes of a module's files; of its values, where it is a live one."""
    return dict(raw.files) or raw.digest
