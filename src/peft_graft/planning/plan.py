"""The plan of a transfer: made once from shapes, bound once to loaded models.

``inspect`` prints it, ``transfer`` carries it out, studies call ``transfer``: whatever is refused is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from peft_graft.alignment.aligner import WantedMaps, no_text
from peft_graft.alignment.alignment import Alignment, copy_alignment
from peft_graft.alignment.methods import Method
from peft_graft.alignment.text import Sample
from peft_graft.checkpoints.library import in_library
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.config import AUTO, GraftConfig
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spaces import TOKENS_OUT, Space
from peft_graft.models.spec import expert_of
from peft_graft.models.vocabulary import embedding_similarity
from peft_graft.planning.checks import (
    asks_teacher,
    check_head_fit,
    check_labels,
    check_left_out,
    check_method,
    check_pooler,
    check_problem_type,
    check_reading,
    check_task_models,
    no_predictions,
    tying_notes,
    with_given_labels,
    with_teacher_labels,
)
from peft_graft.planning.correspondence import ExpertMap
from peft_graft.planning.experts import SAMPLES, match_experts, matched_experts
from peft_graft.planning.kept_layers import with_kept_layers
from peft_graft.planning.method_choice import choose_methods, expected_methods, method_of_spaces, same_sizes
from peft_graft.planning.selection import at_sites
from peft_graft.planning.sites import SitePlans, plan_sites
from peft_graft.planning.spaces import directions_of_modules
from peft_graft.serving.servable import check_servable, servable, servable_note

_LAST_STATE = Space(-1, TOKENS_OUT)


@dataclass(frozen=True)
class Plan:
    """Everything that a transfer will do.

    Attributes:
        config: the user's choices. has_text: whether there is text; None where that is not known yet.
        has_prompts: whether it is prompts, to learn from the teacher's answers to them.
        speaks: whether a polish learns what the teacher says next, in answers to prompts or in plain text.
        given: an alignment that the user made before.
        models: described from their configurations, and loaded once the plan is bound.
        module: the teacher's module. moved: the part of it that moves, in the library that it is written for.
        sites: which modules make up the module at every site of the student, and the spaces that this relates.
        methods: tried in this order. reason: why these.
    """

    config: GraftConfig
    has_text: bool | None
    has_prompts: bool
    speaks: bool
    given: Alignment | None
    models: ModelPair
    module: PeftCheckpoint
    moved: PeftCheckpoint
    sites: SitePlans
    methods: tuple[Method, ...]
    reason: str

    @classmethod
    def make(
        cls,
        raw: RawCheckpoint,
        models: ModelPair,
        config: GraftConfig,
        *,
        has_text: bool | None = None,
        has_prompts: bool = False,
        speaks: bool = False,
        given: Alignment | None = None,
    ) -> Plan:
        """Plan a transfer from shapes alone, so that what cannot work fails before weights are loaded.

        Args:
            raw: the module as its files say it; values are not looked at.
            models: described from their configurations (``loading.blank_handle``), without weights.
            has_text: None leaves open whether there will be text (``inspect`` without ``--text``).
            has_prompts, speaks: see ``Plan``.

        Raises:
            GraftError: what ``transfer`` refuses: CheckpointError, ModelError, PlanError, HeadError, AlignmentError or
                TextError, with the place, what was expected, what came, and the fix.
        """
        layers, told = _layers(config, models, given)
        module, moved = _resolved(raw, models, config)
        check_head_fit(moved, config)
        check_problem_type(moved, config)
        check_reading(models, config, has_text=bool(has_text))
        if asks_teacher(config) and has_text is False:
            raise no_predictions(config)
        check_method(raw, config, has_prompts=has_prompts)
        sites = _sites(moved, models, config.model_copy(update={"layers": layers}), method_of_spaces(config, given))
        sites = replace(sites, notes=(*told, *sites.notes))
        check_servable([site.student for site in sites.sites], models.student, config.for_)
        check_task_models(module.raw, moved.raw, models, has_text=bool(has_text))
        methods = expected_methods(config, sites, given, speaks=speaks)
        if config.method == "copy":
            copy_alignment(sites.pairs, "", "")
        elif has_text is False and given is None and (config.method != AUTO or not same_sizes(sites)):
            raise no_text("prune-align" if config.method == AUTO else config.method)
        return cls(config, has_text, has_prompts, speaks, given, models, module, moved, sites, tuple(methods), "")

    def bind(
        self,
        raw: RawCheckpoint,
        models: ModelPair,
        samples: Sequence[Sample] = (),
        weights: RawCheckpoint | None = None,
    ) -> Plan:
        """The same plan on loaded models: the module's values, the methods to try, the experts that correspond.

        Args:
            raw: with values; a LoRA where the module was of a kind that is converted first.
            samples: unlabelled text by which experts are matched.
            weights: a module at the same sites that moves in place of this one.

        Raises:
            HeadError: the head reads a pooler that the student's checkpoint lacks.
            GraftError: as for ``make``.
        """
        given = self.given
        layers, told = _layers(self.config, models, given)
        config = self.config.model_copy(update={"layers": layers})
        module, moved = _resolved(raw, models, config)
        if weights is not None:
            moved = _resolved(weights, models, config)[1]
        sites = _sites(moved, models, config, method_of_spaces(config, given))
        open_choice = given is None and config.method == AUTO
        similarity = embedding_similarity(models.teacher.base, models.student.base) if open_choice else None
        choice = choose_methods(
            config, sites, given, has_text=bool(self.has_text), similarity=similarity, speaks=self.speaks
        )
        experts = self._experts(moved, models, choice.methods, samples, layers)
        if experts is not None:
            sites = _sites(moved, models, config, choice.methods[0], experts)
        check_pooler(sites, models.student)
        sites = replace(sites, notes=(*told, *sites.notes))
        if config.for_ is not None:
            sites = replace(sites, notes=(*sites.notes, *servable_note(module, moved, models.teacher)))
        return replace(
            self, models=models, module=module, moved=moved, sites=sites, methods=choice.methods, reason=choice.reason
        )

    def _experts(
        self,
        moved: PeftCheckpoint,
        models: ModelPair,
        methods: Sequence[Method],
        samples: Sequence[Sample],
        layers: str,
    ) -> ExpertMap | None:
        """Which experts correspond, where the module acts in some: by the alignment or the text; None for copy."""
        if not any(expert_of(role) is not None for role in moved.roles):
            return None
        if self.given is not None:
            return matched_experts(self.given.maps, models.student.architecture)
        if samples and any(method.needs_text for method in methods):
            return match_experts(models, samples[:SAMPLES], layers)
        return None

    @property
    def may_fit_head(self) -> bool:
        """Whether the head is fitted to the teacher's answers, where it is asked, and the better one taken."""
        head = self.moved.head
        return head is not None and head.can_be_fitted and self.config.head in ("auto", "fit")

    def wanted_maps(self, *, shifts: bool = False, asked: bool = False) -> WantedMaps:
        """The maps that carrying the plan out needs.

        Args:
            shifts: whether shifts of the last hidden state are moved too, to judge a module without a head.
            asked: whether the teacher is asked about the text.
        """
        pairs = dict(self.sites.pairs)
        if shifts:
            sizes = (model.architecture.size(_LAST_STATE) for model in (self.models.teacher, self.models.student))
            pairs[_LAST_STATE, _LAST_STATE] = (next(sizes), next(sizes))
        head = self.moved.head
        modules = self.moved.modules.values()
        return WantedMaps(
            pairs,
            directions_of_modules(modules, self.methods[0], head=head.reads if head else None, shifts=head is None),
            fits_heads=asked and self.may_fit_head,
        )


def at_teacher(raw: RawCheckpoint, teacher: ModelHandle, config: GraftConfig) -> PeftCheckpoint:
    """The whole module tied to the teacher's sites; errors name the model that was given, not the one on record.

    Raises:
        CheckpointError, ModelError, HeadError: see ``checkpoints.resolve``.
    """
    names = config.labels if isinstance(config.labels, tuple) else ()
    raw = replace(raw, base_model=teacher.name, labels=None if names else raw.labels)
    raw = raw if names else with_teacher_labels(raw, teacher.base.config)
    own = teacher.base_tensors(output=raw.trains_output)
    module = resolve(raw, teacher.architecture, own, with_head=config.head != "drop", leave=config.sites is not None)
    return with_given_labels(module, names) if names else module


def _resolved(raw: RawCheckpoint, models: ModelPair, config: GraftConfig) -> tuple[PeftCheckpoint, PeftCheckpoint]:
    """The whole module tied to the teacher's sites, and the part of it that moves."""
    teacher = models.teacher
    module = at_teacher(raw, teacher, config)
    check_left_out(module, config)
    check_labels(module, models.student.base.config)
    part = at_sites(module, config.sites, teacher.architecture, teacher.text_config)
    return module, servable(in_library(part, config.library), teacher, config.for_)


def _layers(config: GraftConfig, models: ModelPair, given: Alignment | None) -> tuple[str, list[str]]:
    """The layer map: where nothing is said that of a given alignment, else the one that the weights tell."""
    told = with_kept_layers(config.layers, models)
    known = given.layers if given and config.layers == AUTO else None
    if known and known != told[0] and known.count(",") + 1 == models.student.architecture.num_layers:
        return known, []
    return told


def _sites(
    moved: PeftCheckpoint, models: ModelPair, config: GraftConfig, method: Method, experts: ExpertMap | None = None
) -> SitePlans:
    found = plan_sites(moved, models.teacher.architecture, models.student.architecture, config, method, experts)
    return replace(found, notes=(*found.notes, *tying_notes(moved, models)))
