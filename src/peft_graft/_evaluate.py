"""``evaluate``: a graft on labelled text, scored beside the teacher, and a language model's student without it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from peft_graft.alignment.text import rows_given
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.checkpoints.task import with_problem_type, with_task
from peft_graft.config import EvaluateConfig, GraftConfig, known_arguments
from peft_graft.distill.classify import Classifying, LabelledText, kind_of_labels
from peft_graft.distill.side_by_side import NLL, Asked, Measuring
from peft_graft.distill.sides import (
    BASE,
    COMMONEST,
    GRAFT,
    MODULE,
    STUDENT,
    TEACHER,
    TEACHER_BASE,
    EvaluatedModel,
    EvaluatedPrompt,
    Row,
    Side,
    SpeakingSide,
    role_of,
)
from peft_graft.environment import hardware, version_of, versions
from peft_graft.errors import ArchitectureError, CheckpointError, DependencyError, ModelError, PlanError, not_installed
from peft_graft.files import json_text
from peft_graft.graft import Graft, graft_or_module
from peft_graft.labelled.examples import LabelledLike
from peft_graft.metrics import METRICS
from peft_graft.models.devices import placed
from peft_graft.models.loading import Loading, ModelHandle, blank_handle, load_config, load_tokenizer
from peft_graft.models.places import hub_id_of
from peft_graft.models.tasks import Task
from peft_graft.outputs import check_output_file, reserving_output, write_aside
from peft_graft.planning.checks import with_teacher_labels
from peft_graft.progress import watchers
from peft_graft.prompts.read import PromptLike
from peft_graft.prompts.template import template_for
from peft_graft.record import Record, html_table
from peft_graft.report import GraftReport
from peft_graft.run import UNFINISHED, Callback, Run
from peft_graft.surroundings import undisturbed

#: Rows in the order in which they are shown.
_ORDER = (COMMONEST, STUDENT, BASE, GRAFT, MODULE, TEACHER, TEACHER_BASE)
#: Choices that a graft's report knows.
_RECORDED = ("format", "student_format", "system", "template_args", "max_new_tokens", "problem_type")


class Evaluation(Record):
    """What ``evaluate`` found.

    Attributes:
        graft: as the user named it. task: what it does. text: the source. prompts: how many prompts were asked, or
            labelled texts classified.
        too_long: prompts left out, being longer with an answer than a model reads. duplicates: left out.
        rows: side by side. answers: to every prompt, or on every text, in the order in which they were asked.
        settings: as recorded with the graft and given by the user.
    """

    format_version: int = 1
    graft: str
    task: Task = Task.CAUSAL_LM
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
                task_type=self.task.pipeline_tag or str(self.task),
                dataset_type=named if hub_id_of(named) == named else self.asked,
                dataset_name=named,
                metric_type=metric,
                metric_name=metric,
                metric_value=round(score.value, 4),
            )
            for metric, score in (row.scores.items() if row else ())
        ]

    @property
    def asked(self) -> str:
        """What was asked: prompts or texts."""
        return "prompts" if self.task is Task.CAUSAL_LM else "texts"

    def _repr_html_(self) -> str:
        names = list(self.rows[0].scores) if self.rows else []
        scores = ([row.name, *(f"{row.scores[name].value:.3f}" for name in names)] for row in self.rows)
        return html_table(f"{self.graft} on {self.prompts:,} {self.asked} of {self.text}", [["", *names], *scores])


@known_arguments(EvaluateConfig)
@reserving_output
@undisturbed
def evaluate(
    graft: str | Path | Graft,
    *,
    text: PromptLike | LabelledLike,
    metrics: Sequence[str] | None = None,
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    out: str | Path | None = None,
    config: EvaluateConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] | None = None,
) -> Evaluation:
    """Score a graft on labelled text, beside the teacher: what it answers, its classes or its numbers.

    Args:
        graft: folder or hub id of a graft, or one in memory; or a plain module, which is scored on its base.
        text: prompts with answers (``prompts.read``), or labelled text (``labelled.examples``): a file, a data set of
            the hub, or rows in memory.
        metrics: of language models names of ``metrics.METRICS`` and ``nll``, ``exact`` by default; of classifiers names
            of ``labelled.scores.CLASS_METRICS``, by default entity F1 of tags that mark entities and accuracy of
            others, accuracy and macro F1 of classes, micro and macro F1 of labels that hold or not; Pearson's
            correlation and the root mean square error of numbers; exact match and F1 of the words of answers.
        teacher: the teacher's model, if it is not where the graft's report says. A teacher that cannot be reached is
            left out, unless it, or its ``module``, is given here.
        student: the model that the graft or module is on, if it is not where its files say.
        out: JSON file for the result. Answers so far are kept beside it, and the same call goes on from there.
        config: how to ask; an ``EvaluateConfig``, or a dict of its fields. callbacks: watch the run.

    Raises:
        GraftError: one of its kinds. All that can be known without weights is checked before any are loaded.
    """
    given = rows_given(text)
    config = placed(EvaluateConfig.of(config))
    names = _each_once(metrics)
    if out is not None:
        check_output_file(Path(out), force=config.force)
    side, report = _subject(graft, student, config)
    others, notes = _teacher_if_there(report, teacher, config)
    run = Run(watchers(callbacks), work=Path(f"{out}{UNFINISHED}") if out is not None else None)
    if isinstance(side, SpeakingSide):
        config = config.model_copy(update={name: getattr(side.settings, name) for name in _RECORDED})
        speaking = [one for one in (side, *others) if isinstance(one, SpeakingSide)]
        rows, asked, remarks = _spoken(given, speaking, names, config, run)
    else:
        rows, asked, remarks = _classified(given, [side, *others], names, config, run)
    found = Evaluation(
        graft=str(graft) if isinstance(graft, str | Path) else str(graft.folder or "a graft in memory"),
        task=side.raw.task,
        rows=[row.record for row in rows],
        notes=[*notes, *remarks],
        settings=config,
        seconds=run.seconds,
        versions=versions(),
        hardware=hardware(config.device),
        **asked,
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


def _each_once(metrics: Sequence[str] | None) -> list[str]:
    """The metrics that a user named, each once.

    Raises:
        PlanError: they are no names, or there is none.
    """
    if metrics is None:
        return []
    names = [metrics] if isinstance(metrics, str) or not isinstance(metrics, Iterable) else list(dict.fromkeys(metrics))
    if not names or not all(names):
        raise PlanError("no metric is named", where="--metric", fix="leave it out for the usual ones")
    return names


def _spoken(
    text: PromptLike, sides: Sequence[SpeakingSide], metrics: Sequence[str], config: EvaluateConfig, run: Run
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Rows of language models, what was asked, and remarks.

    Raises:
        PlanError: no such metric. GraftError: see ``Asked.of``.
    """
    names = metrics or ["exact"]
    for name in names:
        if name not in METRICS and name != NLL:
            raise PlanError("no such metric", where="--metric", expected=", ".join([*METRICS, NLL]), found=name)
    asked = Asked.of(text, sides, names, config)
    measuring = Measuring(asked, names, config, run)
    rows = _in_order(row for one in sides for row in measuring.rows(one))
    found = {"text": asked.source.name, "prompts": len(asked.prompts), "too_long": asked.too_long}
    return rows, found | {"duplicates": asked.source.dropped_duplicates, "answers": asked.said(rows)}, []


def _classified(
    text: LabelledLike, sides: Sequence[Side], metrics: Sequence[str], config: EvaluateConfig, run: Run
) -> tuple[list[Row], dict[str, Any], list[str]]:
    """Rows of classifiers, what was asked, and remarks.

    Raises:
        GraftError: see ``LabelledText.of``.
    """
    raw = sides[0].raw
    asked = LabelledText.of(text, raw.task, kind_of_labels(raw), sides[0].labels, metrics, config)
    classifying = Classifying(asked, config, run)
    common = [] if asked.kind in ("numbers", "spans") else [asked.commonest(config.seed)]
    rows = _in_order([*common, *map(classifying.row, sides)])
    found = {"text": asked.name, "prompts": len(asked.examples), "too_long": 0, "duplicates": 0}
    return rows, found | {"answers": asked.said(rows)}, [*asked.remarks]


def _in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: _ORDER.index(row.record.name))


# ---- who is asked ----------------------------------------------------------------------------------------------------


def _subject(
    graft: str | Path | Graft, student: str | Path | None, config: EvaluateConfig
) -> tuple[Side, GraftReport | None]:
    """The graft on its student, or a plain module on its base, which has no report.

    Raises:
        CheckpointError: there is none, or it can be scored by nothing. ModelError: its model cannot be reached.
    """
    found = graft_or_module(graft, student, config, "--student")
    if not isinstance(found, Graft):
        settings = GraftConfig(**_given(config))
        loading, labels = _loading(config), config.labels or ()
        return _on_its_base(found.raw, str(graft), found.base, loading, settings, BASE, MODULE, labels), None
    handle, settings = found.student, found.report.settings.model_copy(update=_given(config))
    head = found.checkpoint.head
    raw = replace(found.raw, problem_type=settings.problem_type or (head.problem_type if head else None))
    loading = _loading(config, handle.loading.revision)
    name = str(found.folder or "in memory")
    labels = config.labels or found.labels
    return _side(raw, handle, loading, settings, name, labels, STUDENT, GRAFT), found.report


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
    labels = config.labels or (report.head.labels if report.head else ())
    return _on_its_base(raw, name, model, loading, settings, bare, TEACHER, labels)


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
    labels: Sequence[str] = (),
) -> Side:
    if version_of(raw.library) is None:
        raise not_installed(raw.library, "adapters", name, so="so the module cannot be asked")
    handle = blank_handle(load_config(model, loading, role=role_of(whole)), model, loading)
    raw = with_problem_type(with_task(raw, handle.architecture), settings.problem_type, handle.base.config)
    names = labels or with_teacher_labels(raw, handle.base.config).labels or ()
    return _side(raw, handle, loading, settings, name, names, bare, whole)


def _side(  # what belongs to a side, and the names of its rows
    raw: RawCheckpoint,
    handle: ModelHandle,
    loading: Loading,
    settings: GraftConfig,
    name: str,
    labels: Sequence[str],
    bare: str | None,
    whole: str,
) -> Side:
    """A side as what it does: it speaks, or classifies.

    Raises:
        CheckpointError: it does neither. ModelError: its tokenizer cannot be had.
    """
    _check_scored(raw, name)
    role = role_of(whole)
    tokenizer = handle.tokenizer or load_tokenizer(handle.name, loading, role=role)
    handle = replace(handle, tokenizer=tokenizer)
    if raw.task is Task.CAUSAL_LM:
        template = template_for(tokenizer, handle, settings, role)
        return SpeakingSide(handle, loading, raw, name, (), bare, whole, settings, template)
    names = tuple(labels) or tuple(f"LABEL_{number}" for number in range(raw.num_labels or 0))
    if len(names) != raw.num_labels:
        raise PlanError("there are not as many names as classes", where="--labels",
                        expected=raw.num_labels, found=len(names))  # fmt: skip
    return Side(handle, loading, raw, name, names, None, whole, settings)


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


def _check_scored(raw: RawCheckpoint, name: str) -> None:
    """Refuse what neither generates text nor gives classes, answers in a text, or one number.

    Raises:
        CheckpointError: it does not.
    """
    classifies = raw.task in (Task.TOKEN_CLASSIFICATION, Task.SEQUENCE_CLASSIFICATION, Task.QUESTION_ANSWERING)
    numbers = raw.gives_numbers and (raw.num_labels != 1 or raw.task is Task.TOKEN_CLASSIFICATION)
    marks = raw.task is not Task.QUESTION_ANSWERING or raw.num_labels == 2
    if raw.task is Task.CAUSAL_LM or (classifies and raw.head and not numbers and marks):
        return
    if raw.task is Task.QUESTION_ANSWERING and raw.head:
        raise CheckpointError(
            "the head does not mark the ends of answers",
            where=name,
            expected="2 outputs",
            found=raw.num_labels,
            fix="train it anew with the two that AutoModelForQuestionAnswering gives a head where nothing else is said",
        )
    several = "several " if raw.num_labels != 1 else ""
    without = "without a head" if classifies and not raw.head else f"that gives {several}numbers" if classifies else ""
    raise CheckpointError(
        f"evaluate scores generated text, classes, numbers and answers in a text, and this is a {raw.task} module "
        f"{without}".rstrip(),
        where=name,
        expected="a language model, or a classifier, a regressor or an answerer of questions with its head",
        fix="load it with its library and score it there, or compare it with `peft-graft study` (docs/studies.md)",
    )


def _changed(teacher: Side, report: GraftReport) -> list[str]:
    """A remark, where the module is not the one that was moved."""
    moved, found = report.module_files, teacher.raw.files
    if all(found[name] == digest for name, digest in moved.items() if name in found):
        return []
    return [f"{teacher.module} has changed since it was moved"]
