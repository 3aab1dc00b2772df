"""``export``: a graft written for another program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft_graft.serving.forms  # noqa: F401 - what there is registers itself
from peft_graft.checkpoints.convert import as_lora
from peft_graft.checkpoints.task import with_task
from peft_graft.config import ExportConfig, Target, known_arguments
from peft_graft.environment import versions
from peft_graft.errors import PlanError
from peft_graft.files import file_hashes, write_json
from peft_graft.graft import Graft, graft_or_module
from peft_graft.models.devices import placed
from peft_graft.models.loading import DTYPES, Loading, ModelHandle, blank_handle, load_config, load_model
from peft_graft.models.places import place_of
from peft_graft.outputs import check_apart, check_place, written_aside
from peft_graft.record import Record
from peft_graft.run import Callback, Run
from peft_graft.serving.subject import Comparison, Subject
from peft_graft.serving.target import FORMS
from peft_graft.surroundings import undisturbed

#: What an export says about itself, beside it.
RECORD = "export.json"


class Export(Record):
    """What was exported, as ``export.json`` holds it.

    ``comparison``: how it answers beside the module as it was, None where it could not be loaded here. ``kept``: of
    what the module changes in the weights, the share that is in the export, by squared norms, where it was measured.
    ``use``: the command, or the line of Python, that loads it.
    """

    to: Target
    graft: str
    base: str
    kind: str
    comparison: Comparison | None
    kept: float | None
    notes: list[str]
    use: str
    files: dict[str, str]
    versions: dict[str, str]
    out: str


@known_arguments(ExportConfig)
@undisturbed
def export(
    graft: str | Path | Graft,
    *,
    to: str,
    out: str | Path | None = None,
    base: str | Path | None = None,
    config: ExportConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
) -> Export:
    """Write a graft for another program, read what was written, and compare its answers.

    Args:
        graft: folder or hub id of a graft or of a plain module, or a graft in memory.
        to: ``merged`` into its base, as a model of transformers; ``gguf``, a LoRA for llama.cpp; ``ollama``, the same
            with a Modelfile; ``vllm``, a LoRA that vLLM takes; ``peft`` or ``adapters``, the same in that library.
        out: folder to write; by default the graft's, with a hyphen and ``to`` behind its name.
        base: the model that it is on, if that is not where its files say.
        config: an ``ExportConfig``, or a dict of its fields. callbacks: watch the run.

    Raises:
        PlanError: the module cannot be had there; said before any weights are loaded.
        VerificationError: what was written answers otherwise than the module; then there is nothing at ``out``.
        GraftError: the graft or its base cannot be read.
    """
    config = placed(ExportConfig.of(config))
    target = _known(to)
    subject = _subject(graft, base, config)
    place = _place(subject, target, out)
    check_place(place, force=config.force)
    check_apart(place, [graft, subject.name, base, subject.base.name])
    form = FORMS[target]
    form.check(subject, config)
    run = Run(callbacks, work=None)
    if form.needs_base(subject) or subject.raw.needs_conversion:
        with run.stage("loading models"):
            dtype = subject.base.loading.dtype if form.rounds else "float32"
            subject = replace(subject, base=_loaded(subject.base, dtype))
    if subject.raw.needs_conversion:
        with run.stage("converting to LoRA"):
            subject = replace(subject, raw=as_lora(subject.raw, subject.base))
    with run.stage("writing and verifying"), written_aside(place, force=config.force) as staging:
        written = form.write(staging, subject, config)
        found = Export(
            to=target,
            graft=place_of(subject.name),
            base=subject.base.place,
            kind=subject.raw.kind,
            comparison=written.comparison,
            kept=written.kept,
            notes=[*subject.raw.notes, *written.notes],
            use=written.use.format(out=str(place), base=subject.base.place),
            files=file_hashes(staging),
            versions=versions(),
            out=str(place),
        )
        write_json(staging / RECORD, found.model_dump(mode="json"))
    return found


def _known(to: str) -> Target:
    if to not in list(Target):
        raise PlanError("unknown choice", where="--to", expected=", ".join(Target), found=to)
    return Target(to)


def _place(subject: Subject, target: Target, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    if subject.folder is None:
        raise PlanError("the graft is in memory, so there is no place beside it", where="--out", fix="name a folder")
    name = subject.name.rstrip("/\\")
    return Path(f"{name}-{target}" if Path(name).is_dir() else f"{name.rpartition('/')[2]}-{target}")


def _subject(graft: str | Path | Graft, base: str | Path | None, config: ExportConfig) -> Subject:
    """The graft, or a plain module, on its base, which is described without weights.

    Raises:
        CheckpointError: there is none, or it cannot be read. ModelError: its base is not known or cannot be reached.
    """
    found = graft_or_module(graft, base, config, "--base")
    if isinstance(found, Graft):
        name = str(found.folder or "a graft in memory") if isinstance(graft, Graft) else str(graft)
        return _of_graft(found, name, base, config)
    handle = _described(found.base, config, None)
    raw = with_task(found.raw, handle.architecture)
    return Subject(str(graft), raw, handle, tuple(raw.labels or ()), found.folder)


def _of_graft(graft: Graft, name: str, base: str | Path | None, config: ExportConfig) -> Subject:
    student = graft.student
    revision = graft.report.settings.student_revision if base is None else None
    handle = _described(str(base or student.name), config, revision)
    given = graft.report.settings
    own = Subject(name, graft.raw, handle, graft.labels, graft.folder)
    return replace(own, system=given.system, format=given.format_of_student, template_args=given.template_args or {})


def _described(place: str, config: ExportConfig, revision: str | None) -> ModelHandle:
    """The base without weights, to be loaded in the dtype that it is saved in unless another is asked for."""
    loading = Loading(
        revision=revision, token=config.token, trust_remote_code=config.trust_remote_code, device=config.device
    )
    found = load_config(place, loading, role="base")
    own = str(getattr(found, "dtype", None) or getattr(found, "torch_dtype", None)).removeprefix("torch.")
    loading = replace(loading, dtype=config.dtype or (own if own in DTYPES else "float32"))
    return blank_handle(found, place, loading)


def _loaded(base: ModelHandle, dtype: str) -> ModelHandle:
    return load_model(base.name, replace(base.loading, dtype=dtype), role="base")
