"""Checkpoints of trained modules: found, read, tied to the sites of a model, and written for another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_graft.architectures import Architecture
from peft_graft.errors import CheckpointError, HeadError, ModelError
from peft_graft.families import SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION
from peft_graft.formats import adapterhub, peft_lora
from peft_graft.formats.raw import RawCheckpoint, StudentNames
from peft_graft.modules import (
    FIRST_OUT,
    POOLED_OUT,
    TOKENS_OUT,
    BottleneckModule,
    Head,
    LoraModule,
    Module,
    Site,
    Space,
    bottleneck_tensors,
    head_tensors,
    lora_tensors,
)
from peft_graft.roles import HeadForm


@dataclass(frozen=True)
class PeftCheckpoint:
    """A trained module tied to the sites of the model that it belongs to.

    Attributes:
        raw: what the files say (format, configuration, hashes); the written checkpoint starts from it.
        modules: site -> module with labelled tensors.
        head: the classification head saved with it, if any.
        wrapped: whether the module's paths start at a task model (``bert.encoder...``) or at the bare model.
    """

    raw: RawCheckpoint
    modules: Mapping[Site, Module]
    head: Head | None = None
    wrapped: bool = True

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles that carry a module."""
        return tuple(sorted({site.role for site in self.modules}))

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that carry a module."""
        return tuple(sorted({site.layer for site in self.modules}))

    @property
    def num_parameters(self) -> int:
        """Number of values in the modules and the head."""
        tensors = [tensor for module in self.modules.values() for tensor in module.tensors.values()]
        tensors += list(self.head.tensors.values()) if self.head else []
        return sum(tensor.values.numel() for tensor in tensors)


def locate(module: str | Path) -> Path:
    """The local folder of a module: a path, or a repository of the hub, which is downloaded.

    Raises:
        CheckpointError: no such folder, nor a repository that can be reached.
    """
    path = Path(module).expanduser()
    if path.is_dir():
        return path
    name = str(module)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            "no such folder", where=name, fix="give the folder that holds adapter_config.json, or a hub id owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "adapter*", "pytorch_*", "model_head*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no such folder, and the hub has no such repository or cannot be reached ({type(error).__name__})",
            where=name,
            fix="check the name, or give a local folder",
        ) from error


def read_checkpoint(folder: Path) -> RawCheckpoint:
    """Read a checkpoint in whichever format it is.

    Raises:
        CheckpointError: the folder holds no checkpoint of a known format, or one that is damaged or not supported.
    """
    if peft_lora.detect(folder):
        return peft_lora.read(folder)
    if adapterhub.detect(folder):
        return adapterhub.read(folder)
    names = sorted(path.name for path in folder.iterdir())
    inside = [path.parent.name for path in folder.glob(f"*/{peft_lora.CONFIG}")]
    raise CheckpointError(
        "the folder holds no module checkpoint",
        where=str(folder),
        expected="adapter_config.json of peft or adapters",
        found=", ".join(names[:8]) or "an empty folder",
        fix=f"give one of its sub-folders: {', '.join(sorted(inside))}" if inside else None,
    )


def resolve(
    raw: RawCheckpoint,
    architecture: Architecture,
    base_tensors: Mapping[str, Tensor] | None = None,
    *,
    with_head: bool = True,
) -> PeftCheckpoint:
    """Tie a checkpoint to the sites of its model and check every shape.

    Args:
        raw: as read from its files.
        architecture: of the model that the module belongs to (the teacher, or the student for a written graft).
        base_tensors: tensors of the base model by path, for a head whose inner layer lives there (BERT's pooler).
        with_head: whether to read the head at all.

    Raises:
        CheckpointError: a path is no site of this architecture.
        ModelError: a shape shows that the module was trained on another model.
        HeadError: the head saved with the module has a form that is not known.
    """
    modules: dict[Site, Module] = {}
    prefixes: set[str] = set()
    for path, values in raw.entries.items():
        place = architecture.sites(path)
        if place is None:
            raise CheckpointError(
                f"{path} is no site of a {architecture.model_type} model",
                where=raw.base_model or raw.name,
                expected=f"a linear layer inside {' or '.join(stack.layers for stack in architecture.row.stacks)}",
                fix="give the module's true base with --teacher; layers outside the stack are not supported yet",
            )
        sites, prefix = place
        prefixes.add(prefix)
        if sites[0].layer >= architecture.depth(sites[0].role):
            raise ModelError(
                "the teacher is not the base of this module: it has no such layer",
                where=str(sites[0]),
                expected=f"a layer below {architecture.depth(sites[0].role)}",
                found=sites[0].layer,
                fix="name the model that the module was trained on with --teacher",
            )
        for site in sites:
            modules[site] = _module(raw, site, path, values, architecture)
            _check_shapes(modules[site], architecture)
    _check_saved_parts(raw, architecture)
    head = _resolve_head(raw, architecture, base_tensors or {}) if raw.head and with_head else None
    wrapped = bool(prefixes - {""}) or (raw.task != "base")
    return PeftCheckpoint(raw, dict(sorted(modules.items())), head, wrapped)


def write_checkpoint(folder: Path, raw: RawCheckpoint, student: StudentNames) -> None:
    """Write a checkpoint of the student in the format that ``raw`` names."""
    (peft_lora if raw.format == "peft" else adapterhub).write(folder, raw, student)


def to_raw(
    checkpoint: PeftCheckpoint, architecture: Architecture, base_tensors: Mapping[str, Tensor] | None = None
) -> RawCheckpoint:
    """The reverse of ``resolve``: paths and tensors as the student's files will have them.

    An inner head layer that equals the one in ``base_tensors`` (the student's own pooler) is not written again.
    """
    start = architecture.start(checkpoint.raw.task) if checkpoint.wrapped else ""
    entries, scalings = {}, {}
    together: dict[str, dict[str, Module]] = {}
    for site, module in checkpoint.modules.items():
        together.setdefault(start + architecture.path(site), {})[site.role] = module
    for path, parts in together.items():
        role, module = next(iter(parts.items()))
        linear = architecture.row.linears.get(role)
        if isinstance(module, LoraModule) and linear and linear.fused:
            entries[path], scalings[path] = _fused(parts, architecture)
            continue
        entries[path] = {name: tensor.values for name, tensor in module.tensors.items()}
        if isinstance(module, LoraModule):
            scalings[path] = module.scaling
    raw = checkpoint.raw
    head = _head_paths(checkpoint.head, raw, architecture, start) if checkpoint.head else {}
    own = {start + path: tensor for path, tensor in (base_tensors or {}).items()}
    if all(key in own and torch.equal(own[key], head[key]) for key in head if key in own or ".pooler." in f".{key}"):
        head = {key: tensor for key, tensor in head.items() if key not in own}
    return RawCheckpoint(
        **{
            **raw.__dict__,
            "entries": entries,
            "scalings": scalings,
            "head": head,
            "head_config": raw.head_config if head else None,
        }
    )


def _module(
    raw: RawCheckpoint, site: Site, path: str, values: Mapping[str, Tensor], architecture: Architecture
) -> Module:
    if raw.kind == "lora":
        linear = architecture.row.linears.get(site.role)
        if linear is None:
            raise CheckpointError(f"{path} is no linear layer", where=str(site))
        b = values["B"]
        if linear.fused:  # each of its projections is a module of its own, and all read through one A
            if len(b) != architecture.fused_size(site.role):
                raise ModelError(
                    f"the teacher is not the base of this module: B has shape {list(b.shape)}",
                    where=path,
                    expected=f"{architecture.fused_size(site.role)} rows",
                    found=len(b),
                    fix="name the model that the module was trained on with --teacher",
                )
            b = b[architecture.units[site.role]]
        return LoraModule(site, lora_tensors(values["A"], b, linear.reads, linear.writes), scaling=raw.scalings[path])
    settings = adapterhub.module_config(raw.config)
    point = architecture.row.adapters[site.role]
    if settings.get("is_parallel"):
        space = point.parallel
    else:
        space = point.after_norm if settings.get("original_ln_before") else point.before_norm
    return BottleneckModule(site, bottleneck_tensors(values, space))


def _fused(parts: Mapping[str, Module], architecture: Architecture) -> tuple[dict[str, Tensor], float]:
    """One LoRA for a fused linear layer from those of its projections, and its scaling.

    Projections that read through one A share it; otherwise the ranks add up: [A_q; A_v] and B in blocks.
    """
    first = next(iter(parts.values()))
    assert isinstance(first, LoraModule)
    factors = []
    for role, module in parts.items():
        assert isinstance(module, LoraModule)
        same = module.rescaled(first.scaling)
        factors.append((architecture.units[role], same.tensors["A"].values, same.tensors["B"].values))
    shared: list[Tensor] = []
    for _, a, _ in factors:
        if not any(torch.equal(a, other) for other in shared):
            shared.append(a)
    starts = [sum(len(a) for a in shared[:index]) for index in range(len(shared))]
    whole = torch.zeros(architecture.fused_size(next(iter(parts))), sum(map(len, shared)), dtype=factors[0][2].dtype)
    for units, a, b in factors:
        start = starts[next(index for index, other in enumerate(shared) if torch.equal(a, other))]
        whole[units, start : start + len(a)] = b.to(whole.dtype).cpu()
    return {"A": torch.cat(shared), "B": whole}, first.scaling


def _check_shapes(module: Module, architecture: Architecture) -> None:
    for name, tensor in module.tensors.items():
        for axis, label in enumerate(tensor.axes):
            if label is None:
                continue
            expected = architecture.size(Space(module.site.layer, label.space))
            if tensor.values.shape[axis] != expected:
                raise ModelError(
                    f"the teacher is not the base of this module: {name} has shape {list(tensor.values.shape)}",
                    where=str(module.site),
                    expected=f"{expected} on axis {axis} ({label.space} of {architecture.model_type})",
                    found=tensor.values.shape[axis],
                    fix="name the model that the module was trained on with --teacher",
                )


def _check_saved_parts(raw: RawCheckpoint, architecture: Architecture) -> None:
    """Refuse parts of the base model that were trained and saved beside the module; its pooler belongs to the head."""
    start = architecture.start(raw.task)
    own = (start,) if start else tuple(f"{stack.layers.partition('.')[0]}." for stack in architecture.row.stacks)
    inside = [key for key in raw.head if key.startswith(own) and not key.startswith(f"{start}pooler.")]
    if inside:
        raise CheckpointError(
            f"the module comes with a trained part of its base model, {inside[0]}, which cannot be moved yet",
            where=raw.base_model or raw.name,
            fix="train the module without this part in modules_to_save",
        )


# ---- heads -----------------------------------------------------------------------------------------------------------


def _resolve_head(raw: RawCheckpoint, architecture: Architecture, base_tensors: Mapping[str, Tensor]) -> Head:
    if any(key.startswith("layers.") for key in raw.head):
        return _prediction_head(raw)
    form = architecture.row.heads.get(raw.task)
    if form is None:
        raise HeadError(
            f"no head of {raw.task} is known for {architecture.model_type}; it saved {', '.join(raw.head)}",
            where=raw.base_model or raw.name,
            fix="leave the head behind with --head drop",
        )
    values = {f"out.{part}": raw.head[key] for part, key in _parts(form.out) if key in raw.head}
    used = {key for _, key in _parts(form.out)}
    if form.dense:
        start = architecture.start(raw.task) if form.dense_in_base else ""
        keys = {f"dense.{part}": start + key for part, key in _parts(form.dense)}
        used |= set(keys.values())
        for name, key in keys.items():
            tensor = raw.head.get(key)
            if tensor is None and form.dense_in_base:
                tensor = base_tensors.get(key.removeprefix(start))
            if tensor is None:
                raise HeadError(
                    f"the head needs {key}, which is neither in the checkpoint nor in the teacher's own weights",
                    where=raw.base_model or raw.name,
                    fix="leave the head behind with --head drop (the teacher's pooler was random when the module was "
                    "trained, and was not saved)",
                )
            values[name] = tensor
    if "out.weight" not in values or set(raw.head) - used:
        raise HeadError(
            f"the saved head does not have the form of a {architecture.model_type} {raw.task} model",
            where=raw.base_model or raw.name,
            expected=", ".join(sorted(used)),
            found=", ".join(sorted(raw.head)),
            fix="leave the head behind with --head drop",
        )
    return _labelled(Head(raw.task, head_tensors(values, form.reads), form.reads, (), form.activation), raw)


def _prediction_head(raw: RawCheckpoint) -> Head:
    """AdapterHub's prediction heads are sequences: dropout, linear, activation, dropout, linear."""
    settings = dict((raw.head_config or {}).get("config") or {})
    kind = settings.get("head_type")
    numbers = sorted({int(key.split(".")[1]) for key in raw.head})
    known = {"tagging": TOKEN_CLASSIFICATION, "classification": SEQUENCE_CLASSIFICATION}
    if kind not in known or len(numbers) > 2:
        raise HeadError(
            f"prediction heads of type {kind!r} with {len(numbers)} layers are not supported yet",
            where=raw.name,
            expected="tagging or classification, of one or two layers",
            fix="leave the head behind with --head drop",
        )
    names = dict(zip(numbers, ("dense", "out")[-len(numbers) :], strict=True))
    values = {f"{names[int(key.split('.')[1])]}.{key.split('.')[2]}": tensor for key, tensor in raw.head.items()}
    reads = TOKENS_OUT if kind == "tagging" else POOLED_OUT if settings.get("use_pooler") else FIRST_OUT
    activation = settings.get("activation_function") if len(numbers) == 2 else None
    return _labelled(Head(known[kind], head_tensors(values, reads), reads, (), activation), raw)


def _labelled(head: Head, raw: RawCheckpoint) -> Head:
    labels: Sequence[str] = raw.labels or ()
    if labels and len(labels) != head.num_labels:
        raise HeadError(
            "the head's size and its label names disagree",
            where=raw.name,
            expected=f"{len(labels)} labels ({', '.join(labels)})",
            found=f"{head.num_labels} rows",
        )
    return Head(head.task, head.tensors, head.reads, tuple(labels), head.activation)


def _parts(path: str) -> list[tuple[str, str]]:
    return [(part, f"{path}.{part}") for part in ("weight", "bias")]


def head_form(head: Head, raw: RawCheckpoint, architecture: Architecture) -> HeadForm | None:
    """How the student arranges this head; None for AdapterHub's prediction heads, which are alike in all models.

    Raises:
        HeadError: the student's task model has no such head, or one with another activation function.
    """
    if any(key.startswith("layers.") for key in raw.head):
        return None
    form = architecture.row.heads.get(raw.task)
    same_shape = form is not None and bool(form.dense) == head.has_inner_layer and form.reads == head.reads
    if form is None or not same_shape or form.activation != head.activation:
        raise HeadError(
            f"a {architecture.model_type} {raw.task} model has another form of head",
            where=head.reads,
            expected=f"inner layer: {head.has_inner_layer}, activation {head.activation}",
            found="an unknown form"
            if form is None
            else f"inner layer: {bool(form.dense)}, activation {form.activation}",
            fix="leave the head behind with --head drop",
        )
    return form


def _head_paths(head: Head, raw: RawCheckpoint, architecture: Architecture, start: str) -> dict[str, Tensor]:
    form = head_form(head, raw, architecture)
    if form is None:
        numbers = sorted({int(key.split(".")[1]) for key in raw.head})
        places = dict(zip(("dense", "out")[-len(numbers) :], (f"layers.{number}" for number in numbers), strict=True))
    else:
        places = {"out": form.out}
        if form.dense:
            places["dense"] = (start if form.dense_in_base else "") + form.dense
    return {
        f"{places[name.split('.')[0]]}.{name.split('.')[1]}": tensor.values for name, tensor in head.tensors.items()
    }
