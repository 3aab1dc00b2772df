"""Classification heads: read from a checkpoint in the form of the teacher's task model, written in the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from peft_graft.checkpoints.formats.adapters.heads import as_before, is_prediction_head, read_head
from peft_graft.checkpoints.formats.peft.format import saved_beside
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.errors import HeadError
from peft_graft.models.architecture import Architecture
from peft_graft.models.spec import HeadForm
from peft_graft.models.tasks import Task
from peft_graft.modules.head import Head, head_tensors
from peft_graft.modules.lora import LoraPart


def is_saved_part(key: str, architecture: Architecture) -> bool:
    """Whether a tensor that was saved beside a module is of its base model; the base's pooler belongs to the head."""
    starts = {f"{stack.layers.partition('.')[0]}." for stack in architecture.row.stacks}
    starts |= {f"{architecture.prefix}."} if architecture.prefix else set()
    return key.startswith(tuple(starts)) and "pooler." not in key


def adapted_layers(raw: RawCheckpoint, architecture: Architecture) -> dict[str, LoraPart]:
    """The LoRAs on layers of the head, which change it: of the output layer, and of an inner layer such as a pooler.

    Returns:
        Path in the checkpoint -> its part.
    """
    form = architecture.row.head(raw.task)
    paths = [form.out, *([_inner(form, raw, architecture)] if form.dense else [])] if form else []
    found = {path: raw.parts.get(path) for path in paths}
    return {path: part for path, part in found.items() if type(part) is LoraPart}


def _inner(form: HeadForm, raw: RawCheckpoint, architecture: Architecture) -> str:
    """Path in the checkpoint of a head's inner layer."""
    return f"{architecture.start(raw.task) if form.dense_in_base else ''}{form.dense}"


def resolve_head(raw: RawCheckpoint, architecture: Architecture, base_tensors: Mapping[str, Tensor]) -> Head:
    """The head that was saved with a module, with the LoRAs of its layers (``adapted_layers``) merged into it.

    Args:
        base_tensors: of the base model by path, for an inner layer that lives there (BERT's pooler).

    Raises:
        HeadError: its form is not known, or a part of it is missing.
    """
    odd = sorted(key for key, tensor in raw.head.items() if not tensor.numel() or not tensor.is_floating_point())
    if odd:
        raise HeadError(
            f"the head's {odd[0]} holds whole numbers"
            if raw.head[odd[0]].numel()
            else f"the head's {odd[0]} is empty, as DeepSpeed's ZeRO-3 leaves it where weights were not gathered",
            where=raw.base_model or raw.name,
            fix="save the module again with stage3_gather_16bit_weights_on_model_save set to true, or leave the head "
            "behind with --head drop",
        )
    if is_prediction_head(raw.head):
        return _labelled(read_head(raw), raw)
    form = architecture.row.head(raw.task)
    if form is None:
        raise HeadError(
            f"no head of {raw.task} is known for {architecture.model_type}; it saved {', '.join(raw.head)}",
            where=raw.base_model or raw.name,
            fix="leave the head behind with --head drop",
        )
    values = {f"out.{part}": raw.head[key] for part, key in _parts(form.out) if key in raw.head}
    used = {key for _, key in _parts(form.out)}
    if form.dense:
        inner = _inner(form, raw, architecture)
        keys = {f"dense.{part}": key for part, key in _parts(inner)}
        used |= set(keys.values())
        for name, key in keys.items():
            tensor = raw.head.get(key)
            if tensor is None and form.dense_in_base:
                tensor = base_tensors.get(key.removeprefix(inner.removesuffix(form.dense)))
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
    names = {form.out: "out", **({_inner(form, raw, architecture): "dense"} if form.dense else {})}
    for path, part in adapted_layers(raw, architecture).items():
        weight, bias = part.merged(values[f"{names[path]}.weight"], values.get(f"{names[path]}.bias"))
        values |= {f"{names[path]}.weight": weight, **({} if bias is None else {f"{names[path]}.bias": bias})}
    return _labelled(Head(raw.task, head_tensors(values, form.reads), form.reads, (), form.activation), raw)


def fits_form(raw: RawCheckpoint, task: Task, form: HeadForm, architecture: Architecture) -> bool:
    """Whether the saved head's tensors are those of a form of head: no others, and all that libraries save with it."""
    start = architecture.start(task) if form.dense_in_base else ""
    places = [form.out, *([start + form.dense] if form.dense else [])]
    needed = {f"{place}.weight" for place in places if place == form.out or saved_beside(f"{place}.weight", {})}
    return needed <= raw.head.keys() <= {key for place in places for _, key in _parts(place)}


def _labelled(head: Head, raw: RawCheckpoint) -> Head:
    if head.task is Task.QUESTION_ANSWERING and head.num_labels != 2:
        raise HeadError(
            "the head does not mark the ends of answers",
            where=raw.name,
            expected="2 rows, of first and of last tokens",
            found=f"{head.num_labels} rows",
            fix="leave the head behind with --head drop",
        )
    labels: Sequence[str] = raw.labels or ()
    if labels and len(labels) != head.num_labels:
        raise HeadError(
            "the head's size and its label names disagree",
            where=raw.name,
            expected=f"{len(labels)} labels ({', '.join(labels)})",
            found=f"{head.num_labels} rows",
        )
    return replace(head, labels=tuple(labels), problem_type=raw.problem_type)


def _parts(path: str) -> list[tuple[str, str]]:
    return [(part, f"{path}.{part}") for part in ("weight", "bias")]


def head_form(head: Head, raw: RawCheckpoint, architecture: Architecture) -> HeadForm | None:
    """How the student arranges this head; None for AdapterHub's prediction heads, which are alike in all models.

    Raises:
        HeadError: the student's task model has no such head, or one with another activation function.
    """
    if is_prediction_head(raw.head):
        return None
    form = architecture.row.head(raw.task)
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


def head_paths(head: Head, raw: RawCheckpoint, architecture: Architecture, start: str) -> dict[str, Tensor]:
    """The head's tensors by their paths in the task model, or in AdapterHub's prediction head."""
    form = head_form(head, raw, architecture)
    if form is None:
        return as_before(head, raw.head)
    places = {"out": form.out}
    if form.dense:
        places["dense"] = (start if form.dense_in_base else "") + form.dense
    return {
        f"{places[name.split('.')[0]]}.{name.split('.')[1]}": tensor.values for name, tensor in head.tensors.items()
    }
