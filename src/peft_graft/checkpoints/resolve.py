"""From a checkpoint's parts to modules at the sites of a model, and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from peft_graft.checkpoints.formats.base import format_of
from peft_graft.checkpoints.formats.peft.format import TASKS_WITH_HEAD, todays_task_type
from peft_graft.checkpoints.heads import adapted_layers, head_paths, is_saved_part, resolve_head
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.errors import CheckpointError, ModelError
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import ModelHandle
from peft_graft.models.spaces import VOCABULARY, Site, space_at
from peft_graft.models.task_models import fresh_head
from peft_graft.models.tasks import Task
from peft_graft.modules.base import Base, Module, Part, module_of, not_the_base
from peft_graft.modules.head import Head


@dataclass(frozen=True)
class PeftCheckpoint:
    """A trained module tied to the sites of the model that it belongs to.

    Attributes:
        raw: what the files say (library, configuration, hashes); the written checkpoint starts from it.
        modules: site -> module with labelled tensors.
        head: the classification head saved with it, if any.
        wrapped: whether the module's paths start at a task model (``bert.encoder...``) or at the bare model.
        other_towers: tensors in what reads images or sound, by the tower's name; they are left out.
        left_out: paths of the parts that have no site, because no role is known for them.
    """

    raw: RawCheckpoint
    modules: Mapping[Site, Module]
    head: Head | None = None
    wrapped: bool = True
    other_towers: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that carry a module."""
        return tuple(sorted({site.role for site in self.modules}))

    @property
    def roles_in_layers(self) -> tuple[str, ...]:
        """Roles that carry a module, without those of the whole model."""
        return tuple(sorted({site.role for site in self.modules if site.layer >= 0}))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that carry a module."""
        return tuple(sorted({site.layer for site in self.modules if site.layer >= 0}))


def resolve(
    raw: RawCheckpoint,
    architecture: Architecture,
    base_tensors: Mapping[str, Tensor] | None = None,
    *,
    with_head: bool = True,
    leave: bool = False,
) -> PeftCheckpoint:
    """Tie a checkpoint to the sites of its model and check every shape.

    A LoRA on a layer of the head becomes a part of the head. Other parts without a site are left out.

    Args:
        raw: as read from its files.
        architecture: of the model that the module belongs to (the teacher, or the student for a written graft).
        base_tensors: tensors of the base model by path, for a head whose inner layer lives there (BERT's pooler), and
            for values that are relative to them (DoRA's magnitudes, trained norms, biases and rows of a vocabulary).
        with_head: whether to read the head at all.
        leave: whether trained parts of the base model itself that cannot be moved may stay behind.

    Raises:
        CheckpointError: no part of the module has a site in this architecture.
        ModelError: a shape or a path shows that the module was trained on another model.
        HeadError: the head saved with the module has a form that is not known.
    """
    modules: dict[Site, Module] = {}
    owners: dict[Site, str] = {}
    prefixes: set[str] = set()
    others: Counter[str] = Counter()
    left_out: list[str] = []
    base = Base(architecture, base_tensors or {})
    for path, part in raw.parts.items():
        tower = None if part.is_virtual or architecture.sites(path) else architecture.other_tower(path)
        if tower is not None:
            others[tower] += len(part.tensors)
            continue
        place = ([], "") if part.is_virtual else _place(path, raw, architecture)
        if place is None:
            left_out.append(path)
            continue
        sites, prefix = place
        prefixes.add(prefix)
        for module in module_of(part).from_part(part, path, sites, base):
            _check_shapes(module, architecture)
            if module.site in owners:
                raise _at_one_place(module.site, owners[module.site], path)
            modules[module.site], owners[module.site] = module, path
    if not modules:
        _check_moves(others, left_out, raw, architecture)
    raw = _without_saved_parts(raw, {site.role for site in modules}, architecture, leave=leave)
    head = None
    if raw.head and with_head:
        head = resolve_head(raw, architecture, base.tensors)
        left_out = [path for path in left_out if path not in adapted_layers(raw, architecture)]
    wrapped = bool(prefixes - {""}) or (raw.task is not Task.BASE)
    return PeftCheckpoint(raw, dict(sorted(modules.items())), head, wrapped, dict(others), tuple(left_out))


def to_raw(
    checkpoint: PeftCheckpoint, architecture: Architecture, base_tensors: Mapping[str, Tensor] | None = None
) -> RawCheckpoint:
    """The reverse of ``resolve``: paths and tensors as the student's files will have them.

    An inner head layer that equals the one in ``base_tensors`` (the student's own pooler) is not written again.
    """
    start = architecture.start(checkpoint.raw.task) if checkpoint.wrapped else ""
    own = Base(architecture, base_tensors or {}, start)
    kinds: dict[type[Module], list[Module]] = {}
    for module in checkpoint.modules.values():
        kinds.setdefault(type(module), []).append(module)
    parts: dict[str, Part] = {}
    for kind, modules in kinds.items():
        parts |= kind.to_parts(modules, own)
    raw = checkpoint.raw
    head = head_paths(checkpoint.head, raw, architecture, start) if checkpoint.head else {}
    places = {start + path: path for path in own.tensors}
    inner = {key: own.tensors[places[key]] for key in head if key in places}  # no other is read
    if all(
        key in inner and torch.equal(inner[key].to(head[key]), head[key])
        for key in head
        if key in inner or ".pooler." in f".{key}"
    ):
        head = {key: tensor for key, tensor in head.items() if key not in inner}
    return replace(raw, parts=parts, head=head, beside={}, head_config=raw.head_config if head else None)


def checkpoint_of_student(checkpoint: PeftCheckpoint, student: ModelHandle, seed: int = 0) -> RawCheckpoint:
    """A checkpoint with the student's own paths, as it will be written.

    peft demands a head in every checkpoint of a classification task, and of question answering; where none is carried,
    an untrained one of as many labels stands in.

    Args:
        seed: of the untrained head.
    """
    raw = to_raw(checkpoint, student.architecture, student.base_tensors(output=checkpoint.raw.trains_output))
    demanded = raw.library == Library.PEFT and Task.of_peft(todays_task_type(raw)) in TASKS_WITH_HEAD
    if raw.head or not demanded:
        return raw
    return replace(raw, head=fresh_head(student.base.config, raw.task, checkpoint.raw.num_labels, seed))


def _place(path: str, raw: RawCheckpoint, architecture: Architecture) -> tuple[list[Site], str] | None:
    """The sites of a part's path, several for a fused layer, and what stands before the base model's path in it.

    None for a part without a role: in a layer that has others, or outside the layers.
    """
    place = architecture.sites(path)
    if place is None:
        if architecture.in_layers(path) and not _may_be_there(path, raw, architecture):
            raise _other_base(path, raw, architecture)
        return None
    sites, prefix = place
    if sites[0].layer >= 0 and sites[0].layer >= architecture.depth(sites[0].role):
        depth = architecture.depth(sites[0].role)
        raise not_the_base(
            "it has no such layer", str(sites[0]), expected=f"a layer below {depth}", found=sites[0].layer
        )
    format_of(raw.library).check_site(path, sites, architecture)
    return sites, prefix


def _at_one_place(site: Site, *paths: str) -> CheckpointError:
    return CheckpointError(
        "two parts of the module lead to one place of the model",
        where=str(site),
        found=" and ".join(paths),
        fix="a module of a model with several encoders or towers belongs to that model: name it with --teacher, or "
        "leave the tensors of all but one out of the file",
    )


def _may_be_there(path: str, raw: RawCheckpoint, architecture: Architecture) -> bool:
    """Whether the model has the layer at a path, as far as can be told: libraries add modules of their own."""
    return raw.parts[path].is_own_module or architecture.has_module(path)


def _other_base(path: str, raw: RawCheckpoint, architecture: Architecture) -> ModelError:
    return not_the_base(f"a {architecture.model_type} model has no {path}", raw.base_model or raw.name)


def _check_moves(
    others: Collection[str], left_out: Sequence[str], raw: RawCheckpoint, architecture: Architecture
) -> None:
    """Refuse a module none of whose parts has a site, but not one without parts."""
    if others:
        raise CheckpointError(
            "the module acts on images or sound alone, and what moves is the part that reads text",
            where=raw.base_model or raw.name,
            found=", ".join(others),
            fix="train a module on layers of the text tower",
        )
    if left_out:
        raise _without_sites(left_out, raw, architecture)


def _without_sites(
    paths: Sequence[str], raw: RawCheckpoint, architecture: Architecture
) -> CheckpointError | ModelError:
    """Why nothing of a module can be moved: it was trained on another model, or where no role is known."""
    known = [path for path in paths if _may_be_there(path, raw, architecture)]
    if not known:
        return _other_base(paths[0], raw, architecture)
    return CheckpointError(
        f"no role is known yet for {', '.join(patterns(known))} of a {architecture.model_type} model, and the module "
        "has nothing else",
        where=raw.base_model or raw.name,
        expected=f"a layer inside {' or '.join(stack.layers for stack in architecture.row.stacks)} that has a role",
        fix="train the module on such layers, or give these a role with register_architecture (docs/extending.md)",
    )


def patterns(paths: Sequence[str]) -> list[str]:
    """Paths with ``*`` for the number of a layer, each once: ``layers.*.mlp.gate``."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths))


def _check_shapes(module: Module, architecture: Architecture) -> None:
    for name, tensor in module.tensors.items():
        for axis, label in enumerate(tensor.axes):
            if label is None or label.space == VOCABULARY:  # a resized vocabulary is no sign of another model
                continue
            expected = architecture.size(space_at(module.site.layer, label.space))
            if tensor.values.shape[axis] != expected:
                raise not_the_base(
                    f"{name} has shape {list(tensor.values.shape)}",
                    str(module.site),
                    expected=f"{expected} on axis {axis} ({label.space} of {architecture.model_type})",
                    found=tensor.values.shape[axis],
                )


def _without_saved_parts(
    raw: RawCheckpoint, roles: Collection[str], architecture: Architecture, *, leave: bool
) -> RawCheckpoint:
    """The checkpoint with a note on the parts of the base model that were trained beside the module and stay behind."""
    found = [key for key in raw.head if is_saved_part(key, architecture)] if raw.library == Library.PEFT else []
    inside = [*raw.beside, *found]
    if not inside:
        return raw
    if not leave:
        raise CheckpointError(
            f"the module comes with a trained part of its base model, {inside[0]}, which cannot be moved yet",
            where=raw.base_model or raw.name,
            fix="train the module without this part in modules_to_save, or leave it behind by naming what moves: "
            f"--sites {','.join(sorted(roles))}",
        )
    names = ", ".join(patterns(sorted({key.rpartition(".")[0] for key in inside})))
    return replace(raw, notes=(*raw.notes, f"what was trained of the base model itself is left out: {names}"))
