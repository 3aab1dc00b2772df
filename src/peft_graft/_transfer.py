"""``transfer``: a trained module moved to another model. The whole pipeline, from top to bottom."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import cast

from torch import nn

from peft_graft.alignment.aligner import Aligner, AlignmentText, check_tokenizers
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.distinct import Parts, form_of
from peft_graft.alignment.methods import Method, map_methods
from peft_graft.alignment.text import Sample, TextLike, TextSource
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Verdict, judge
from peft_graft.distill.ask_prompts import HELD_OUT, Asking, asking_of, prompt_parts, prompts_of
from peft_graft.distill.ask_seeds import listing_of, prompts_from, seeds_of
from peft_graft.distill.candidates import CandidateBuilder
from peft_graft.distill.choose import Outcome, choose, judged
from peft_graft.distill.completions import PromptDistillation
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.make_prompts import MadePrompts
from peft_graft.distill.polish import PROMPT_RATES, PolishRecord, PolishSettings, polish
from peft_graft.distill.teacher import FIT, TOKENS, ask_teacher, can_ask, sample_parts
from peft_graft.environment import hardware, versions
from peft_graft.graft import Graft
from peft_graft.models.loading import ModelPair
from peft_graft.models.places import place_of
from peft_graft.outputs import check_output, reserving_output
from peft_graft.planning.plan import Plan
from peft_graft.planning.sources import (
    ModelLike,
    ModelSources,
    ModuleSource,
    Tokenizers,
    config_of_live,
    given_alignment,
)
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike, PromptSource
from peft_graft.prompts.seeds import Seeds
from peft_graft.report import AnswerSample, GraftReport
from peft_graft.run import UNFINISHED, Callback, Run

#: Answers that the report shows.
_SAMPLES = 20


@reserving_output
def transfer(  # what moves, from where, to where, on which text: these differ from call to call, all else is config
    adapter: str | Path | nn.Module,
    student: ModelLike,
    *,
    teacher: ModelLike | None = None,
    text: TextLike | PromptLike | None = None,
    seeds: PromptLike | None = None,
    alignment: str | Path | Alignment | None = None,
    out: str | Path | None = None,
    config: GraftConfig | None = None,
    callbacks: Sequence[Callback] = (),
    tokenizers: Tokenizers | None = None,
) -> Graft:
    """Move a trained module to another model.

    Args:
        adapter: folder or hub id of a checkpoint of peft or adapters, or a live ``peft.PeftModel``.
        student: folder or hub id of the model that receives the module, or a live model of transformers.
        teacher: the model that the module was trained on, if its configuration does not name it; a live
            ``PeftModel`` brings its own.
        text: unlabelled text to align, fit, polish and judge on: a file, a data set of the hub
            (``alignment.text.read_text``), or strings, pairs of strings and lists of tokens. For a language model also
            prompts (``prompts.read.PromptSource``), whose answers by the teacher are learned.
        seeds: in place of text, 5 to 15 examples of prompts for a language model, as a file or in memory, with an
            answer or without: the teacher's base makes more of their kind (``distill.make_prompts``).
        alignment: a saved alignment of the two models, or a live one; no text is needed then.
        out: folder to write the graft to (``Graft.save_pretrained``). State of an interrupted run is kept beside it,
            and the same call goes on from there. Nothing is written without it.
        config: how to move it; ``GraftConfig()`` by default.
        callbacks: watch the run.
        tokenizers: the teacher's and the student's, of live models; by default those that lie where they come from.

    Returns:
        The graft, also when it was not written.

    Raises:
        GraftError: one of its kinds, naming the site or option, what was expected, what came and the fix. All that
            can be known without weights is checked before any weights are loaded.
    """
    config = config_of_live(config or GraftConfig(), student)
    if out is not None:
        check_output(Path(out), force=config.force)
    module = ModuleSource.of(adapter, config)
    sources = ModelSources.of(module, teacher, student, config, tokenizers)
    given = given_alignment(alignment, config.token)
    shapes = sources.described()
    module = module.of_teacher(shapes.teacher.architecture)
    raw = module.shapes(shapes.teacher.base.config)
    taught = _text_of(text, seeds_of(seeds, text, module.raw, config), module, sources, shapes, config)
    plan = Plan.make(
        raw, shapes, config, has_text=taught.source is not None, has_prompts=isinstance(taught, _Prompts), given=given
    )
    if text is not None or seeds is not None or module.raw.trains_tokens:
        sources.check_tokenizers()

    run = Run(callbacks, work=Path(f"{out}{UNFINISHED}") if out is not None else None)
    with run.stage("loading models"):
        models = sources.loaded(tokenizers=taught.source is not None or module.raw.trains_tokens)
    with run.stage("converting to LoRA") if module.is_converted else nullcontext():
        raw = module.values(models.teacher)
    if isinstance(taught, _Prompts):
        taught.make(models, config, run)
    plan = plan.bind(raw, models, taught.plain)
    vocabularies = Vocabularies.of(models, module.tokenizer()) if raw.trains_tokens else None
    outcome, polished, aligner, notes = _moved(plan, taught, vocabularies, run)
    verdict, told = taught.judged(outcome, config, run)

    report = _report(plan, outcome, polished, aligner, run).model_copy(
        update={
            "verdict": verdict,
            "module": place_of(module.name),
            "text": taught.source.name if taught.source else None,
            "alignment": str(alignment) if isinstance(alignment, str | Path) else None,
            "notes": [*plan.sites.notes, *taught.remarks, *notes],
            **told,
        }
    )
    graft = Graft(outcome.candidate.checkpoint, report, outcome.candidate.alignment, models.student)
    if out is None:
        return graft
    with run.stage("writing and verifying"):
        graft = graft.save_pretrained(out, force=config.force)
    shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    return graft


@dataclass(frozen=True)
class _Text:
    """Unlabelled text: its first samples in parts, and all that follow.

    ``asked``: whether the teacher is asked about it; where it is not ``remarks`` give the reason.
    """

    source: TextSource | None
    parts: Parts[Sample]
    rest: Iterable[Sample]
    asked: bool
    remarks: Sequence[str]

    @staticmethod
    def of(source: TextSource | None, raw: RawCheckpoint, config: GraftConfig) -> _Text:
        """The text, and whether the teacher can be asked about it (``can_ask``)."""
        samples = source.samples() if source else iter(())
        parts = sample_parts(samples)
        asked, remarks = can_ask(config, raw, parts)
        return _Text(source, parts, samples, asked, remarks)

    @property
    def plain(self) -> Sequence[Sample]:
        """Samples that neither judge nor choose."""
        return self.parts.learning

    @property
    def content(self) -> str:
        """A hash of what is learned from, chosen by and judged by."""
        return self.parts.digest(lambda sample: sample.texts)

    def to_align(self) -> AlignmentText | None:
        """All but what judges or chooses."""
        if self.source is None:
            return None
        held = self.parts.held_out if self.asked else []
        first = self.parts.learning if self.asked else [*self.parts.held_out, *self.parts.learning]
        key = json.dumps([self.source.key, "each once", len(held)]) if self.source.key else None
        known = {form_of(sample.texts) for sample in held}
        rest = (sample for sample in self.rest if not known or form_of(sample.texts) not in known)
        return AlignmentText(chain(first, rest), self.source.name, key)

    def polishing(self, config: GraftConfig) -> PolishSettings:
        """How the polish trains."""
        return PolishSettings(steps=config.polish_steps if self.asked else 0, seed=config.seed)

    def ask(self, plan: Plan, aligner: Aligner, maps_of: dict[str, Method], run: Run) -> Distillation | None:
        """The teacher's classes or hidden states; None where it is not asked."""
        if not self.asked:
            return None
        check_tokenizers(plan.models)
        config, settings = plan.config, self.polishing(plan.config)
        fit = FIT if config.head in ("auto", "fit") else 0
        shift_map = None if plan.moved.head else aligner.alignment(_shift_method(maps_of)).map((TOKENS, TOKENS))
        return ask_teacher(
            plan.module,
            plan.models,
            self.parts,
            run,
            train=max(fit, settings.steps * settings.batch_size),
            shift_map=shift_map,
            config=config,
        )

    def judged(self, outcome: Outcome, config: GraftConfig, run: Run) -> tuple[Verdict, dict[str, object]]:
        """The verdict, and what else the report says about the text: nothing."""
        if self.source is not None and not self.asked:
            return judge(None, reason="; ".join(self.remarks) or "there is no text to judge by"), {}
        return judged(outcome, run, seed=config.seed), {}


@dataclass
class _Prompts:
    """Prompts for the teacher to answer, or examples to make them from.

    ``made``: how they were made. ``asked``: what came of it.
    """

    source: PromptSource | Seeds
    prompts: Sequence[Prompt]
    asking: Asking
    key: str
    made: MadePrompts | None = None
    asked: PromptDistillation | None = None

    @property
    def remarks(self) -> list[str]:
        """What the report says about the text."""
        if self.made is None or self.made.ended == "enough":
            return []
        why = "hardly any new ones came" if self.made.ended == "nothing new" else "that took all attempts"
        return [f"fewer prompts were made than asked for, since {why}: {self.made.text}"]

    def make(self, models: ModelPair, config: GraftConfig, run: Run) -> None:
        """Make the prompts, where there are only examples."""
        if not isinstance(self.source, Seeds):
            return
        self.prompts, self.made = prompts_from(self.source, self.asking, models, config, run, key=self.key)

    @property
    def plain(self) -> Sequence[Sample]:
        """The prompts alone, as text."""
        return [Sample(prompt.text) for prompt in prompt_parts(self.prompts).learning]

    @property
    def content(self) -> str:
        """A hash of the prompts in their parts, and of the answers that came with them."""
        return prompt_parts(self.prompts).digest(lambda prompt: [prompt.key, prompt.answer or ""])

    def to_align(self) -> AlignmentText:
        """Prompts with their answers, but for what is held out; there once the teacher has been asked."""

        def samples() -> Iterator[Sample]:
            assert self.asked is not None
            yield from self.asked.samples

        return AlignmentText(samples(), self.source.name, None)

    def polishing(self, config: GraftConfig) -> PolishSettings:
        """How the polish trains."""
        size, known = PromptDistillation.batch_size, len(self.asked.lengths) if self.asked else len(self.prompts)
        return PolishSettings(
            steps=config.polish_steps_on(known, size), batch_size=size, rates=PROMPT_RATES, seed=config.seed
        )

    def ask(self, plan: Plan, aligner: Aligner, maps_of: dict[str, Method], run: Run) -> Distillation:
        """The teacher's answers."""
        key = json.dumps([self.key, self.content, _module_key(plan.module.raw), *plan.models.speaking_keys])
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
        return verdict, {"prompts": asked.record, "answers": samples[:_SAMPLES]}


def _text_of(
    text: TextLike | PromptLike | None,
    seeds: Seeds | None,
    module: ModuleSource,
    sources: ModelSources,
    shapes: ModelPair,
    config: GraftConfig,
) -> _Text | _Prompts:
    """The text as what it is: prompts for a language model, else plain text.

    Raises:
        GraftError: see ``asking_of`` and ``can_ask``.
    """
    prompts = seeds or prompts_of(text, module.raw, config)
    if prompts is None:
        # Rows that are no prompts, in memory, are what a text source refuses.
        source = TextSource(cast(TextLike, text), config.columns, config.seed) if text is not None else None
        return _Text.of(source, module.raw, config)
    asking = asking_of(config, sources, shapes, module.raw.library)
    if isinstance(prompts, Seeds):
        listing_of(prompts, asking, shapes, config)
        found = []
    else:
        found = list(islice(prompts.prompts(), config.max_prompts + 2 * HELD_OUT))
        asking.check(found, shapes)
    settings = [asking.templates.teacher.format, asking.templates.student.format, config.record()]
    return _Prompts(prompts, found, asking, json.dumps([prompts.key or prompts.name, settings], default=str))


def _moved(
    plan: Plan, text: _Text | _Prompts, vocabularies: Vocabularies | None, run: Run
) -> tuple[Outcome, PolishRecord | None, Aligner, list[str]]:
    """Align, move by every method, choose by the teacher's answers, polish; and remarks for the user."""
    config, models, methods = plan.config, plan.models, plan.methods
    notes = []
    maps_of = map_methods(methods)
    shifts = isinstance(text, _Text) and text.asked and plan.moved.head is None
    aligner = Aligner(
        models,
        plan.wanted_maps(shifts=shifts),
        list(dict.fromkeys(maps_of.values())),
        text.to_align(),
        config,
        run,
        given=plan.given,
    )
    if vocabularies:
        notes += [note for module in plan.moved.modules.values() if (note := vocabularies.left_out(module))]
    builder = CandidateBuilder(
        plan.moved,
        plan.sites,
        models,
        vocabularies,
        lambda method: aligner.alignment(maps_of[method.name]),
        run,
        text.ask(plan, aligner, maps_of, run),
    )
    outcome = choose(builder, methods, config.head)
    polishing = text.polishing(config)
    outcome, polished = polish(outcome, polishing, run, identity=_identity(plan, text))
    if polishing.steps and polished is None and outcome.is_exact:
        notes.append("not polished: the graft computes what the teacher does")
    return outcome, polished, aligner, [*notes, *outcome.notes]


def _report(plan: Plan, outcome: Outcome, polished: PolishRecord | None, aligner: Aligner, run: Run) -> GraftReport:
    """The report, but for what only the caller knows."""
    chosen, raw = outcome.candidate, plan.module.raw
    compared = len(plan.methods) > 1 and outcome.found is not None
    head = chosen.head.model_copy(update={"how": outcome.head, "fit": outcome.fit}) if chosen.head else None
    return GraftReport(
        module="",
        module_files=dict(raw.files),
        module_library=plan.moved.raw.library,
        module_kind=raw.kind,
        teacher=plan.models.teacher.record,
        student=plan.models.student.record,
        settings=plan.config,
        method=chosen.method,
        method_reason="its graft agrees best with the teacher on held-out text" if compared else plan.reason,
        text=None,
        alignment=None,
        layers=plan.sites.recorded_layers,
        sites=chosen.sites,
        head=head,
        pairing=aligner.counts.record if aligner.counts else None,
        verdict=judge(None),
        tried=outcome.tried,
        polish=polished,
        notes=[],
        seconds=run.seconds,
        versions=versions(),
        hardware=hardware(plan.config.device),
    )


def _shift_method(maps_of: dict[str, Method]) -> Method:
    """The method whose map of the last hidden state says where the teacher's shift of it points in the student."""
    return maps_of.get("ridge") or next(iter(maps_of.values()))


def _identity(plan: Plan, text: _Text | _Prompts) -> str:
    """What a polish depends on beside its settings: of a saved state, whether it is of the same work."""
    parts = [
        *(plan.models.speaking_keys if isinstance(text, _Prompts) else plan.models.keys),
        _module_key(plan.module.raw),
        plan.config.record(),
        text.source.key if text.source else None,
        text.content,
        plan.given.digest if plan.given else None,
    ]
    return json.dumps(parts, default=str)


def _module_key(raw: RawCheckpoint) -> dict[str, str] | str:
    """Hashes of the module's files; of its values, where it is a live one."""
    return dict(raw.files) or raw.digest
