"""Which pairs of spaces an alignment of two models has to cover."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from peft_graft.alignment.aligner import Directions
from peft_graft.alignment.alignment import Pair
from peft_graft.alignment.methods import Method, map_axis
from peft_graft.errors import PlanError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spaces import EMBEDDED, GLOBAL_SPACES, POOLED_OUT, TOKENS_OUT, Site, Space
from peft_graft.models.spec import EMBED_ROLE, PROMPT_ROLE, Stack, expert_of, moved_space
from peft_graft.modules.base import Module
from peft_graft.planning.correspondence import ExpertMap, corresponding_stacks, corresponds, counterpart
from peft_graft.planning.layers import layer_map, layer_maps

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


def spaces_of_roles(
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
        experts: as for ``place_modules``.

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
            expected=", ".join([listed_roles(shared), "adapter", *embedded]),
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


def directions_of_modules(modules: Iterable[Module], method: Method, *, head: str | None, shifts: bool) -> Directions:
    """Which maps moving these modules needs.

    Args:
        head: the space that a head reads, if one is carried. shifts: whether shifts of the last hidden state are moved.
    """
    found: dict[str, set[str]] = {}
    for module in modules:
        for axis in module.axes:
            found.setdefault(map_axis(method, module, axis), set()).add(axis.direction)
    if head:
        found.setdefault(head, set()).add("read")
    if shifts:
        found.setdefault(TOKENS_OUT, set()).add("write")
    return found


def directions_of_roles(architecture: Architecture, roles: Sequence[str] | None) -> Directions:
    """Which maps any module at these linear roles needs; both for what adapters see, and for all when None."""
    if roles is None or "adapter" in roles:
        return {}
    found: dict[str, set[str]] = {}
    for role in roles:
        if linear := architecture.row.linears.get(role):
            found.setdefault(linear.reads, set()).add("read")
            found.setdefault(linear.writes, set()).add("write")
    return found


def listed_roles(roles: Iterable[str]) -> str:
    """Roles for a message, those of the first expert for all of them."""
    return ", ".join(role for role in roles if not expert_of(role))
