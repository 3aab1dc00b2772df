"""``evaluate``: what a graft answers to prompts, scored beside its student without it and the teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from peft_graft.alignment.text import rows_given
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.task import with_task
from peft_graft.config import EvaluateConfig, GraftConfig, known_arguments
from peft_graft.distill.side_by_side import (
    BASE,
    GRAFT,
    MODULE,
    NLL,
    STUDENT,
    TEACHER,
    TEACHER_BASE,
    Asked,
    EvaluatedModel,
    EvaluatedPrompt,
    Measuring,
    Side,
)
from peft_graft.environment import hardware, version_of, versions
from peft_graft.errors import ArchitectureError, CheckpointError, DependencyError, ModelError, PlanError, not_installed
from peft_graft.files import json_text
from peft_graft.graft import Graft, graft_or_module
from peft_graft.metrics import METRICS
from peft_graft.models.devices import placed
from peft_graft.models.loading import Loading, blank_handle, load_config, load_tokenizer
from peft_graft.models.places import hub_id_of
from peft_graft.models.tasks import Task
from peft_graft.outputs import check_output_file, reserving_output, write_aside
from peft_graft.progress import watchers
from peft_graft.prompts.read import PromptLike
from peft_graft.prompts.template import template_for
from peft_graft.record import Record, html_table
from peft_graft.report import GraftReport
from peft_graft.run import UNFINISHED, Callback, Run

#: Rows in the order in which they are shown.
_ORDER = (STUDENT, BASE, GRAFT, MODULE, TEACHER, TEACHER_BASE)
#: Choices that a graft's report knows.
_RECORDED = ("format", "student_format", "system", "template_args", "max_new_tokens")


class Evaluation(Record):
    """What ``evaluate`` found.

    Attributes:
        graft: as the user named it. text: the prompts. prompts: how many were asked.
        too_long: left out, being longer with an answer than a model reads. duplicates: left out.
        rows: side by side. answers: of every prompt, in the order in which they were asked.
        settings: as recorded with the graft and given by the user.
    """

    format_version: int = 1
    graft: str
    text: str
    prompts: int
    too_long: int
    duplicates: int
    rows: list[EvaluatedModel]
    answers: list[EvaluatedPrompt]
    notes: list[str]
    settings: EvaluateConfig
    seconds: dict[str, float]
    versions: dict[str, str]
    hardware: dict[str, str | int]

    @property
    def eval_results(self) -> list[EvalResult]:
        """The scores of the graft, or of the module, as model cards hold them (``Graft.save_pretrained``)."""
        named = self.text if not Path(self.text).exists() else Path(self.text).name
        row = next((row for row in self.rows if row.name in (GRAFT, MODULE)), None)
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=named if hub_id_of(named) == named else "prompts",
                dataset_name=named,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(score.value, 4),
            )
            for metric, score in (row.scores.items() if row else ())
        ]

    def _repr_html_(self) -> str:
        names = list(self.rows[0].scores) if self.rows else []
        scores = ([row.name, *(f"{row.scores[name].value:.3f}" for name in names)] for row in self.rows)
        return html_table(f"{self.graft} on {self.prompts:,} prompts of {self.text}", [["", *names], *scores])


@known_arguments(EvaluateConfig)
@reserving_output
def evaluate(
    graft: str | Path | Graft,
    *,
    text: PromptLike,
    metrics: Sequence[str] = ("exact",),
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    out: str | Path | None = None,
    config: EvaluateConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Evaluation:
    """Score what a graft answers, beside its student without it and the teacher, against answers that are known.

    Args:
        graft: folder or hub id of a graft, or one in memory; or a plain module of a language model, which is scored
            beside its base.
        text: prompts with answers: a file, a data set of the hub, or rows in memory (``prompts.read``).
        metrics: names of ``metrics.METRICS``, and ``nll``.
        teacher: the teacher's model, if it is not where the graft's report says. A teacher that cannot be reached is
            left out, unless it, or its ``module``, is given here.
        student: the model that the graft or module is on, if it is not where its files say.
        out: JSON file for the result. Answers so far are kept beside it, and the same call goes on from there.
        config: how to ask; an ``EvaluateConfig``, or a dict of its fields. callbacks: watch the run.

    Raises:
        GraftError: one of its kinds. All that can be known without weights is checked before any are loaded.
    """
    text = rows_given(text)
    config = placed(EvaluateConfig.of(config))
    names = _known(metrics)
    if out is not None:
        check_output_file(Path(out), force=config.force)
    side, report = _subject(graft, student, config)
    others, notes = _teacher_if_there(report, teacher, config)
    config = config.model_copy(update={name: getattr(side.settings, name) for name in _RECORDED})
    asked = Asked.of(text, [side, *others], names, config)
    run = Run(watchers(callbacks), work=Path(f"{out}{UNFINISHED}") if out is not None else None)
    measuring = Measuring(asked, names, config, run)
    rows = sorted(
        (row for one in (side, *others) for row in measuring.rows(one)), key=lambda row: _ORDER.index(row.record.name)
    )
    found = Evaluation(
        graft=str(graft) if isinstance(graft, str | Path) else str(graft.folder or "a graft in memory"),
        text=asked.source.name,
        prompts=len(asked.prompts),
        too_long=asked.too_long,
        duplicates=asked.source.dropped_duplicates,
        rows=[row.record for row in rows],
        answers=asked.said(rows),
        notes=notes,
        settings=config,
        seconds=run.seconds,
        versions=versions(),
        hardware=hardware(config.device),
    )
    if out is not None:
        content = json_text(found.model_dump(mode="json"), str(out), indent=2, sort_keys=True)
        write_aside(Path(out), content + "\n", force=config.force)
        shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    return found


def _teacher_if_there(
    report: GraftReport | None, teacher: str | Path | None, config: EvaluateConfig
) -> tuple[list[Side], list[str]]:
    """The teacher's side of a graft, none where it cannot be reached and was not asked for; and remarks."""
    if report is None:
        return [], []
    try:
        found = _teacher(report, teacher, config)
        return [found], list(_changed(found, report))
    except (CheckpointError, ModelError, ArchitectureError, DependencyError) as error:
        if teacher is not None or config.module is not None or config.teacher_base:
            raise
        return [], [f"without the teacher: {error}"]


def _known(metrics: Sequence[str]) -> list[str]:
    """The metrics, each once.

    Raises:
        PlanError: there is none, or none of that name.
    """
    names = [metrics] if isinstance(metrics, str) or not isinstance(metrics, Iterable) else list(dict.fromkeys(metrics))
    for name in names or [""]:
        if name not in METRICS and name != NLL:
            raise PlanError("no such metric", where="--metric", expected=", ".join([*METRICS, NLL]), found=name or None)
    return names


# ---- who is asked ----------------------------------------------------------------------------------------------------


def _subject(
    graft: str | Path | Graft, student: str | Path | None, config: EvaluateConfig
) -> tuple[Side, GraftReport | None]:
    """The graft on its student, or a plain module on its base, which has no report.

    Raises:
        CheckpointError: there is none, or it is no language model's. ModelError: its model cannot be reached.
    """
    found = graft_or_module(graft, student, config, "--student")
    if not isinstance(found, Graft):
        settings = GraftConfig(**_given(config))
        return _on_its_base(found.raw, str(graft), found.base, _loading(config), settings, BASE, MODULE), None
    handle, settings = found.student, found.report.settings.model_copy(update=_given(config))
    _speaking(found.checkpoint.raw, str(found.folder or "the graft"))
    loading = _loading(config, handle.loading.revision)
    tokenizer = handle.tokenizer or load_tokenizer(handle.name, loading, role="student")
    template = template_for(tokenizer, handle, settings)
    name = str(found.folder or "in memory")
    return Side(handle, loading, found.raw, name, template, STUDENT, GRAFT, settings), found.report


def _teacher(report: GraftReport, named: str | Path | None, config: EvaluateConfig) -> Side:
    """The module that was moved, on the model that it comes from.

    Raises:
        CheckpointError, ModelError: one of them cannot be reached.
    """
    settings = report.settings.model_copy(update=_given(config))
    place = {} if config.module else {"revision": settings.revision, "subfolder": settings.subfolder}
    name = config.module or report.module
    raw = read_checkpoint(locate(name, token=config.token, **place))
    loading = _loading(config, None if named else settings.teacher_revision)
    bare = TEACHER_BASE if config.teacher_base else None
    model = str(named or report.teacher.reachable)
    return _on_its_base(raw, name, model, loading, settings, bare, TEACHER)


def _given(config: EvaluateConfig) -> dict[str, Any]:
    """What the user says of the choices that a graft's report knows."""
    return {name: value for name in _RECORDED if (value := getattr(config, name)) is not None}


def _on_its_base(  # the module, its model and how they are read; the rest names their rows
    raw: RawCheckpoint,
    name: str,
    model: str,
    loading: Loading,
    settings: GraftConfig,
    bare: str | None,
    whole: str,
) -> Side:
    if version_of(raw.library) is None:
        raise not_installed(raw.library, "adapters", name, so="so the module cannot be asked")
    role = "teacher" if whole == TEACHER else "model"
    handle = blank_handle(load_config(model, loading, role=role), model, loading)
    raw = _speaking(with_task(raw, handle.architecture), name)
    template = template_for(load_tokenizer(model, loading, role=role), handle, settings, role)
    return Side(handle, loading, raw, name, template, bare, whole, settings)


def _loading(config: EvaluateConfig, revision: str | None = None) -> Loading:
    return Loading(
        revision=revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        quantization_config=config.quantization_config,
        device_map=config.device_map,
        device=config.device,
        dtype=config.dtype,
    )


def _speaking(raw: RawCheckpoint, name: str) -> RawCheckpoint:
    """Refuse what generates no text.

    Raises:
        CheckpointError: it is no module of a causal language model.
    """
    if raw.task is not Task.CAUSAL_LM:
        raise CheckpointError(
            f"evaluate scores generated text, and this is a {raw.task} module",
            where=name,
            expected=Task.CAUSAL_LM,
            fix="compare it with `peft-graft study` (docs/studies.md)",
        )
    return raw


def _changed(teacher: Side, report: GraftReport) -> list[str]:
    """A remark, where the module is not the one that was moved."""
    moved, found = report.module_files, teacher.raw.files
    if all(found[name] == digest for name, digest in moved.items() if name in found):
        return []
    return [f"{teacher.module} has changed since it was moved"]
