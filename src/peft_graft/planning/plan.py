"""What goes where, decided and checked before any forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.methods import METHODS, Method, map_axis
from peft_graft.checkpoints.heads import head_form
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.errors import PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import EMBEDDED, GLOBAL_SPACES, POOLED_OUT, VOCABULARY, Site, Space, space_at
from peft_graft.models.spec import EMBED_ROLE, PROMPT_ROLE, Stack, expert_of, moved_space
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Axis, Module
from peft_graft.options import HeadChoice
from peft_graft.planning.correspondence import ExpertMap, advice, corresponding_stacks, corresponds, counterpart
from peft_graft.planning.layers import LayerMap, layer_map, layer_maps


@dataclass(frozen=True)
class SitePlan:
    """One module of the student: its site and the teacher's sites that it is made from."""

    student: Site
    teacher: tuple[Site, ...]

    def space(self, source: Site, name: str) -> Space:
        """What corresponds in the student to a space of the teacher that a module at ``source`` lives in."""
        return space_at(self.student.layer, moved_space(name, source.role, self.student.role))


@dataclass(frozen=True)
class TransferPlan:
    """Everything that a transfer will do.

    Attributes:
        layers: for every stack of the student that receives modules, by its name, the teacher layers of each layer.
        sites: the student's modules.
        pairs: pairs of spaces whose maps are needed, with their (teacher, student) sizes.
        head: whether the head is carried. notes: remarks for the user.
    """

    layers: Mapping[str, LayerMap]
    sites: tuple[SitePlan, ...]
    pairs: Mapping[Pair, tuple[int, int]]
    head: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def recorded_layers(self) -> list[list[int]] | dict[str, list[list[int]]]:
        """The layer map for a record: plain for a stack without a name, by stack otherwise."""
        found = {stack: [list(sources) for sources in mapping] for stack, mapping in self.layers.items()}
        return found[""] if found.keys() == {""} else found


#: What bottleneck adapters see, in all their arrangements.
_SEEN_BY_ADAPTERS = (
    "layer.in", "attn.output.out", "attn.stream", "cross.output.out", "cross.stream", "ffn.down.out", "layer.out"
)  # fmt: skip


def check_reads_text(teacher: Architecture, student: Architecture, what: str) -> None:
    """Refuse what needs text of models that read something else.

    Args:
        what: the option or method that needs text.

    Raises:
        PlanError: one of the models reads images or sound.
    """
    for model in (teacher, student):
        if not model.row.reads_text:
            kinds = [stack.kind for stack in model.row.stacks if stack.kind in ("vision", "audio")]
            raise PlanError(
                f"{what} works on text, and a {model.model_type} model reads "
                f"{'images' if 'vision' in kinds else 'sound'}; aligning on those is not supported yet",
                where=model.model_type,
                fix="move the module with --method copy, without --text, to a model of the same width",
            )


def plan_transfer(
    checkpoint: PeftCheckpoint,
    teacher: Architecture,
    student: Architecture,
    *,
    layers: str = "skip",
    method: Method,
    head: HeadChoice = "auto",
    experts: ExpertMap | None = None,
) -> TransferPlan:
    """Plan a transfer, every site, layer and shape checked.

    Args:
        layers: see ``layer_maps``.
        experts: which experts correspond; those of one number when None.

    Raises:
        PlanError: a role that the student lacks, a layer map that leaves nothing to move, or spaces that the method
            cannot map.
        HeadError: the student's task model has another form of head.
    """
    stacks = corresponding_stacks(teacher, student)
    _check_roles(checkpoint, stacks, student)
    for module in checkpoint.modules.values():
        module.check_models(teacher, student)
    specs, mappings = layer_maps(layers, stacks), dict[str, LayerMap]()
    sites: list[SitePlan] = []
    notes: list[str] = []
    for first, second in stacks:
        roles = [role for role in checkpoint.roles_in_layers if first.local(role) is not None]
        if not roles and len(stacks) > 1:
            continue
        mapping = layer_map(specs[second.name], teacher.depths[first.name], student.depths[second.name])
        mappings[second.name] = mapping
        used = [
            site
            for layer, sources in enumerate(mapping)
            for site in _sites_of_layer(checkpoint, roles, (first, second), layer, sources, student, experts)
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
    notes += _expert_notes(checkpoint, sites)
    pairs: dict[Pair, tuple[int, int]] = {}
    for site in sites:
        for source in site.teacher:
            module = checkpoint.modules[source]
            for axis in (axis for axis in _axes(module) if axis.space != VOCABULARY):
                _add_pair(pairs, method, module, axis, site, teacher, student)
    _check_sizes(pairs, teacher, student)
    carried = checkpoint.head is not None and head != "drop"
    if checkpoint.head is not None and carried:
        head_form(checkpoint.head, checkpoint.raw, student)
        space = Space(-1, checkpoint.head.reads)
        pairs[space, space] = (teacher.size(space), student.size(space))
    elif head != "drop" and checkpoint.raw.task not in (Task.BASE, Task.CAUSAL_LM, Task.SEQ2SEQ_LM):
        notes.append("no head was saved with the module, so none is carried")
    return TransferPlan(mappings, tuple(sites), dict(sorted(pairs.items())), carried, tuple(notes))


def plan_alignment(
    teacher: Architecture,
    student: Architecture,
    *,
    layers: str = "skip",
    roles: Sequence[str] | None = None,
    experts: ExpertMap | None = None,
) -> dict[Pair, tuple[int, int]]:
    """The pairs of spaces that any module at these roles may need, with their (teacher, student) sizes.

    Args:
        roles: linear roles of the teacher, and ``adapter`` for what bottleneck adapters see; all that both models have
            by default. ``embed`` and ``prompt`` stand for the word embeddings. The spaces that heads read are always
            included.
        experts: as for ``plan_transfer``.

    Raises:
        PlanError: a role that one of the models lacks, or a model that does not read text.
    """
    check_reads_text(teacher, student, "an alignment")
    stacks = corresponding_stacks(teacher, student)
    shared = [role for role in teacher.row.linears if corresponds(stacks, role, student)]
    embedded = (EMBED_ROLE, PROMPT_ROLE)
    chosen = list(roles) if roles else [*shared, "adapter", EMBED_ROLE]
    unknown = [role for role in chosen if role not in (*shared, "adapter", *embedded)]
    if unknown:
        raise PlanError(
            "the models do not share this role",
            where=unknown[0],
            expected=", ".join([_listed(shared), "adapter", *embedded]),
        )
    pairs: dict[Pair, tuple[int, int]] = {}

    def add(source: Site, target: Site, name: str) -> None:
        first, second = Space(source.layer, name), Space(target.layer, moved_space(name, source.role, target.role))
        if first in teacher.sizes and second in student.sizes:
            pairs[first, second] = (teacher.size(first), student.size(second))

    for (first, second), source, layer in _layer_pairs(teacher, student, stacks, layers):
        if "adapter" in chosen:
            near, far = (Site(at, stack.full("attn.adapter")) for at, stack in ((source, first), (layer, second)))
            for name in _SEEN_BY_ADAPTERS:
                add(near, far, first.full(name))
        for role in (role for role in chosen if role in teacher.row.linears):
            target = counterpart(Site(source, role), (first, second), layer, experts)
            if target is not None and student.has(target):
                linear = teacher.row.linears[role]
                add(Site(source, role), target, linear.reads)
                add(Site(source, role), target, linear.writes)
    for name in (*GLOBAL_SPACES, *([EMBEDDED] if {*embedded} & {*chosen} else [])):
        space = Space(-1, name)
        # Pooled outputs only mean something where both poolers were trained, which a plan cannot see.
        if name != POOLED_OUT and space in teacher.sizes and space in student.sizes:
            pairs[space, space] = (teacher.size(space), student.size(space))
    return dict(sorted(pairs.items()))


def expert_pairs(teacher: Architecture, student: Architecture, layers: str) -> dict[Pair, tuple[int, int]]:
    """The pairs of what routers write, by which experts are matched, with their sizes; none without routers."""
    pairs: dict[Pair, tuple[int, int]] = {}
    stacks = corresponding_stacks(teacher, student)
    for (first, second), source, layer in _layer_pairs(teacher, student, stacks, layers):
        pair = Space(source, first.full("ffn.router.out")), Space(layer, second.full("ffn.router.out"))
        if pair[0] in teacher.sizes and pair[1] in student.sizes:
            pairs[pair] = (teacher.size(pair[0]), student.size(pair[1]))
    return pairs


def _layer_pairs(
    teacher: Architecture, student: Architecture, stacks: Sequence[tuple[Stack, Stack]], layers: str
) -> Iterator[tuple[tuple[Stack, Stack], int, int]]:
    """(teacher and student stack, teacher layer, student layer) for all that a layer map brings together."""
    specs = layer_maps(layers, stacks)
    for first, second in stacks:
        mapping = layer_map(specs[second.name], teacher.depths[first.name], student.depths[second.name])
        for layer, sources in enumerate(mapping):
            for source in sources:
                yield (first, second), source, layer


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


def _sites_of_layer(
    checkpoint: PeftCheckpoint,
    roles: Sequence[str],
    stacks: tuple[Stack, Stack],
    layer: int,
    sources: Sequence[int],
    student: Architecture,
    experts: ExpertMap | None,
) -> list[SitePlan]:
    """The modules of one layer of the student; places that only this layer lacks are left out."""
    found: dict[Site, list[Site]] = {}
    for role in roles:
        for source in (Site(source, role) for source in sources):
            target = counterpart(source, stacks, layer, experts)
            if source in checkpoint.modules and target is not None and student.has(target):
                found.setdefault(target, []).append(source)
    return [SitePlan(target, tuple(present)) for target, present in found.items()]


def _add_pair(
    pairs: dict[Pair, tuple[int, int]],
    method: Method,
    module: Module,
    axis: Axis,
    site: SitePlan,
    teacher: Architecture,
    student: Architecture,
) -> None:
    name = map_axis(method, module, axis)
    first, second = space_at(module.site.layer, name), site.space(module.site, name)
    pairs[first, second] = (teacher.size(first), student.size(second))
    if name != axis.space:
        own = (
            teacher.size(Space(module.site.layer, axis.space)),
            student.size(site.space(module.site, axis.space)),
        )
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
                expected=f"one of the roles of {student.model_type}: {_listed(student.roles)}",
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


def _listed(roles: Iterable[str]) -> str:
    """Roles for a message, those of the first expert for all of them."""
    return ", ".join(role for role in roles if not expert_of(role))


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
    if len(used) < len(mapping):
        notes.append(f"the student has more {where}layers than the map uses of the teacher, so modules repeat")
    return notes


def _expert_notes(checkpoint: PeftCheckpoint, sites: Sequence[SitePlan]) -> list[str]:
    moved = {source for site in sites for source in site.teacher}
    layers = {source.layer for source in moved}
    left = [site for site in checkpoint.modules if expert_of(site.role) is not None and site not in moved]
    count = len({(site.layer, expert_of(site.role)) for site in left if site.layer in layers})
    return [f"modules of {count} experts are left out, for the student has no counterpart of them"] if count else []
