"""Which modules of the teacher make up the module at every site of the student, and which spaces that relates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.methods import Method, map_axis
from peft_graft.checkpoints.heads import adapted_layers, head_form
from peft_graft.checkpoints.resolve import PeftCheckpoint, patterns
from peft_graft.config import GraftConfig
from peft_graft.errors import PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import VOCABULARY, Site, Space, space_at
from peft_graft.models.spec import Stack, expert_of, moved_space
from peft_graft.models.tasks import Task
from peft_graft.modules.average import check_widths
from peft_graft.modules.base import Axis, Module
from peft_graft.planning.correspondence import ExpertMap, advice, corresponding_stacks, corresponds, counterpart
from peft_graft.planning.layers import LayerMap, layer_map, layer_maps
from peft_graft.planning.spaces import listed_roles

#: Tasks of which no head is missed.
_HEADLESS = (Task.BASE, Task.CAUSAL_LM, Task.MASKED_LM, Task.SEQ2SEQ_LM)
#: As many kinds of left-out parts a note names.
_NAMED = 5


@dataclass(frozen=True)
class SitePlan:
    """One module of the student: its site and the teacher's sites that it is made from."""

    student: Site
    teacher: tuple[Site, ...]

    def space(self, source: Site, name: str) -> Space:
        """What corresponds in the student to a space of the teacher that a module at ``source`` lives in."""
        return space_at(self.student.layer, moved_space(name, source.role, self.student.role))


@dataclass(frozen=True)
class SitePlans:
    """All modules of the student.

    Attributes:
        layers: for every stack of the student that receives modules, by its name, the teacher layers of each layer.
        sites: the student's modules.
        pairs: pairs of spaces whose maps are needed, with their (teacher, student) sizes.
        head: whether the head is carried. notes: remarks for the user.
        depths: how many layers the teacher has whose numbers ``layers`` says, by the same names.
    """

    layers: Mapping[str, LayerMap]
    sites: tuple[SitePlan, ...]
    pairs: Mapping[Pair, tuple[int, int]]
    head: bool
    notes: tuple[str, ...] = field(default=())
    depths: Mapping[str, int] = field(default_factory=dict)

    @property
    def recorded_layers(self) -> list[list[int]] | dict[str, list[list[int]]]:
        """The layer map for a record: plain for a stack without a name, by stack otherwise."""
        found = {stack: [list(sources) for sources in mapping] for stack, mapping in self.layers.items()}
        return found[""] if found.keys() == {""} else found


@dataclass(frozen=True)
class _Sides:
    """What is placed: the teacher's module, and the two models that it goes from and to."""

    checkpoint: PeftCheckpoint
    teacher: Architecture
    student: Architecture
    experts: ExpertMap | None


def plan_sites(
    checkpoint: PeftCheckpoint,
    teacher: Architecture,
    student: Architecture,
    config: GraftConfig,
    method: Method,
    experts: ExpertMap | None = None,
) -> SitePlans:
    """Place every module, all sites, layers and shapes checked.

    Args:
        checkpoint: what moves. method: one that will be used; the published shortcut relates other spaces.
        experts: which experts correspond; those of one number when None.

    Raises:
        PlanError: a role that the student lacks, a layer map that leaves nothing to move, modules that cannot be
            averaged, or spaces that the method cannot map.
        HeadError: the student's task model has another form of head.
    """
    sides = _Sides(checkpoint, teacher, student, experts)
    stacks = corresponding_stacks(teacher, student)
    _check_roles(checkpoint, stacks, student)
    for module in checkpoint.modules.values():
        module.check_models(teacher, student)
    mappings, sites, notes = _placed(sides, stacks, config.layers)
    notes = [*checkpoint.raw.notes, *notes, *_expert_notes(checkpoint, sites), *_left_out_notes(checkpoint, teacher)]
    notes += [
        f"{count} tensors of {tower} are left out: what reads images or sound is not moved, and stays the student's own"
        for tower, count in checkpoint.other_towers.items()
    ]
    pairs: dict[Pair, tuple[int, int]] = {}
    for site in sites:
        check_widths([checkpoint.modules[source] for source in site.teacher])
        for source in site.teacher:
            module = checkpoint.modules[source]
            for axis in (axis for axis in module.axes if axis.space != VOCABULARY):
                _add_pair(pairs, sides, method, module, axis, site)
    if checkpoint.raw.task is Task.CAUSAL_LM and all(stack.kind != "decoder" for stack in student.row.stacks):
        notes.append(
            f"the module was trained to generate text, and a {student.model_type} model is an encoder, which does not: "
            "what moves is what it does to the layers"
        )
    _check_sizes(pairs, teacher, student)
    carried = checkpoint.head is not None and config.head != "drop"
    if checkpoint.head is not None and carried:
        head_form(checkpoint.head, checkpoint.raw, student)
        space = Space(-1, checkpoint.head.reads)
        pairs[space, space] = (teacher.size(space), student.size(space))
    elif config.head != "drop" and checkpoint.raw.task not in _HEADLESS:
        notes.append("no head was saved with the module, so none is carried")
    depths = {second.name: teacher.depths[first.name] for first, second in stacks if second.name in mappings}
    return SitePlans(mappings, tuple(sites), dict(sorted(pairs.items())), carried, tuple(notes), depths)


def _placed(
    sides: _Sides, stacks: Sequence[tuple[Stack, Stack]], layers: str
) -> tuple[dict[str, LayerMap], list[SitePlan], list[str]]:
    """The layer map of every stack, the student's modules, and remarks.

    Raises:
        PlanError: no layer of the student would receive a module.
    """
    checkpoint = sides.checkpoint
    specs, mappings = layer_maps(layers, stacks), dict[str, LayerMap]()
    sites: list[SitePlan] = []
    notes: list[str] = []
    for first, second in stacks:
        roles = [role for role in checkpoint.roles_in_layers if first.local(role) is not None]
        if not roles and len(stacks) > 1:
            continue
        mapping = layer_map(specs[second.name], sides.teacher.depths[first.name], sides.student.depths[second.name])
        mappings[second.name] = mapping
        used = [
            site
            for layer, sources in enumerate(mapping)
            for site in _sites_of_layer(sides, roles, (first, second), layer, sources)
        ]
        if used:
            notes += _layer_notes(checkpoint, roles, mapping, used, second.name)
        sites += used
    sites += [SitePlan(site, (site,)) for site in checkpoint.modules if site.layer < 0]
    if not sites:
        raise PlanError(
            "no student layer would receive a module",
            where=f"--layers {layers}",
            expected=f"a map that uses teacher layers {', '.join(map(str, checkpoint.layers))}",
            found="; ".join(" ".join("+".join(map(str, part)) for part in mapping) for mapping in mappings.values()),
            fix="choose --layers avg, or name the layers",
        )
    return mappings, sites, notes


def _sites_of_layer(
    sides: _Sides, roles: Sequence[str], stacks: tuple[Stack, Stack], layer: int, sources: Sequence[int]
) -> list[SitePlan]:
    """The modules of one layer of the student; places that only this layer lacks are left out."""
    found: dict[Site, list[Site]] = {}
    for role in roles:
        for source in (Site(source, role) for source in sources):
            target = counterpart(source, stacks, layer, sides.experts)
            if source in sides.checkpoint.modules and target is not None and sides.student.has(target):
                found.setdefault(target, []).append(source)
    return [SitePlan(target, tuple(present)) for target, present in found.items()]


def _add_pair(
    pairs: dict[Pair, tuple[int, int]], sides: _Sides, method: Method, module: Module, axis: Axis, site: SitePlan
) -> None:
    teacher, student = sides.teacher, sides.student
    name = map_axis(method, module, axis)
    first, second = space_at(module.site.layer, name), site.space(module.site, name)
    pairs[first, second] = (teacher.size(first), student.size(second))
    if name == axis.space:
        return
    own = teacher.size(Space(module.site.layer, axis.space)), student.size(site.space(module.site, axis.space))
    if own != pairs[first, second]:
        raise PlanError(
            f"{method.name} prunes output units by the indices of the input, which here differ in number",
            where=str(site.student),
            expected=f"{pairs[first, second][0]} -> {pairs[first, second][1]} units",
            found=f"{own[0]} -> {own[1]}",
            fix="use --method prune-align",
        )


def _check_roles(checkpoint: PeftCheckpoint, stacks: Sequence[tuple[Stack, Stack]], student: Architecture) -> None:
    for site in checkpoint.modules:
        if not corresponds(stacks, site.role, student):
            raise PlanError(
                "the student has no counterpart of this site",
                where=str(site),
                expected=f"one of the roles of {student.model_type}: {listed_roles(student.roles)}",
                found=site.role,
                fix=advice(site.role, stacks, student),
            )


def _check_sizes(pairs: Mapping[Pair, tuple[int, int]], teacher: Architecture, student: Architecture) -> None:
    """Refuse spaces that differ in size where they cannot be aligned.

    Raises:
        PlanError: they do, and one of the models does not read text.
    """
    different = next((pair for pair, (first, second) in pairs.items() if first != second), None)
    if different and not (teacher.row.reads_text and student.row.reads_text):
        raise PlanError(
            "models of different width can only be aligned on text, which is not all that these read",
            where=f"teacher {different[0]} -> student {different[1]}",
            expected=f"{pairs[different][0]} units in the student",
            found=pairs[different][1],
            fix="choose a student of the teacher's width",
        )


def _layer_notes(
    checkpoint: PeftCheckpoint, roles: Sequence[str], mapping: LayerMap, sites: Sequence[SitePlan], stack: str
) -> list[str]:
    notes = []
    where = f"{stack} " if stack else ""
    used = {source for sources in mapping for source in sources}
    layers = sorted({site.layer for site in checkpoint.modules if site.role in roles})
    unused = [layer for layer in layers if layer not in used]
    if unused:
        notes.append(f"modules of teacher {where}layers {', '.join(map(str, unused))} are left out by the layer map")
    without = sorted(set(range(len(mapping))) - {site.student.layer for site in sites})
    if without:
        notes.append(f"student {where}layers {', '.join(map(str, without))} receive no module")
    moved = {source for site in sites for source in site.teacher}
    lacking = [
        site
        for site in checkpoint.modules
        if site.role in roles and site.layer in used and site not in moved and expert_of(site.role) is None
    ]
    if lacking:
        names = ", ".join(sorted({site.role for site in lacking}))
        notes.append(f"{len(lacking)} modules are left out, for the student's {where}layers there have no {names}")
    if len(used) < len(mapping):
        notes.append(f"the student has more {where}layers than the map uses of the teacher, so modules repeat")
    return notes


def _left_out_notes(checkpoint: PeftCheckpoint, teacher: Architecture) -> list[str]:
    """What becomes of parts that have no site: those of a head that stays behind, and those without a role."""
    of_head = [path for path in checkpoint.left_out if path in adapted_layers(checkpoint.raw, teacher)]
    others = [path for path in checkpoint.left_out if path not in of_head]
    notes = [f"what the module trained at {path} is left out with the head that reads it" for path in of_head]
    if others:
        names = patterns(others)
        shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        notes.append(
            f"{len(others)} of the module's {len(checkpoint.raw.parts)} parts have no role yet and are left "
            f"out: {shown}"
        )
    return notes


def _expert_notes(checkpoint: PeftCheckpoint, sites: Sequence[SitePlan]) -> list[str]:
    moved = {source for site in sites for source in site.teacher}
    layers = {source.layer for source in moved}
    left = [site for site in checkpoint.modules if expert_of(site.role) is not None and site not in moved]
    count = len({(site.layer, expert_of(site.role)) for site in left if site.layer in layers})
    return [f"modules of {count} experts are left out, for the student has no counterpart of them"] if count else []
