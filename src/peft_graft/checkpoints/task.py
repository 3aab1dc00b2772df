"""What a module was trained for, where its files do not say: its task, and what its head's outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from peft_graft.checkpoints.formats.adapters.heads import is_prediction_head
from peft_graft.checkpoints.heads import fits_form, is_saved_part
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.config import Library
from peft_graft.labels import ProblemType
from peft_graft.models.architecture import Architecture
from peft_graft.models.spec import HeadForm
from peft_graft.models.tasks import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: What configurations also say of models with another head, or with none.
_UNSURE = (Task.BASE, Task.CAUSAL_LM, Task.SEQ2SEQ_LM, Task.MASKED_LM)
_GENERATE = {Task.CAUSAL_LM, Task.SEQ2SEQ_LM}
#: Kinds of a model's stacks -> its commonest task.
_TASKS: Mapping[frozenset[str], Task] = {
    frozenset({"encoder"}): Task.MASKED_LM,
    frozenset({"decoder"}): Task.CAUSAL_LM,
    frozenset({"encoder", "decoder"}): Task.SEQ2SEQ_LM,
    frozenset({"audio", "decoder"}): Task.SEQ2SEQ_LM,
    frozenset({"vision"}): Task.IMAGE_CLASSIFICATION,
}
_IN_TASK_MODEL = "base_model.model."


def with_task(raw: RawCheckpoint, architecture: Architecture) -> RawCheckpoint:
    """The checkpoint with the task that it was trained for; its configuration stays as it is.

    Args:
        architecture: of the model that the module belongs to.

    Note:
        Some heads of tokens and of whole texts are alike in their files. What they are taken for is said.
    """
    if raw.library == Library.ADAPTERS and is_prediction_head(raw.head):
        return replace(raw, task=Task.PREDICTION_HEADS)
    raw = _without_saved_parts(raw, architecture)
    if raw.task not in _UNSURE:
        return raw
    tasks = _tasks_of_head(raw, architecture)
    if len(tasks) > 1 and (raw.num_labels or 0) > 1:
        note = (
            f"the files do not say whether the head is of {' or of '.join(tasks)}: it is taken to be of {tasks[0]} "
            "(task_type in adapter_config.json says otherwise)"
        )
        raw = replace(raw, notes=(*raw.notes, note))
    if tasks:
        return replace(raw, task=tasks[0])
    around = _task_around(raw, architecture)
    wrapped = raw.task is Task.BASE and (raw.trains_output or _is_wrapped(raw, architecture))
    # Whisper's and T5's modules are often called causal, and those of decoders in a model that also sees seq2seq.
    return replace(raw, task=around) if wrapped or {raw.task, around} == _GENERATE else raw


def with_problem_type(raw: RawCheckpoint, named: ProblemType | None, teacher: PretrainedConfig) -> RawCheckpoint:
    """The checkpoint with what its head's outputs are: as a user says, else as its files do, else as the teacher's own
    configuration does, for a head of as many outputs.

    Args:
        raw: with its task (``with_task``).
    """
    if raw.task not in (Task.SEQUENCE_CLASSIFICATION, Task.PREDICTION_HEADS):  # transformers has it for no others
        return replace(raw, problem_type=None)
    own = ProblemType.declared(getattr(teacher, "problem_type", None))
    found = named or raw.problem_type or (own if raw.num_labels == teacher.num_labels else None)
    return replace(raw, problem_type=found)


def _without_saved_parts(raw: RawCheckpoint, architecture: Architecture) -> RawCheckpoint:
    """The checkpoint with parts of the base model that were saved whole apart from the head."""
    inside = [key for key in raw.head if is_saved_part(key, architecture)]
    if not inside:
        return raw
    return replace(
        raw,
        head={key: value for key, value in raw.head.items() if key not in inside},
        beside={**raw.beside, **{key: raw.head[key] for key in inside}},
    )


def _tasks_of_head(raw: RawCheckpoint, architecture: Architecture) -> list[Task]:
    """The tasks whose heads look like the one that was saved, the likeliest first."""
    named = raw.config.get("model_class") or (raw.config.get("auto_mapping") or {}).get("base_model_class") or ""
    if "For" in named and Task.of_class(named) is Task.BASE:  # multiple choice, say, whose heads look like others
        return []
    if "qa_outputs.weight" in raw.head:
        return [Task.QUESTION_ANSWERING]
    order = (Task.SEQUENCE_CLASSIFICATION, Task.TOKEN_CLASSIFICATION, Task.IMAGE_CLASSIFICATION)
    forms = architecture.row.heads
    found = [task for task in order if task in forms and fits_form(raw, task, forms[task], architecture)]
    return sorted(found, key=lambda task: not _is_whole(raw, forms[task]))


def _is_whole(raw: RawCheckpoint, form: HeadForm) -> bool:
    """Whether a head of this form could be used: the inner layer of DeBERTa's for texts is saved by no library."""
    return form.dense is None or form.dense_in_base or f"{form.dense}.weight" in raw.head


def _is_wrapped(raw: RawCheckpoint, architecture: Architecture) -> bool:
    """Whether the module's paths start at a task model, and not at the bare model."""
    paths = raw.parts or [key.removeprefix(_IN_TASK_MODEL) for key in raw.unconverted]
    return bool(architecture.prefix) and any(path.startswith(f"{architecture.prefix}.") for path in paths)


def _task_around(raw: RawCheckpoint, architecture: Architecture) -> Task:
    """What holds such a base model where nothing else is said; its own task where that is not known."""
    if raw.library == Library.ADAPTERS:
        return Task.PREDICTION_HEADS
    kinds = frozenset(stack.kind for stack in architecture.row.stacks)
    return _TASKS.get(kinds, raw.task)
