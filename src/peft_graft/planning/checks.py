"""What is refused before any weights are loaded, beside what sites and shapes say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peft_graft.alignment.aligner import no_text
from peft_graft.alignment.methods import METHODS
from peft_graft.checkpoints.attach import check_library
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import AUTO, GraftConfig
from peft_graft.errors import AlignmentError, HeadError, PlanError, TextError
from peft_graft.models.loading import ModelHandle, ModelPair
from peft_graft.models.spaces import POOLED_OUT, Space
from peft_graft.models.spec import EMBED_ROLE
from peft_graft.models.task_models import blank_model, is_remote, own_labels
from peft_graft.models.tasks import Task
from peft_graft.modules.embeddings import RowsModule, TokenRowsPart
from peft_graft.modules.norms import NormPart
from peft_graft.planning.sites import SitePlans
from peft_graft.planning.spaces import check_reads_text

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_reading(models: ModelPair, config: GraftConfig, *, has_text: bool) -> None:
    """Refuse to use text with models that read something else.

    Raises:
        PlanError: text was given, or a method that aligns on it, or the choice was left open.
    """
    shapes = models.teacher.architecture, models.student.architecture
    if has_text:
        check_reads_text(*shapes, "--text")
    elif asks_teacher(config):
        check_reads_text(*shapes, asking_option(config))
    elif config.method == AUTO:
        check_reads_text(*shapes, "choosing a method")
    elif METHODS[config.method].needs_text:
        check_reads_text(*shapes, f"--method {config.method}")


def check_left_out(checkpoint: PeftCheckpoint, config: GraftConfig) -> None:
    """Refuse to leave trained tokens or norms behind, which other layers count on, unless the user named what moves.

    Raises:
        PlanError: the module trains a vocabulary that has no role, or a norm beside something else.
    """
    raw = checkpoint.raw
    for path in checkpoint.left_out if config.sites is None else ():
        tokens = raw.parts[path].trains_tokens(path)
        if not tokens and (raw.kind == "norms" or not isinstance(raw.parts[path], NormPart)):
            continue
        raise PlanError(
            f"the module trains this {'part of the vocabulary' if tokens else 'norm'}, which has no role in this model "
            "yet",
            where=path,
            fix=f"leave it behind by naming what moves: --sites {','.join(checkpoint.roles)}",
        )


def tying_notes(moved: PeftCheckpoint, models: ModelPair) -> tuple[str, ...]:
    """What is to say where rows of word embeddings move that one of the models has in its output layer too.

    peft trains such rows in both where they are trained token by token, or where ``ensure_weight_tying`` is set.
    """
    raw = moved.raw
    in_both = raw.config.get("ensure_weight_tying") or any(
        isinstance(part, TokenRowsPart) for part in raw.parts.values()
    )
    rows = {site.role for site, module in moved.modules.items() if isinstance(module, RowsModule)}
    teacher, student = (
        bool(getattr(model.text_config, "tie_word_embeddings", False)) for model in (models.teacher, models.student)
    )
    if raw.task is not Task.CAUSAL_LM or not in_both or rows != {EMBED_ROLE} or teacher == student:
        return ()
    if teacher:
        return (
            "the rows that were trained are of the teacher's output layer too, which is its word embeddings; the "
            "student has an output layer of its own, and it stays as it was",
        )
    return (
        "the student's output layer is its word embeddings, so it changes with them; the teacher's stayed as it was",
    )


def check_labels(checkpoint: PeftCheckpoint, student: PretrainedConfig) -> None:
    """Refuse a student whose own head has other labels than the module's.

    Raises:
        HeadError: the labels, or their number, differ.
    """
    head, own = checkpoint.head, own_labels(student)
    if head is None or not own:
        return
    if (head.labels and head.labels != own) or head.num_labels != len(own):
        raise HeadError(
            "the student has a head with other labels",
            where=str(student.name_or_path or student.model_type),
            expected=", ".join(head.labels) or f"{head.num_labels} labels",
            found=", ".join(own),
            fix="leave the module's head behind with --head drop, or give the student's base model",
        )


def check_problem_type(checkpoint: PeftCheckpoint, config: GraftConfig) -> None:
    """Refuse ``--problem-type`` where no classifier of whole texts moves.

    Raises:
        HeadError: there is no head, or one of another task.
    """
    head = checkpoint.head
    if config.problem_type and (head is None or head.task is not Task.SEQUENCE_CLASSIFICATION):
        raise HeadError(
            "no classifier of whole texts moves whose outputs it could describe",
            where="--problem-type",
            found=head.task if head else "no head",
            fix="leave --problem-type out",
        )


def check_head_fit(checkpoint: PeftCheckpoint, config: GraftConfig) -> None:
    """Refuse ``--head fit`` where there is no head, or one that cannot be fitted.

    Raises:
        HeadError: there is none, or its activation function is unknown.
    """
    head = checkpoint.head
    if config.head == "fit" and (head is None or not head.can_be_fitted):
        raise HeadError(
            "there is no head to fit" if head is None else "a head of this form cannot be fitted",
            where="--head fit",
            found=head.activation if head else checkpoint.raw.task,
            fix="leave --head out",
        )


def check_method(raw: RawCheckpoint, config: GraftConfig, *, has_prompts: bool = False) -> None:
    """Refuse a method that fits layers for modules other than LoRA, and to prompts.

    Raises:
        AlignmentError: the module is of another kind. PlanError: the text is prompts.
    """
    if config.method != AUTO and METHODS[config.method].fits_layers and has_prompts:
        raise PlanError(
            "functional grafting fits layers on plain text, and this is prompts",
            where="--method functional",
            fix="leave --method out, or give plain text",
        )
    if config.method != AUTO and METHODS[config.method].fits_layers and raw.kind != "lora":
        raise AlignmentError(
            "functional grafting fits the updates of linear layers",
            where="--method functional",
            expected="a LoRA",
            found=raw.kind,
            fix="leave --method out",
        )


def check_task_models(module: RawCheckpoint, moved: RawCheckpoint, models: ModelPair, *, has_text: bool) -> None:
    """Refuse models that transformers cannot make the task models of which a transfer needs.

    Args:
        module: the teacher's. moved: what is written for the student. has_text: whether the teacher may be asked.

    Raises:
        ModelError: there is no such class in transformers or in the library adapters, or it cannot be built from the
            model's configuration.
    """
    check_library(moved.library, moved.task, models.student)
    written_names(models.student, moved.task)
    if has_text:
        base = models.teacher.base
        blank_model(base.config, module.task, trust_remote_code=is_remote(base))


def check_pooler(sites: SitePlans, student: ModelHandle) -> None:
    """Refuse a head that reads a pooler which the student's checkpoint lacks.

    Raises:
        HeadError: the student's pooler was initialised at random.
    """
    pooled = Space(-1, POOLED_OUT)
    if any(pair[1] == pooled for pair in sites.pairs) and any("pooler" in name for name in student.missing):
        raise HeadError(
            "the head reads the pooler's output, and the student's checkpoint has no pooler",
            where=student.name,
            fix="leave the head behind with --head drop",
        )


def with_teacher_labels(raw: RawCheckpoint, teacher: PretrainedConfig) -> RawCheckpoint:
    """Label names from the teacher's configuration, for a head saved without them that they fit."""
    labels = own_labels(teacher)
    rows = {tensor.shape[0] for tensor in raw.head.values() if tensor.ndim}
    return replace(raw, labels=labels) if labels and not raw.labels and len(labels) in rows else raw


def with_given_labels(checkpoint: PeftCheckpoint, names: tuple[str, ...]) -> PeftCheckpoint:
    """The same head with the label names that a user gave.

    Raises:
        HeadError: there is no head that moves, or one with another number of classes.
    """
    head = checkpoint.head
    if head is None or not head.has_classes:
        speaks = checkpoint.raw.task is Task.CAUSAL_LM
        raise HeadError(
            "no head moves whose classes they could name",
            where="--labels",
            expected="ignore or use, of a language model" if speaks else None,
            found=f"{len(names)} ({', '.join(names)})",
            fix="leave --labels out",
        )
    if len(names) != head.num_labels:
        raise HeadError(
            "the head has another number of classes",
            where="--labels",
            expected=f"{head.num_labels} names",
            found=f"{len(names)} ({', '.join(names)})",
        )
    return replace(checkpoint, raw=replace(checkpoint.raw, labels=names), head=replace(head, labels=names))


def asks_teacher(config: GraftConfig) -> bool:
    """Whether something was asked for that needs the teacher's predictions."""
    functional = config.method != AUTO and METHODS[config.method].fits_layers
    return config.polish not in (AUTO, 0) or config.head == "fit" or functional


def asking_option(config: GraftConfig) -> str:
    """The option that needs the teacher's predictions."""
    if config.polish not in (AUTO, 0):
        return "--polish"
    return "--head fit" if config.head == "fit" else f"--method {config.method}"


def no_predictions(config: GraftConfig) -> TextError:
    """The error for options that learn from the teacher, when there is no text to ask it about."""
    return no_text(asking_option(config), "learns from the teacher's predictions on text", alignment=False)
