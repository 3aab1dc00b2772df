"""Candidates: a module moved to the student by one method, attached once, and measured, fitted and polished there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft_graft.alignment.alignment import Alignment, Pair
from peft_graft.alignment.maps import SpaceMap
from peft_graft.alignment.methods import Diagnostics, Method, map_axis
from peft_graft.alignment.vocabulary import Vocabularies
from peft_graft.checkpoints.attached import AttachedModel
from peft_graft.checkpoints.heads import head_form
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.distill.agreement import Agreement
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.fit_head import features, fit_head, samples_to_fit
from peft_graft.distill.fit_layers import STAGE as FITTING_LAYERS
from peft_graft.distill.fit_layers import fit_modules
from peft_graft.distill.teacher import FIT, TextDistillation
from peft_graft.labels import ProblemType
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import ModelPair
from peft_graft.models.spaces import VOCABULARY, Site, Space, space_at
from peft_graft.models.tasks import Task
from peft_graft.modules.average import average
from peft_graft.modules.base import Axis, LabelledTensor, Module
from peft_graft.modules.head import Head
from peft_graft.planning.sites import SitePlan, SitePlans
from peft_graft.projection import project, resize_inner_layer
from peft_graft.record import Record
from peft_graft.run import Run

FITTING = "comparing methods"  # the stage


class MapRecord(Record):
    """One space's map, as it served a site: what the method said about it (``pairs``, ``mean_correlation``, ...)."""

    space: str
    teacher_space: str
    diagnostics: dict[str, float]


class SiteRecord(Record):
    """One module of the student.

    ``norm_kept``: Frobenius norm of the grafted update over the mean of the teacher's updates that it is made from
    (LoRA: of B A; bottleneck adapter: of up times down). ``share``: how much of the teacher's whole module, by squared
    norm, those updates are.
    """

    site: str
    teacher_sites: list[str]
    norm_kept: float
    share: float
    maps: list[MapRecord]


class HeadRecord(Record):
    """The head: task, what it reads, label names, its map, inner units that the student has no place for.

    ``how``: ``carried`` through the map, or ``fitted`` to the teacher's predictions; then ``fit`` says how well.
    ``problem_type``: what its outputs are, None where nothing says so.
    """

    task: Task
    reads: str
    labels: list[str]
    dropped_inner_units: int
    diagnostics: dict[str, float]
    how: str | None = None
    fit: dict[str, float] = {}
    problem_type: ProblemType | None = None


@dataclass
class Candidate:
    """A module moved to the student by one method.

    Attributes:
        method: its name. alignment: the maps that it came through.
        checkpoint: the modules at the student's sites, and the head if one was carried.
        sites, head: how each came about.
        distillation: what it is measured by and learns from; None where the teacher is not asked.
        attached: the student with the module inside, None where the teacher is not asked. ``put`` changes its values.
    """

    method: str
    alignment: Alignment
    checkpoint: PeftCheckpoint
    sites: list[SiteRecord]
    head: HeadRecord | None
    distillation: Distillation | None = None
    attached: AttachedModel | None = None

    @property
    def learning(self) -> tuple[Distillation, AttachedModel]:
        """What it learns from and the model that learns, of a candidate that has both."""
        assert self.distillation is not None
        assert self.attached is not None
        return self.distillation, self.attached

    def put(self, checkpoint: PeftCheckpoint) -> None:
        """Put the values of a checkpoint of the same sites into the attached model; ``checkpoint`` stays as it is.

        A head that gets an inner layer of its own, which it shared with the student before, is attached anew.
        """
        distillation, attached = self.learning
        raw = checkpoint_of_student(checkpoint, distillation.models.student)
        if attached.takes(raw):
            attached.load(raw)
        else:
            self.attached = None  # before there is another one
            self.attached = distillation.attach(checkpoint)

    def measure(self) -> Agreement:
        """How the attached model agrees with the teacher on the text that chooses."""
        distillation, attached = self.learning
        return distillation.measure(attached)

    def judge(self) -> Agreement:
        """The same, with intervals, on the text that judges, by which nothing may be chosen."""
        distillation, attached = self.learning
        return distillation.judge(attached)

    def fit_head(self, checkpoint: PeftCheckpoint) -> tuple[PeftCheckpoint, dict[str, float]]:
        """The checkpoint with its head fitted to the teacher's answers, and what the fit reports.

        Args:
            checkpoint: what the attached model holds, with a head.
        """
        distillation, attached = self.learning
        assert isinstance(distillation, TextDistillation)  # nothing else has a head
        assert checkpoint.head is not None
        student = distillation.models.student
        # Without pairs the other way round: a penalty chosen on them would be chosen on what it was fitted to.
        own = distillation.train.part(0, min(FIT, distillation.own))
        known = own.part(0, samples_to_fit(own, student.architecture.hidden_size))
        read, wanted = features(attached, student, known, checkpoint.head.reads)
        head, report = fit_head(checkpoint.head, read, wanted)
        return replace(checkpoint, head=head), report

    def read_back(self, raw: RawCheckpoint) -> PeftCheckpoint:
        """The candidate's checkpoint with the values of a raw one that has the student's own paths."""
        student, before = self.learning[0].models.student, self.checkpoint
        own = student.base_tensors(output=raw.trains_output)
        found = resolve(raw, student.architecture, own, with_head=before.head is not None)
        head = replace(found.head, labels=before.head.labels) if found.head and before.head else None
        return replace(before, modules=found.modules, head=head)


@dataclass(frozen=True)
class CandidateBuilder:
    """Moves one module to one student, by any method.

    Attributes:
        checkpoint: the teacher's module. plan: where it goes. models: from which to which.
        vocabularies: which tokens are the same, for modules that train tokens.
        alignment: gives a method's alignment, made when it is asked for.
        distillation: what candidates are measured by and learn from; None where the teacher is not asked.
    """

    checkpoint: PeftCheckpoint
    plan: SitePlans
    models: ModelPair
    vocabularies: Vocabularies | None
    alignment: Callable[[Method], Alignment]
    run: Run
    distillation: Distillation | None = None

    def build(self, method: Method) -> Candidate:
        """The module moved by a method and, where the teacher is asked, attached.

        Raises:
            AlignmentError: the method cannot move this module.
        """
        alignment = self.alignment(method)
        with self.run.stage("projecting"):
            modules, sites = project_modules(self.checkpoint, self.plan, alignment, method, self.vocabularies)
            head, record = project_head(self.checkpoint, self.plan, alignment, self.models.student.architecture)
        if method.moves_nothing:
            seeds = enumerate(sorted(modules, key=str))
            modules = {site: modules[site].untrained(seed) for seed, site in seeds}
        moved = replace(self.checkpoint, modules=modules, head=head)
        attached: AttachedModel | None = None
        if method.fits_layers:
            assert self.distillation is not None  # the plan has refused it without
            with self.run.stage(FITTING_LAYERS):
                moved, attached = fit_modules(moved, self.plan, self.distillation, self.run)
            sites = _refitted_records(sites, self.checkpoint, moved.modules)
        elif self.distillation is not None:
            with self.run.stage(FITTING):
                attached = self.distillation.attach(moved)
        return Candidate(method.name, alignment, moved, sites, record, self.distillation, attached)


def project_modules(
    checkpoint: PeftCheckpoint,
    plan: SitePlans,
    alignment: Alignment,
    method: Method,
    vocabularies: Vocabularies | None,
) -> tuple[dict[Site, Module], list[SiteRecord]]:
    """The student's modules: each teacher module of a site projected through its maps, then averaged; and records."""
    modules: dict[Site, Module] = {}
    records: list[SiteRecord] = []
    strengths = {place: source.strength for place, source in checkpoint.modules.items()}
    for site in plan.sites:
        moved: list[Module] = []
        maps: dict[Pair, Diagnostics] = {}
        for source in site.teacher:
            module = checkpoint.modules[source]
            module.check_method(method.name)
            names = {axis: map_axis(method, module, axis) for axis in module.axes}
            used = {
                axis: (space_at(source.layer, name), site.space(source, name))
                for axis, name in names.items()
                if name != VOCABULARY
            }
            found: dict[Axis, SpaceMap] = {axis: alignment.map(pair) for axis, pair in used.items()}
            if rest := names.keys() - used.keys():
                assert vocabularies is not None  # made wherever a module trains tokens
                found |= dict.fromkeys(rest, vocabularies.map_for(module))
            moved.append(project(module, found.__getitem__))
            maps.update({pair: alignment.diagnostics.get(pair, {}) for pair in used.values()})
        modules[site.student] = _at(site, average(moved))
        records.append(_site_record(site, strengths, modules[site.student], maps))
    return modules, records


def _at(site: SitePlan, module: Module) -> Module:
    """A moved module at its place in the student, its axes in the student's spaces."""
    tensors = {
        name: LabelledTensor(
            tensor.values,
            tuple(axis and replace(axis, space=site.space(module.site, axis.space).name) for axis in tensor.axes),
        )
        for name, tensor in module.tensors.items()
    }
    return replace(module, site=site.student, tensors=tensors)


def project_head(
    checkpoint: PeftCheckpoint, plan: SitePlans, alignment: Alignment, student: Architecture
) -> tuple[Head | None, HeadRecord | None]:
    """The student's head and its record, None where the plan carries none."""
    if checkpoint.head is None or not plan.head:
        return None, None
    space = Space(-1, checkpoint.head.reads)
    moved = project(checkpoint.head, lambda axis: alignment.map((space, space)))
    head_form(moved, checkpoint.raw, student)
    moved, dropped = resize_inner_layer(moved, student.size(space))
    return moved, HeadRecord(
        task=moved.task,
        reads=moved.reads,
        labels=list(moved.labels) or [f"LABEL_{index}" for index in range(moved.num_labels) if moved.has_classes],
        dropped_inner_units=dropped,
        problem_type=moved.problem_type,
        diagnostics=alignment.diagnostics.get((space, space), {}),
    )


def _site_record(
    site: SitePlan, strengths: Mapping[Site, float], module: Module, maps: dict[Pair, Diagnostics]
) -> SiteRecord:
    """A site's record, given the strengths of all of the teacher's modules."""
    whole = sum(strength**2 for strength in strengths.values())
    return SiteRecord(
        site=str(site.student),
        teacher_sites=[str(source) for source in site.teacher],
        norm_kept=_kept(module, [strengths[source] for source in site.teacher]),
        share=sum(strengths[source] ** 2 for source in site.teacher) / whole if whole else 0.0,
        maps=[
            MapRecord(space=str(second), teacher_space=str(first), diagnostics=diagnostics)
            for (first, second), diagnostics in maps.items()
        ],
    )


def _refitted_records(
    records: Sequence[SiteRecord], checkpoint: PeftCheckpoint, modules: Mapping[Site, Module]
) -> list[SiteRecord]:
    """The records of modules that came by no map: their norms, and no maps."""
    by_name = {str(site): module for site, module in modules.items()}
    teachers = {str(site): module for site, module in checkpoint.modules.items()}
    found = []
    for record in records:
        kept = _kept(by_name[record.site], [teachers[source].strength for source in record.teacher_sites])
        found.append(record.model_copy(update={"norm_kept": kept, "maps": []}))
    return found


def _kept(module: Module, before: Sequence[float]) -> float:
    """The strength of a module over the mean of those that it is made from."""
    mean = sum(before) / len(before)
    return module.strength / mean if mean else 0.0
