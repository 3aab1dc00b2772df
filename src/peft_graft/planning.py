"""What goes where, decided and checked before any forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from peft_graft.alignment import Pair
from peft_graft.architectures import Architecture
from peft_graft.checkpoints import PeftCheckpoint
from peft_graft.entries import PREFIX_ROLE, PROMPT_ROLE
from peft_graft.errors import PlanError
from peft_graft.families import LINEAR_ROLES
from peft_graft.heads import head_form
from peft_graft.methods import METHODS, Method
from peft_graft.modules import GLOBAL_SPACES, POOLED_OUT, Axis, Module, Site, Space, space_at
from peft_graft.settings import HeadChoice

#: For every student layer the teacher layers whose modules make up its module.
LayerMap = tuple[tuple[int, ...], ...]


def layer_map(spec: str, teacher_layers: int, student_layers: int) -> LayerMap:
    """Which teacher layers serve each student layer.

    With n teacher and m student layers, student layer l owns the window [floor(l n / m), floor((l + 1) n / m)) of
    teacher layers. ``skip`` takes the window's first layer (k l for k = n / m, arXiv 2403.18804), ``avg``
    the mean of all its layers. A student deeper than the teacher has empty windows; those take layer
    floor(l n / m), so teacher layers repeat in order.

    Args:
        spec: ``skip``, ``avg``, or one teacher layer for each student layer: ``0,2,4``.

    Raises:
        PlanError: an unknown word, a wrong number of layers, or a layer that the teacher lacks.
    """
    n, m = teacher_layers, student_layers
    if spec in ("skip", "avg"):
        starts = [layer * n // m for layer in range(m)]
        ends = [max((layer + 1) * n // m, start + 1) for layer, start in enumerate(starts)]
        return tuple(
            (start,) if spec == "skip" else tuple(range(start, end)) for start, end in zip(starts, ends, strict=True)
        )
    try:
        chosen = [int(part) for part in spec.split(",")]
    except ValueError:
        raise PlanError(
            "not a layer map", where=f"--layers {spec}", expected="skip, avg, or numbers such as 0,2,4"
        ) from None
    if len(chosen) != m:
        raise PlanError(
            "the layer map has the wrong length",
            where=f"--layers {spec}",
            expected=f"{m} numbers, one teacher layer for each student layer",
            found=len(chosen),
        )
    bad = [layer for layer in chosen if not 0 <= layer < n]
    if bad:
        raise PlanError(
            "the teacher has no such layer", where=f"--layers {spec}", expected=f"0 to {n - 1}", found=bad[0]
        )
    return tuple((layer,) for layer in chosen)


@dataclass(frozen=True)
class SitePlan:
    """One module of the student: its site and the teacher's sites that it is made from."""

    student: Site
    teacher: tuple[Site, ...]


@dataclass(frozen=True)
class TransferPlan:
    """Everything that a transfer will do.

    Attributes:
        layers: teacher layers for each student layer. sites: the student's modules.
        pairs: pairs of spaces whose maps are needed, with their (teacher, student) sizes.
        head: whether the head is carried. notes: remarks for the user.
    """

    layers: LayerMap
    sites: tuple[SitePlan, ...]
    pairs: Mapping[Pair, tuple[int, int]]
    head: bool
    notes: tuple[str, ...] = field(default=())


def map_axis(method: Method, module: Module, axis: Axis) -> str:
    """The name of the space whose map moves this axis: its own, or the input's under the published shortcut."""
    if method.writes_through_input and axis.direction == "write" and "A" in module.tensors:
        read = module.tensors["A"].axes[1]
        assert read is not None
        return read.space
    return axis.space


def at_sites(checkpoint: PeftCheckpoint, patterns: Sequence[str] | None) -> PeftCheckpoint:
    """The checkpoint with the modules at some of its sites alone.

    Args:
        patterns: roles, or layers and roles, with wildcards: ``attn.value``, ``ffn.*``, ``0/*``; None for all.

    Raises:
        PlanError: a pattern that matches none of the checkpoint's sites.
    """
    if patterns is None:
        return checkpoint
    names = {site: (site.role, f"{site.layer}/{site.role}") for site in checkpoint.modules}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for pair in names.values() for name in pair):
            raise PlanError(
                "the module has no such site",
                where=f"--sites {pattern}",
                expected=f"{', '.join(checkpoint.roles)}, in layers {', '.join(map(str, checkpoint.layers))}",
                fix="name roles, or LAYER/ROLE, with * for any",
            )
    kept = {
        site: module
        for site, module in checkpoint.modules.items()
        if any(fnmatchcase(name, pattern) for pattern in patterns for name in names[site])
    }
    return replace(checkpoint, modules=kept)


def plan_transfer(
    checkpoint: PeftCheckpoint,
    teacher: Architecture,
    student: Architecture,
    *,
    layers: str = "skip",
    method: Method,
    head: HeadChoice = "auto",
) -> TransferPlan:
    """Plan a transfer, every site, layer and shape checked.

    Raises:
        PlanError: a role that the student lacks, a layer map that leaves nothing to move, or spaces that the method
            cannot map.
        HeadError: the student's task model has another form of head.
    """
    _check_roles(checkpoint, student)
    mapping = layer_map(layers, teacher.num_layers, student.num_layers)
    sites: list[SitePlan] = []
    for layer, sources in enumerate(mapping):
        for role in sorted({site.role for site in checkpoint.modules if site.layer >= 0}):
            present = tuple(Site(source, role) for source in sources if Site(source, role) in checkpoint.modules)
            if present:
                sites.append(SitePlan(Site(layer, role), present))
    sites += [SitePlan(site, (site,)) for site in checkpoint.modules if site.layer < 0]
    if not sites:
        raise PlanError(
            "no student layer would receive a module",
            where=f"--layers {layers}",
            expected=f"a map that uses teacher layers {', '.join(map(str, checkpoint.layers))}",
            found=" ".join("+".join(map(str, sources)) for sources in mapping),
            fix="choose --layers avg, or name the layers",
        )
    pairs: dict[Pair, tuple[int, int]] = {}
    for site in sites:
        for source in site.teacher:
            module = checkpoint.modules[source]
            for axis in _axes(module):
                _add_pair(pairs, method, module, axis, site.student, teacher, student)
    notes = _layer_notes(checkpoint, mapping, sites, student)
    carried = checkpoint.head is not None and head != "drop"
    if checkpoint.head is not None and carried:
        head_form(checkpoint.head, checkpoint.raw, student)
        space = Space(-1, checkpoint.head.reads)
        pairs[space, space] = (teacher.size(space), student.size(space))
    elif checkpoint.head is None and head != "drop" and checkpoint.raw.task not in ("base", "causal-lm"):
        notes.append("no head was saved with the module, so none is carried")
    return TransferPlan(mapping, tuple(sites), dict(sorted(pairs.items())), carried, tuple(notes))


def plan_alignment(
    teacher: Architecture, student: Architecture, *, layers: str = "skip", roles: Sequence[str] | None = None
) -> dict[Pair, tuple[int, int]]:
    """The pairs of spaces that any module at these roles may need, with their (teacher, student) sizes.

    Args:
        roles: linear roles, and ``adapter`` for what bottleneck adapters see; all that both models have by default.
            The spaces that heads read are always included.

    Raises:
        PlanError: a role that one of the models lacks.
    """
    shared = [role for role in LINEAR_ROLES if role in teacher.row.linears and role in student.row.linears]
    chosen = list(roles) if roles else [*shared, "adapter"]
    names: set[str] = set()
    for role in chosen:
        if role in shared:
            names |= {teacher.row.linears[role].reads, teacher.row.linears[role].writes}
        elif role == "adapter":
            names |= {"attn.in", "attn.output.out", "ffn.in", "ffn.down.out", "layer.out"}
        else:
            raise PlanError("the models do not share this role", where=role, expected=", ".join([*shared, "adapter"]))
    pairs: dict[Pair, tuple[int, int]] = {}
    for layer, sources in enumerate(layer_map(layers, teacher.num_layers, student.num_layers)):
        for source in sources:
            for name in names:
                first, second = Space(source, name), Space(layer, name)
                if first in teacher.sizes and second in student.sizes:
                    pairs[first, second] = (teacher.size(first), student.size(second))
    for name in GLOBAL_SPACES:
        space = Space(-1, name)
        # Pooled outputs only mean something where both poolers were trained, which a plan cannot see.
        if name != POOLED_OUT and space in teacher.sizes and space in student.sizes:
            pairs[space, space] = (teacher.size(space), student.size(space))
    return dict(sorted(pairs.items()))


def choose_method(plan: TransferPlan, similarity: float | None, threshold: float = 0.5) -> tuple[Method, str]:
    """The default method and the reason for it.

    Args:
        plan: made for ``copy``. similarity: ``models.embedding_similarity`` of the two models.
    """
    different = next((pair for pair, (t, s) in plan.pairs.items() if t != s), None)
    if different:
        sizes = plan.pairs[different]
        return METHODS["prune-align"], (
            f"the models differ in size ({different[0]} has {sizes[0]} units, the student's {sizes[1]})"
        )
    if similarity is None:
        return METHODS["prune-align"], "sizes are equal, but the models have different vocabularies"
    if similarity < threshold:
        return METHODS["prune-align"], (
            f"sizes are equal, but the word embeddings have little in common (mean cosine {similarity:.2f})"
        )
    return METHODS["copy"], f"sizes are equal and the word embeddings agree (mean cosine {similarity:.2f})"


def _axes(module: Module) -> list[Axis]:
    return [axis for tensor in module.tensors.values() for axis in tensor.axes if axis is not None]


def _add_pair(
    pairs: dict[Pair, tuple[int, int]],
    method: Method,
    module: Module,
    axis: Axis,
    site: Site,
    teacher: Architecture,
    student: Architecture,
) -> None:
    name = map_axis(method, module, axis)
    first, second = space_at(module.site.layer, name), space_at(site.layer, name)
    pairs[first, second] = (teacher.size(first), student.size(second))
    if name != axis.space:
        own = (teacher.size(Space(module.site.layer, axis.space)), student.size(Space(site.layer, axis.space)))
        if own != pairs[first, second]:
            raise PlanError(
                f"{method.name} prunes output units by the indices of the input, which here differ in number",
                where=str(site),
                expected=f"{pairs[first, second][0]} -> {pairs[first, second][1]} units",
                found=f"{own[0]} -> {own[1]}",
                fix="use --method prune-align",
            )


def _check_roles(checkpoint: PeftCheckpoint, student: Architecture) -> None:
    known = (*student.roles, PROMPT_ROLE, PREFIX_ROLE)
    for site in checkpoint.modules:
        if site.role not in known:
            raise PlanError(
                "the student has no counterpart of this site",
                where=str(site),
                expected=f"one of the roles of {student.model_type}: {', '.join(known)}",
                found=site.role,
                fix="choose a student of a family that has it"
                + (", or move a LoRA" if site.role.endswith("adapter") else ""),
            )


def _layer_notes(
    checkpoint: PeftCheckpoint, mapping: LayerMap, sites: Sequence[SitePlan], student: Architecture
) -> list[str]:
    notes = []
    used = {source for sources in mapping for source in sources}
    unused = [layer for layer in checkpoint.layers if layer not in used]
    if unused:
        notes.append(f"modules of teacher layers {', '.join(map(str, unused))} are left out by the layer map")
    without = sorted(set(range(student.num_layers)) - {site.student.layer for site in sites})
    if without and checkpoint.layers:
        notes.append(f"student layers {', '.join(map(str, without))} receive no module")
    if len(used) < len(mapping):
        notes.append("the student has more layers than the map uses of the teacher, so modules repeat")
    return notes
