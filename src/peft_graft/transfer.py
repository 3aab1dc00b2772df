"""The one verb: transfer a module to a student; the result is a ``Graft``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from peft_graft.aligning import align_handles, check_alignment, peeked
from peft_graft.alignment import METHODS, Alignment, Method, copy_alignment
from peft_graft.alignment_files import load_alignment
from peft_graft.architectures import Architecture
from peft_graft.checkpoints import PeftCheckpoint, locate, read_checkpoint, resolve
from peft_graft.errors import AlignmentError, HeadError, ModelError, TextError
from peft_graft.formats.raw import RawCheckpoint
from peft_graft.graft import Graft, graft_head, graft_modules, model_record, pairing_record
from peft_graft.models import (
    ModelHandle,
    blank_model,
    describe_config,
    embedding_similarity,
    handle,
    load_config,
    load_model,
    own_labels,
)
from peft_graft.modules import POOLED_OUT, Space
from peft_graft.planning import TransferPlan, choose_method, plan_transfer
from peft_graft.report import GraftReport, hardware, versions
from peft_graft.settings import Clock, HeadChoice, Progress, TransferSettings, checked_settings
from peft_graft.text import Sample, as_samples, read_text
from peft_graft.token_pairing import PairingCounts
from peft_graft.weights import check_output

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TextLike = Iterable[str | tuple[str, str] | Sequence[str] | Sample]


def transfer(
    module: str | Path,
    *,
    student: str | Path,
    out: str | Path | None = None,
    teacher: str | Path | None = None,
    layers: str = "skip",
    method: str | None = None,
    text: str | Path | None = None,
    columns: Sequence[str] | None = None,
    max_tokens: int = 50_000,
    alignment: str | Path | Alignment | None = None,
    head: HeadChoice = "carry",
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    force: bool = False,
    progress: Progress | None = None,
) -> Graft:
    """Move a trained module to another model, everything given by name or path.

    Args:
        module: folder or hub id of a PEFT or AdapterHub checkpoint.
        student: folder or hub id of the model that receives the module.
        out: folder to write; nothing is written without it.
        teacher: the model that the module was trained on; the one that its configuration names by default.
        layers: ``skip``, ``avg``, or one teacher layer for each student layer, ``"0,2,4"``.
        method: a key of ``METHODS``; chosen by ``planning.choose_method`` when None.
        text: source for alignment (``text.read_text``), with ``columns`` and ``max_tokens``.
        alignment: a saved alignment of the two models, or a live one; no text is needed then.
        head: ``carry`` the saved classification head, or ``drop`` it.
        seed, device, dtype: see ``TransferSettings``.
        force: replace ``out`` if it exists.
        progress: called as (stage, done, total).

    Returns:
        The graft, also when it was not written.

    Raises:
        GraftError: one of its kinds, naming the site or option, what was expected, what came and the fix. All that
            can be known without weights is checked before any weights are loaded.
    """
    settings = checked_settings(layers, method, head, max_tokens, seed, device, dtype)
    if out is not None:
        check_output(Path(out), force=force)
    folder = locate(module)
    raw = read_checkpoint(folder)
    teacher_name = str(teacher or raw.base_model or "")
    if not teacher_name:
        raise ModelError(
            "the module's configuration names no base model", where=str(module), fix="name it with --teacher"
        )
    given = load_alignment(Path(alignment)) if isinstance(alignment, str | Path) else alignment
    _preflight(raw, teacher_name, str(student), settings, given is not None, text is not None)
    samples = read_text(text, columns, seed) if text is not None else None
    if samples is not None and given is None:
        samples = peeked(samples)
    clock = Clock(progress)
    with clock("loading models"):
        needs_tokens = given is None and text is not None
        teacher_model = load_model(teacher_name, device=device, dtype=dtype, role="teacher", tokenizer=needs_tokens)
        student_model = load_model(str(student), device=device, dtype=dtype, role="student", tokenizer=needs_tokens)
    graft = _transfer(
        raw,
        teacher_model,
        student_model,
        settings,
        samples,
        given,
        clock,
        module=str(module),
        text=str(text) if text is not None else None,
        alignment_name=str(alignment) if isinstance(alignment, str | Path) else None,
    )
    if out is None:
        return graft
    with clock("writing and verifying"):
        return graft.save(out, force=force)


def transfer_checkpoint(
    checkpoint: RawCheckpoint,
    teacher: nn.Module,
    student: nn.Module,
    *,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    student_tokenizer: PreTrainedTokenizerBase | None = None,
    text: TextLike | None = None,
    layers: str = "skip",
    method: str | None = None,
    max_tokens: int = 50_000,
    alignment: Alignment | None = None,
    head: HeadChoice = "carry",
    progress: Progress | None = None,
) -> Graft:
    """Move a module between live models; ``transfer`` is the same by name or path.

    Args:
        checkpoint: from ``read_checkpoint(folder)``.
        teacher, student: models of transformers without modules inside, bare or with a task head; forward passes
            run where and in what precision they are.
        teacher_tokenizer, student_tokenizer: fast tokenizers, for methods that need text.
        text: strings, pairs of strings (tuples) or lists of tokens; streamed.
        layers, method, max_tokens, alignment, head, progress: as for ``transfer``.
    """
    device = str(next(student.parameters()).device)
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    settings = checked_settings(layers, method, head, max_tokens, 0, device, dtype)
    return _transfer(
        checkpoint,
        handle(teacher, teacher_tokenizer, ""),
        handle(student, student_tokenizer, ""),
        settings,
        as_samples(text) if text is not None else None,
        alignment,
        Clock(progress),
        module=checkpoint.name,
        text="given in memory" if text is not None else None,
    )


def _preflight(
    raw: RawCheckpoint, teacher: str, student: str, settings: TransferSettings, has_alignment: bool, has_text: bool
) -> None:
    """Plan on configurations alone, so that what cannot work fails before weights are loaded."""
    config_t, config_s = load_config(teacher, "teacher"), load_config(student, "student")
    shape_t, shape_s = describe_config(config_t), describe_config(config_s)
    blank = dict(blank_model(config_t, "base").state_dict())
    raw = _with_teacher_labels(raw, config_t)
    checkpoint = resolve(raw, shape_t, blank, with_head=settings.head == "carry")
    _check_labels(checkpoint, config_s)
    method = METHODS[settings.method or "copy"]
    plan = _plan(checkpoint, shape_t, shape_s, settings, method)
    if settings.method == "copy":
        copy_alignment(plan.pairs, "", "")
    elif not has_text and not has_alignment:
        sizes_differ = any(first != second for first, second in plan.pairs.values())
        if settings.method or sizes_differ:
            raise _no_text(settings.method or "prune-align")


def _check_labels(checkpoint: PeftCheckpoint, student: PretrainedConfig) -> None:
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


def _with_teacher_labels(raw: RawCheckpoint, teacher: PretrainedConfig) -> RawCheckpoint:
    """Label names from the teacher's configuration, for a head saved without them that they fit."""
    labels = own_labels(teacher)
    rows = {tensor.shape[0] for tensor in raw.head.values()}
    return replace(raw, labels=labels) if labels and not raw.labels and len(labels) in rows else raw


def _no_text(method: str) -> TextError:
    return TextError(
        f"{method} aligns the two models on text, and none was given",
        where="--text",
        fix="name a text file or data set with --text, or a saved alignment with --alignment",
    )


def _plan(
    checkpoint: PeftCheckpoint, teacher: Architecture, student: Architecture, settings: TransferSettings, method: Method
) -> TransferPlan:
    return plan_transfer(checkpoint, teacher, student, layers=settings.layers, method=method, head=settings.head)


def _transfer(
    raw: RawCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    samples: Iterator[Sample] | None,
    given: Alignment | None,
    clock: Clock,
    *,
    module: str,
    text: str | None,
    alignment_name: str | None = None,
) -> Graft:
    raw = _with_teacher_labels(raw, teacher.base.config)
    checkpoint = resolve(raw, teacher.architecture, teacher.base_tensors(), with_head=settings.head == "carry")
    _check_labels(checkpoint, student.base.config)
    method, reason = _choose(checkpoint, teacher, student, settings, given)
    plan = _plan(checkpoint, teacher.architecture, student.architecture, settings, method)
    _check_pooler(plan, student)
    counts: PairingCounts | None = None
    if given is not None:
        check_alignment(given, teacher, student)
        alignment = given
    elif not method.needs_text:
        alignment = copy_alignment(plan.pairs, teacher.fingerprint, student.fingerprint)
    else:
        if samples is None:
            raise _no_text(method.name)
        alignment, counts = align_handles(teacher, student, samples, plan.pairs, method, settings, clock, text or "")
    with clock("projecting"):
        modules, sites = graft_modules(checkpoint, plan, alignment, method)
        head, head_record = graft_head(checkpoint, plan, alignment, student.architecture)
    report = GraftReport(
        module=module,
        module_files=dict(raw.files),
        module_format=raw.format,
        module_kind=raw.kind,
        teacher=model_record(teacher),
        student=model_record(student),
        settings=settings,
        method=method.name,
        method_reason=reason,
        text=text,
        alignment=alignment_name,
        layers=[list(sources) for sources in plan.layers],
        sites=sites,
        head=head_record,
        pairing=pairing_record(counts) if counts else None,
        notes=list(plan.notes),
        seconds=clock.seconds,
        versions=versions(),
        hardware=hardware(settings.device),
    )
    return Graft(replace(checkpoint, modules=modules, head=head), report, alignment, student)


def _choose(
    checkpoint: PeftCheckpoint,
    teacher: ModelHandle,
    student: ModelHandle,
    settings: TransferSettings,
    given: Alignment | None,
) -> tuple[Method, str]:
    if given is not None:
        if settings.method not in (None, given.method):
            raise AlignmentError(
                "the alignment was made with another method",
                where="--method",
                expected=given.method,
                found=settings.method,
                fix="leave --method out, or align again",
            )
        return METHODS[given.method], "the method of the given alignment"
    if settings.method:
        return METHODS[settings.method], "asked for"
    plan = _plan(checkpoint, teacher.architecture, student.architecture, settings, METHODS["copy"])
    return choose_method(plan, embedding_similarity(teacher.base, student.base))


def _check_pooler(plan: TransferPlan, student: ModelHandle) -> None:
    pooled = Space(-1, POOLED_OUT)
    if any(pair[1] == pooled for pair in plan.pairs) and any("pooler" in name for name in student.missing):
        raise HeadError(
            "the head reads the pooler's output, and the student's checkpoint has no pooler",
            where=student.name,
            fix="leave the head behind with --head drop",
        )
