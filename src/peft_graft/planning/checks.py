"""What is checked of a transfer before any weights are loaded, and what follows from configurations alone."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from peft_graft.alignment.alignment import copy_alignment
from peft_graft.alignment.methods import METHODS, Method
from peft_graft.checkpoints.library import in_library
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, resolve
from peft_graft.distill.fit_head import can_fit
from peft_graft.errors import AlignmentError, HeadError, TextError
from peft_graft.models.architecture import Architecture
from peft_graft.models.loading import ModelHandle, describe_config, load_config
from peft_graft.models.spaces import POOLED_OUT, Space
from peft_graft.models.task_models import blank_model, own_labels
from peft_graft.models.tasks import Task
from peft_graft.planning.correspondence import ExpertMap
from peft_graft.planning.plan import TransferPlan, check_reads_text, plan_transfer
from peft_graft.planning.sites import at_sites
from peft_graft.settings import TransferSettings

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def preflight(
    raw: RawCheckpoint, teacher: str, student: str, settings: TransferSettings, has_alignment: bool, has_text: bool
) -> None:
    """Plan on configurations alone, so that what cannot work fails before weights are loaded."""
    config_t, config_s = load_config(teacher, role="teacher"), load_config(student, role="student")
    shape_t, shape_s = describe_config(config_t), describe_config(config_s)
    blank = dict(blank_model(config_t, Task.BASE).state_dict())
    raw = with_teacher_labels(raw, config_t)
    whole = resolve(raw, shape_t, blank, with_head=settings.head != "drop")
    check_labels(whole, config_s)
    checkpoint = in_library(at_sites(whole, settings.sites, shape_t, config_t), settings.library)
    if settings.head == "fit" and (checkpoint.head is None or not can_fit(checkpoint.head)):
        raise HeadError(
            "there is no head to fit" if checkpoint.head is None else "a head of this form cannot be fitted",
            where="--head fit",
            found=checkpoint.head.activation if checkpoint.head else raw.task,
            fix="leave --head out",
        )
    check_reading(shape_t, shape_s, settings, has_text)
    if needs_predictions(settings) and not has_text:
        raise no_predictions(settings)
    method = METHODS[settings.method or "copy"]
    if method.fits_shifts and raw.kind != "lora":
        raise AlignmentError(
            "functional grafting fits the updates of linear layers",
            where="--method functional",
            expected="a LoRA",
            found=raw.kind,
            fix="leave --method out",
        )
    plan = planned(checkpoint, shape_t, shape_s, settings, method)
    if settings.method == "copy":
        copy_alignment(plan.pairs, "", "")
    elif not has_text and not has_alignment:
        sizes_differ = any(first != second for first, second in plan.pairs.values())
        if settings.method or sizes_differ:
            raise no_text(settings.method or "prune-align")


def check_reading(teacher: Architecture, student: Architecture, settings: TransferSettings, has_text: bool) -> None:
    """Refuse to use text with models that read something else.

    Raises:
        PlanError: text was given, or a method that aligns on it, or the choice was left open.
    """
    if has_text:
        check_reads_text(teacher, student, "--text")
    elif needs_predictions(settings):
        check_reads_text(teacher, student, learner(settings))
    elif settings.method is None or METHODS[settings.method].needs_text:
        check_reads_text(teacher, student, f"--method {settings.method}" if settings.method else "choosing a method")


def check_labels(checkpoint: PeftCheckpoint, student: PretrainedConfig) -> None:
    """Refuse a student whose own head has other labels than the module's.

    Raises:
        HeadError: it has.
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


def with_teacher_labels(raw: RawCheckpoint, teacher: PretrainedConfig) -> RawCheckpoint:
    """Label names from the teacher's configuration, for a head saved without them that they fit."""
    labels = own_labels(teacher)
    rows = {tensor.shape[0] for tensor in raw.head.values()}
    return replace(raw, labels=labels) if labels and not raw.labels and len(labels) in rows else raw


def needs_predictions(settings: TransferSettings) -> bool:
    """Whether something was asked for that the teacher must be asked for in turn."""
    functional = settings.method is not None and METHODS[settings.method].fits_shifts
    return bool(settings.polish) or settings.head == "fit" or functional


def no_predictions(settings: TransferSettings) -> TextError:
    """The error for options that learn from the teacher, when there is no text to ask it about."""
    return no_text(learner(settings), "learns from the teacher's predictions on text", alignment=False)


def learner(settings: TransferSettings) -> str:
    """The option that needs the teacher's predictions."""
    if settings.polish:
        return "--polish"
    return "--head fit" if settings.head == "fit" else f"--method {settings.method}"


def no_text(what: str, why: str = "aligns the two models on text", *, alignment: bool = True) -> TextError:
    """The error for something that needs text and got none."""
    return TextError(
        f"{what} {why}, and none was given",
        where="--text",
        fix="name a text file or data set with --text" + (", or a saved alignment with --alignment" * alignment),
    )


def planned(
    checkpoint: PeftCheckpoint,
    teacher: Architecture,
    student: Architecture,
    settings: TransferSettings,
    method: Method,
    experts: ExpertMap | None = None,
) -> TransferPlan:
    """The plan of a transfer under these settings."""
    return plan_transfer(
        checkpoint, teacher, student, layers=settings.layers, method=method, head=settings.head, experts=experts
    )


def check_pooler(plan: TransferPlan, student: ModelHandle) -> None:
    """Refuse a head that reads a pooler which the student's checkpoint lacks.

    Raises:
        HeadError: it does.
    """
    pooled = Space(-1, POOLED_OUT)
    if any(pair[1] == pooled for pair in plan.pairs) and any("pooler" in name for name in student.missing):
        raise HeadError(
            "the head reads the pooler's output, and the student's checkpoint has no pooler",
            where=student.name,
            fix="leave the head behind with --head drop",
        )
