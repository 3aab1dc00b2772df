"""One transfer from end to end: planned from shapes, then carried out. The whole pipeline, from top to bottom."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from peft_graft.alignment.aligner import Aligner, SharedAlignments, WantedMaps
from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.layout import SAMPLE_SPACES
from peft_graft.alignment.methods import map_methods
from peft_graft.alignment.sharding import check_models_on_ray, check_text_on_ray
from peft_graft.alignment.text import TextLike, rows_given
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.cluster import check_alone, start_ray
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import judge
from peft_graft.distill.candidates import CandidateBuilder
from peft_graft.distill.choose import Outcome, choose
from peft_graft.distill.cost import cost_of
from peft_graft.distill.polish import PolishRecord, polish
from peft_graft.environment import hardware, versions
from peft_graft.errors import PlanError
from peft_graft.graft import Graft
from peft_graft.material import Material, PromptMaterial, TextMaterial, material_of, module_key
from peft_graft.models.loading import ModelPair, ModelRecord
from peft_graft.models.places import hub_id_of, is_folder, place_of
from peft_graft.planning.plan import Plan
from peft_graft.planning.sources import (
    ModelLike,
    ModelSources,
    ModuleSource,
    Tokenizers,
    given_alignment,
)
from peft_graft.prompts.read import PromptLike
from peft_graft.report import GraftReport
from peft_graft.run import Run


@dataclass(frozen=True)
class Move:
    """One transfer, planned before any weights are loaded.

    Attributes:
        module, sources: what moves, between which models. material: what is learned from. plan: from shapes alone.
        alignment: the one that was given, as the user named it; None for a live one, or none.
        weights: another module, at the same sites, whose weights are moved while ``module`` answers (``moving``).
    """

    module: ModuleSource
    sources: ModelSources
    material: Material
    plan: Plan
    alignment: str | None
    weights: ModuleSource | None = None

    @classmethod
    def planned(  # what ``transfer`` takes, and nothing else
        cls,
        adapter: str | Path | nn.Module | Graft | ModuleSource,
        student: ModelLike,
        *,
        teacher: ModelLike | None,
        text: TextLike | PromptLike | None,
        seeds: PromptLike | None,
        alignment: str | Path | Alignment | None,
        config: GraftConfig,
        tokenizers: Tokenizers | None = None,
        may_have_text: bool = False,
    ) -> Move:
        """Plan a transfer; arguments as for ``transfer``.

        Args:
            may_have_text: what needs text is no error where there is none yet.

        Raises:
            GraftError: all that can be known without weights.
        """
        text = None if text is None else rows_given(text)
        seeds = None if seeds is None else rows_given(seeds, "seeds")
        if isinstance(adapter, ModuleSource):
            module = adapter
        else:
            module = ModuleSource.of(adapter.model if isinstance(adapter, Graft) else adapter, config)
        sources = ModelSources.of(module, teacher, student, config, tokenizers)
        given = given_alignment(alignment, config.token)
        shapes = sources.described()
        module = module.of_teacher(shapes.teacher, config)
        raw = module.shapes(shapes.teacher.base.config)
        material = material_of(text, seeds, module, sources, shapes, config)
        plan = Plan.make(
            raw,
            shapes,
            config,
            has_text=material.source is not None or (None if may_have_text else False),
            has_prompts=isinstance(material, PromptMaterial),
            speaks=_learns_to_speak(material, config),
            given=given,
        )
        if text is not None or seeds is not None or module.raw.trains_tokens:
            sources.check_tokenizers(shapes, material.samples)
        move = cls(module, sources, material, plan, str(alignment) if isinstance(alignment, str | Path) else None)
        move.check_length()
        move.unknown_tokens(shapes)
        return move

    def moving(self, weights: ModuleSource) -> Move:
        """The same with the weights of another module, so that what they are worth is seen: all else, what the teacher
        answers above all, stays."""
        return replace(self, weights=weights)

    def unknown_tokens(self, shapes: ModelPair) -> list[str]:
        """Remarks on trained tokens that the student does not have, as far as tokenizers tell.

        Args:
            shapes: of the models, without weights.

        Raises:
            PlanError: it has none of them.
        """
        # Of rows that were trained all together only values tell which they are.
        named = [module for module in self.plan.moved.modules.values() if module.names_tokens]
        teacher, student = (self.sources.tokenizer_of(role) if named else None for role in ("teacher", "student"))
        teacher = self.module.tokenizer() or teacher
        if teacher is None or student is None:
            return []
        found = Vocabularies.told(teacher, student, shapes)
        return [note for module in named if (note := found.left_out(module))]

    def check_length(self) -> None:
        """Refuse text that is too short to align the models on, as far as tokenizers tell.

        Raises:
            TextError: see ``TextMaterial.check_length``.
        """
        wanted = self.wanted
        tokenizer = self.sources.tokenizer_of("student") if wanted else None
        if wanted and tokenizer and isinstance(self.material, TextMaterial):
            # A head's spaces have one vector a sample.
            sizes = [max(sizes) for pair, sizes in wanted.pairs.items() if pair[0].name not in SAMPLE_SPACES]
            self.material.check_length(tokenizer, max(sizes, default=0))

    def check_ray(self) -> None:
        """Start Ray; refuse it where it has nothing to do, or its workers do not find what they need.

        Raises:
            PlanError: see above. DependencyError: it is not installed.
        """
        check_alone(self.plan.config.ray)
        if self.plan.config.ray is None:
            return
        teacher, student = self.sources.teacher, self.sources.student
        if isinstance(self.material, PromptMaterial):
            check_models_on_ray(teacher=teacher)
        elif self.wanted is None or self.material.source is None:
            raise PlanError(
                "there is nothing to share out on Ray",
                where=f"--ray {self.plan.config.ray}",
                expected="prompts for a language model, or text to align the models on",
                fix="leave --ray out",
            )
        else:
            check_models_on_ray(teacher=teacher, student=student)
            check_text_on_ray(self.material.source.text)
        start_ray(self.plan.config.ray)

    @property
    def reads_text(self) -> bool:
        """Whether the models' tokenizers are needed."""
        return self.material.source is not None or self.module.raw.trains_tokens

    @property
    def wanted(self) -> WantedMaps | None:
        """The maps that plain text will be streamed for, as far as shapes tell; None where it will not."""
        if self.plan.given or not isinstance(self.material, TextMaterial) or self.material.source is None:
            return None
        if not any(method.needs_text for method in map_methods(self.plan.methods).values()):
            return None
        return self.plan.wanted_maps(shifts=_shifts(self.plan, self.material), asked=bool(self.material.asked))

    def identity(self, models: ModelPair) -> str:
        """A hash of all that the graft depends on: both models, the module, the choices, the text, an alignment."""
        return self._identity(models, self.material.of_models(models))

    def _identity(self, models: ModelPair, material: Material) -> str:
        parts = [str(self.module.raw.task), self._work(replace(self.plan, models=models), material)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _work(self, plan: Plan, material: Material) -> str:
        """What a polish depends on beside its settings: of a saved state, whether it is of the same work."""
        head = plan.moved.head
        parts = [
            *(plan.models.speaking_keys if material.speaks else plan.models.keys),
            module_key(self.module.raw),
            plan.config.record(),
            material.source.key if material.source else None,
            material.content,
            plan.given.digest if plan.given else None,
            *([head.problem_type] if head and head.problem_type else []),
            *([module_key(self.weights.raw)] if self.weights else []),
        ]
        return json.dumps(parts, default=str)

    def carried_out(self, models: ModelPair, run: Run, shared: SharedAlignments | None = None) -> Graft:
        """The graft, in memory.

        Args:
            models: those of ``sources``, loaded. shared: alignments that other modules of the same models use too.

        Raises:
            GraftError: as for ``transfer``.
        """
        module, material, config = self.module, self.material.of_models(models), self.plan.config
        identity = self._identity(models, material)
        with run.stage("converting to LoRA") if module.is_converted else nullcontext():
            raw = module.values(models.teacher)
        if isinstance(material, PromptMaterial):
            material.make(models, config, run)
        weights = self.weights.values(models.teacher) if self.weights else None
        plan = replace(self.plan, speaks=_learns_to_speak(material, config)).bind(raw, models, material.plain, weights)
        vocabularies = Vocabularies.of(models, module.tokenizer()) if raw.trains_tokens else None
        work = replace(self, plan=plan, material=material)
        # What modules share was planned before the weights could tell which layers the student has kept.
        shared = shared if plan.sites.layers == self.plan.sites.layers else None
        outcome, polished, aligner, notes = work._moved(vocabularies, run, shared)
        verdict, told = material.judged(outcome, config, run)
        remark = plan.given.remark(material.judging) if plan.given else None
        with run.stage("judging") if outcome.candidate.attached else nullcontext():
            cost = cost_of(models, plan.moved.modules, outcome.candidate)
        report = _report(plan, outcome, polished, aligner, run).model_copy(
            update={
                "cost": cost,
                "verdict": verdict,
                "module": place_of(module.name),
                "teacher": _as_named(models.teacher.record, module.base),
                "text": material.source.name if material.source else None,
                "alignment": self.alignment,
                "notes": [*plan.sites.notes, *material.remarks, *([remark] if remark else []), *notes],
                "identity": identity,
                **told,
            }
        )
        return Graft(outcome.candidate.checkpoint, report, outcome.candidate.alignment, models.student)

    def _moved(
        self, vocabularies: Vocabularies | None, run: Run, shared: SharedAlignments | None
    ) -> tuple[Outcome, PolishRecord | None, Aligner, list[str]]:
        """Align, move by every method, choose by the teacher's answers, polish; and remarks for the user."""
        plan, text = self.plan, self.material
        config, models, methods = plan.config, plan.models, plan.methods
        notes = []
        maps_of = map_methods(methods)
        aligner = Aligner(
            models,
            plan.wanted_maps(shifts=_shifts(plan, text), asked=bool(text.asked)),
            list(dict.fromkeys(maps_of.values())),
            text.to_align(),
            config,
            run,
            given=plan.given,
            shared=shared if isinstance(text, TextMaterial) else None,
            on_ray=text.on_ray(plan),
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
        outcome, polished = polish(outcome, polishing, run, identity=self._work(plan, text))
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
        teacher_layers=dict(plan.sites.depths),
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


def _as_named(teacher: ModelRecord, base: ModelLike | None) -> ModelRecord:
    """A teacher's folder as the module names its base: the folder may name what that model was made from."""
    if isinstance(base, str) and is_folder(teacher.name) and not is_folder(base):
        return teacher.model_copy(update={"hub_id": hub_id_of(base) or teacher.hub_id})
    return teacher


def _shifts(plan: Plan, material: Material) -> bool:
    """Whether shifts of the last hidden state are moved, to judge a module without a head."""
    return material.compares_states and plan.moved.head is None


def _learns_to_speak(material: Material, config: GraftConfig) -> bool:
    """Whether a polish by the teacher's distributions follows, beside which moved weights count for little."""
    return material.speaks and (isinstance(material, PromptMaterial) or config.polish_steps > 0)
