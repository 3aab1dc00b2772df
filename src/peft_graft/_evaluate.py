"""``evaluate``: what a graft answers to prompts, scored beside its student without it and the teacher."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from peft_graft.checkpoints.attach import AttachedModel, attach, library_version
from peft_graft.checkpoints.convert import as_lora
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import locate, read_checkpoint
from peft_graft.config import EvaluateConfig, GraftConfig
from peft_graft.distill.ask_prompts import longest_text
from peft_graft.distill.generate import Answer, AnswerStore, Sampling, generate_answers
from peft_graft.distill.likelihood import AnswerLoss, answer_losses
from peft_graft.environment import hardware, versions
from peft_graft.errors import ArchitectureError, CheckpointError, DependencyError, ModelError, PlanError, TextError
from peft_graft.files import check_output_file, write_aside
from peft_graft.graft import REPORT, Graft
from peft_graft.metrics import METRICS, OfSums, interval, score_answers
from peft_graft.models.loading import Loading, ModelHandle, blank_handle, load_config, load_model, load_tokenizer
from peft_graft.models.output import LanguageModel, language_model
from peft_graft.models.tasks import Task
from peft_graft.prompts.conversation import Prompt
from peft_graft.prompts.read import PromptLike, PromptSource
from peft_graft.prompts.template import Template
from peft_graft.report import GraftReport
from peft_graft.run import UNFINISHED, Callback, Run

#: The metric that scores no answers of its own, and what it is called by bytes in place of tokens.
NLL, NLL_BYTE = "nll", "nll/byte"
#: Rows of a graft, and of a plain module, in the order in which they are shown.
_STUDENT, _GRAFT, _TEACHER, _TEACHER_BASE, _BASE, _MODULE = (
    "student", "graft", "teacher", "teacher base", "base", "module",
)  # fmt: skip
_ORDER = (_STUDENT, _BASE, _GRAFT, _MODULE, _TEACHER, _TEACHER_BASE)
#: What ``student_format`` takes for the chat template.
_CHAT = "chat"
#: Choices that a graft's report knows.
_RECORDED = ("format", "student_format", "system", "template_args", "max_new_tokens")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Score(_Record):
    """A score, and the middle 95 % of what it is over prompts drawn from these; None where that is not known."""

    value: float
    low: float | None = None
    high: float | None = None


class EvaluatedModel(_Record):
    """One row: a model, its module if it has one, and their scores by metric.

    ``nll`` is in nats a token of the reference, its end among them, ``nll/byte`` in nats a byte, which compares between
    tokenizers; less of them is better, and more of all else. ``cut``: answers that came to no end. ``empty``: answers
    without text.
    """

    name: str
    model: str
    module: str | None
    scores: dict[str, Score]
    cut: int = 0
    empty: int = 0


class EvaluatedPrompt(_Record):
    """A prompt, the answers that are accepted, and what every row answered."""

    prompt: str
    references: list[str]
    answers: dict[str, str]


class Evaluation(_Record):
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


def evaluate(
    graft: str | Path | Graft,
    *,
    text: PromptLike,
    metrics: Sequence[str] = ("exact",),
    teacher: str | Path | None = None,
    student: str | Path | None = None,
    out: str | Path | None = None,
    config: EvaluateConfig | None = None,
    callbacks: Sequence[Callback] = (),
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
        config: how to ask; ``EvaluateConfig()`` by default. callbacks: watch the run.

    Raises:
        GraftError: one of its kinds. All that can be known without weights is checked before any are loaded.
    """
    config = config or EvaluateConfig()
    names = _known(metrics)
    if out is not None:
        check_output_file(Path(out), force=config.force)
    side, report = _subject(graft, student, config)
    sides, notes = [side], list[str]()
    if report is not None:
        asked_for = teacher is not None or config.module is not None or config.teacher_base
        try:
            sides.append(_teacher(report, teacher, config))
            notes += _changed(sides[-1], report)
        except (CheckpointError, ModelError, ArchitectureError, DependencyError) as error:
            if asked_for:
                raise
            notes.append(f"without the teacher: {error}")
    config = config.model_copy(update={name: getattr(side.settings, name) for name in _RECORDED})
    asked = _Asked.of(text, sides, names, config)
    run = Run(callbacks, work=Path(f"{out}{UNFINISHED}") if out is not None else None)
    measuring = _Measuring(asked, names, config, run)
    rows = sorted((row for one in sides for row in measuring.rows(one)), key=lambda row: _ORDER.index(row.record.name))
    found = Evaluation(
        graft=str(graft) if isinstance(graft, str | Path) else str(graft.folder or "a graft in memory"),
        text=asked.source.name, prompts=len(asked.prompts), too_long=asked.too_long,
        duplicates=asked.source.dropped_duplicates, rows=[row.record for row in rows], answers=asked.said(rows),
        notes=notes, settings=config, seconds=run.seconds, versions=versions(), hardware=hardware(config.device),
    )  # fmt: skip
    if out is not None:
        content = json.dumps(found.model_dump(mode="json"), indent=2, sort_keys=True, ensure_ascii=False)
        write_aside(Path(out), content + "\n", force=config.force)
        shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    return found


def _known(metrics: Sequence[str]) -> list[str]:
    """The metrics, each once.

    Raises:
        PlanError: there is none, or none of that name.
    """
    names = [metrics] if isinstance(metrics, str) else list(dict.fromkeys(metrics))
    for name in names or [""]:
        if name not in METRICS and name != NLL:
            raise PlanError("no such metric", where="--metric", expected=", ".join([*METRICS, NLL]), found=name or None)
    return names


# ---- who is asked ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Side:
    """A model, the module that is on it, and the rows that they make.

    Attributes:
        handle: the model, described without weights unless it is in memory. loading: how to load it.
        raw: the module. module: its name. template: how the model reads prompts.
        bare, whole: names of the rows without and with the module; None for one that is not wanted.
        settings: what the module's report and the user say about prompts.
    """

    handle: ModelHandle
    loading: Loading
    raw: RawCheckpoint
    module: str
    template: Template
    bare: str | None
    whole: str
    settings: GraftConfig

    @property
    def role(self) -> str:
        """What messages call the model."""
        return "teacher" if self.whole == _TEACHER else "student"

    def loaded(self) -> ModelHandle:
        """The model with weights."""
        return load_model(self.handle.name, self.loading, role=self.role) if self.handle.is_blank else self.handle


def _subject(
    graft: str | Path | Graft, student: str | Path | None, config: EvaluateConfig
) -> tuple[_Side, GraftReport | None]:
    """The graft on its student, or a plain module on its base, which has no report.

    Raises:
        CheckpointError: there is none, or it is no language model's. ModelError: its model cannot be reached.
    """
    given = {name: value for name in _RECORDED if (value := getattr(config, name)) is not None}
    if not isinstance(graft, Graft):
        folder = locate(graft, revision=config.revision, subfolder=config.subfolder, token=config.token)
        raw = _speaking(read_checkpoint(folder), str(graft))
        if not (folder / REPORT).is_file():
            return _plain(raw, str(graft), student, config, GraftConfig(**given)), None
        graft = Graft.from_pretrained(
            graft, student=student, revision=config.revision, subfolder=config.subfolder, token=config.token,
            trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    handle, settings = graft.student, graft.report.settings.model_copy(update=given)
    _speaking(graft.checkpoint.raw, str(graft.folder or "the graft"))
    loading = _loading(config, handle.loading.revision)
    own = settings.format if settings.student_format is None else settings.student_format
    tokenizer = handle.tokenizer or load_tokenizer(handle.name, loading, role="student")
    template = Template.of(
        tokenizer, format=None if own == _CHAT else own, system=settings.system, args=settings.template_args,
        name=handle.name, option="--format" if settings.format else "--student-format",
    )  # fmt: skip
    name = str(graft.folder or "in memory")
    return _Side(handle, loading, graft.raw, name, template, _STUDENT, _GRAFT, settings), graft.report


def _plain(
    raw: RawCheckpoint, name: str, base: str | Path | None, config: EvaluateConfig, settings: GraftConfig
) -> _Side:
    """A module that is no graft, on its base."""
    place = base or raw.base_model
    if place is None:
        raise ModelError("the module's configuration names no base model", where=name, fix="name it with --student")
    return _on_its_base(raw, name, str(place), _loading(config), settings, _BASE, _MODULE)


def _teacher(report: GraftReport, named: str | Path | None, config: EvaluateConfig) -> _Side:
    """The module that was moved, on the model that it comes from.

    Raises:
        CheckpointError, ModelError: one of them cannot be reached.
    """
    settings = report.settings
    given = {name: value for name in _RECORDED if (value := getattr(config, name)) is not None}
    place = {} if config.module else {"revision": settings.revision, "subfolder": settings.subfolder}
    name = config.module or report.module
    raw = _speaking(read_checkpoint(locate(name, token=config.token, **place)), name)
    loading = _loading(config, None if named else settings.teacher_revision)
    bare = _TEACHER_BASE if config.teacher_base else None
    model = str(named or report.teacher.name)
    return _on_its_base(raw, name, model, loading, settings.model_copy(update=given), bare, _TEACHER)


def _on_its_base(  # the module, its model and how they are read; the rest names their rows
    raw: RawCheckpoint,
    name: str,
    model: str,
    loading: Loading,
    settings: GraftConfig,
    bare: str | None,
    whole: str,
) -> _Side:
    if library_version(raw.library) is None:
        raise DependencyError(
            f"{raw.library} is not installed, so the module cannot be asked", where=name,
            fix="pip install 'peft-graft[adapters]'",
        )  # fmt: skip
    role = "teacher" if whole == _TEACHER else "model"
    handle = blank_handle(load_config(model, loading, role=role), model)
    template = Template.of(
        load_tokenizer(model, loading, role=role), format=settings.format, system=settings.system,
        args=settings.template_args, name=model, role=role,
    )  # fmt: skip
    return _Side(handle, loading, raw, name, template, bare, whole, settings)


def _loading(config: EvaluateConfig, revision: str | None = None) -> Loading:
    return Loading(
        revision=revision, token=config.token, trust_remote_code=config.trust_remote_code,
        quantization_config=config.quantization_config, device_map=config.device_map, device=config.device,
        dtype=config.dtype,
    )  # fmt: skip


def _speaking(raw: RawCheckpoint, name: str) -> RawCheckpoint:
    """Refuse what generates no text.

    Raises:
        CheckpointError: it is no module of a causal language model.
    """
    if raw.task is not Task.CAUSAL_LM:
        raise CheckpointError(
            f"evaluate scores generated text, and this is a {raw.task} module", where=name, expected=Task.CAUSAL_LM,
            fix="compare it with `peft-graft study` (docs/studies.md)",
        )  # fmt: skip
    return raw


def _changed(teacher: _Side, report: GraftReport) -> list[str]:
    """A remark, where the module is not the one that was moved."""
    moved, found = report.module_files, teacher.raw.files
    if all(found[name] == digest for name, digest in moved.items() if name in found):
        return []
    return [f"{teacher.module} has changed since it was moved"]


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """Prompts with references. ``too_long``: how many were left out for their length."""

    source: PromptSource
    prompts: Sequence[Prompt]
    too_long: int

    @staticmethod
    def of(text: PromptLike, sides: Sequence[_Side], metrics: Sequence[str], config: EvaluateConfig) -> _Asked:
        """The prompts that every model can read, with an answer.

        Raises:
            TextError: there are none, or some have no reference.
            GraftError: a metric cannot score these references, or its library is not installed.
        """
        source = PromptSource.of(text, config.columns, config.seed)
        if source is None:
            raise TextError(
                "the text holds no prompts", where=str(text) if isinstance(text, str | Path) else "given in memory",
                expected="rows with a prompt and its answer, in a file, a hub data set or a list",
                fix="name the columns with --columns prompt,answer",
            )  # fmt: skip
        found, too_long = list[Prompt](), 0
        for prompt in source.prompts():
            if len(found) == config.limit:
                break
            if all(_fits(prompt, side, metrics, config) for side in sides):
                found.append(prompt)
            else:
                too_long += 1
        if not found:
            raise TextError(
                "all prompts are longer than the models read, with an answer", where=source.name, found=too_long,
                fix="give shorter prompts, or lower --max-new-tokens",
            )  # fmt: skip
        without = sum(not prompt.references for prompt in found)
        if without:
            raise TextError(
                "prompts without an answer to score by", where=source.name, found=f"{without} of {len(found)}",
                expected="completion, response, answer or references in every row",
                fix="leave those rows out, or name the columns with --columns prompt,answer",
            )  # fmt: skip
        asked = _Asked(source, found, too_long)
        for name in set(metrics) - {NLL}:  # what it cannot score it says now
            score_answers(name, asked.known, asked.references)
        return asked

    @property
    def references(self) -> list[tuple[str, ...]]:
        """The answers that are accepted."""
        return [prompt.references for prompt in self.prompts]

    @property
    def known(self) -> list[str]:
        """The answer to every prompt, the first of several."""
        return [known_answer(prompt) for prompt in self.prompts]

    @property
    def digest(self) -> str:
        """What tells these prompts and their order from any other's."""
        return hashlib.sha256(json.dumps([prompt.key for prompt in self.prompts]).encode()).hexdigest()

    def said(self, rows: Sequence[_Row]) -> list[EvaluatedPrompt]:
        """Every prompt with all answers."""
        return [
            EvaluatedPrompt(
                prompt=prompt.text, references=list(prompt.references),
                answers={row.record.name: row.answers[number].text for row in rows if row.answers},
            )
            for number, prompt in enumerate(self.prompts)
        ]  # fmt: skip


def known_answer(prompt: Prompt) -> str:
    """The answer that came with a prompt, or the first of several; empty where there is none."""
    return prompt.answer if prompt.answer is not None else next(iter(prompt.references), "")


def _fits(prompt: Prompt, side: _Side, metrics: Sequence[str], config: EvaluateConfig) -> bool:
    """Whether a model can read a prompt with the longest answer that is asked for."""
    longest = (config.max_new_tokens or 0) if set(metrics) - {NLL} else 0
    if NLL in metrics:
        longest = max(longest, len(side.template.answer_ids(known_answer(prompt))) + 1)
    return side.raw.virtual_tokens + len(side.template.ids(prompt)) + longest <= longest_text(side.handle)


# ---- what comes of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row with its answers, none where no metric asks for them."""

    record: EvaluatedModel
    answers: Sequence[Answer]


@dataclass(frozen=True)
class _Measuring:
    """Asks models and scores their answers."""

    asked: _Asked
    metrics: Sequence[str]
    config: EvaluateConfig
    run: Run

    def rows(self, side: _Side) -> list[_Row]:
        """A model without and with its module, as far as wanted; its weights are let go of afterwards."""
        with self.run.stage(f"loading the {side.role}"):
            handle, bf16 = side.loaded(), self.config.dtype == "bfloat16"
        found = []
        if side.bare:
            found.append(self._row(side, side.bare, language_model(handle, bf16=bf16), [handle.fingerprint]))
        raw = as_lora(side.raw, handle) if side.raw.needs_conversion else side.raw
        attached = attach(raw, handle, bf16=bf16, speaks=True)
        return [*found, self._row(side, side.whole, attached, [handle.fingerprint, raw.digest])]

    def _row(self, side: _Side, name: str, model: AttachedModel | LanguageModel, key: Sequence[str]) -> _Row:
        answers, scores = list[Answer](), dict[str, Score]()
        if set(self.metrics) - {NLL}:
            answers = self._answers(side, name, model, key)
        for metric in self.metrics:
            if metric == NLL:
                scores |= self._likelihood(side, name, model)
            else:
                scores[metric] = self._score(metric, [answer.text for answer in answers])
        record = EvaluatedModel(
            name=name, model=side.handle.name, module=None if name == side.bare else side.module, scores=scores,
            cut=sum(not answer.ended for answer in answers), empty=sum(not answer.text.strip() for answer in answers),
        )  # fmt: skip
        return _Row(record, answers)

    def _answers(
        self, side: _Side, name: str, model: AttachedModel | LanguageModel, key: Sequence[str]
    ) -> list[Answer]:
        stage, template, config = f"asking the {name}", side.template, self.config
        sampling = Sampling(
            max_new_tokens=side.settings.max_new_tokens, temperature=config.temperature, seed=config.seed
        )
        store = None
        if self.run.work:
            whole = [*key, self.asked.digest, sampling.model_dump(), template.format, template.system, template.args,
                     config.dtype, config.quantization_config]  # fmt: skip
            store = AnswerStore(self.run.work, name.replace(" ", "-"), json.dumps(whole, default=str))
        with self.run.stage(stage):
            return generate_answers(
                model.model, template, self.asked.prompts, sampling, bf16=model.bf16, store=store,
                progress=lambda done, total: self.run.progress(stage, done, total),
            )  # fmt: skip

    def _likelihood(self, side: _Side, name: str, model: AttachedModel | LanguageModel) -> dict[str, Score]:
        stage = f"reading the answers by the {name}"
        with self.run.stage(stage):
            losses = answer_losses(
                model, side.template, self.asked.prompts, self.asked.known,
                lambda done, total: self.run.progress(stage, done, total),
            )  # fmt: skip
        counts = [_counts(loss) for loss in losses]
        scores = {NLL: self._of_counts(counts, lambda sums, count: sums[0] / sums[1])}
        if any(loss.size for loss in losses):
            scores[NLL_BYTE] = self._of_counts(counts, lambda sums, count: sums[0] / max(1.0, sums[2]))
        return scores

    def _score(self, name: str, answers: Sequence[str]) -> Score:
        metric, references = METRICS[name], self.asked.references
        if metric.counts is None or metric.of_sums is None:
            return Score(value=score_answers(name, answers, references))
        return self._of_counts(metric.counts(answers, references), metric.of_sums)

    def _of_counts(self, counts: Sequence[Sequence[float]], of_sums: OfSums) -> Score:
        sums = [sum(column) for column in zip(*counts, strict=True)]
        low, high = interval(counts, of_sums, seed=self.config.seed)
        return Score(value=of_sums(sums, len(counts)), low=low, high=high)


def _counts(loss: AnswerLoss) -> tuple[float, ...]:
    return loss.nats, loss.tokens, loss.size
