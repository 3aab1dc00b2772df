"""The cells of a study: what can be done on its own, what each needs, and how it is done.

    teacher    train the teacher's module                      -> a checkpoint
    alignment  align two models on one task's text             -> an alignment, shared by modules of the same roles
    graft      move a teacher's module to a student            -> a checkpoint
    polish     polish a fresh module on the teacher's answers  -> a checkpoint
    rate       choose a learning rate for the fresh module     -> the rate
    student    fine-tune and score one student                 -> scores

``controls`` has those that grafts are compared with, and ``chains`` an alignment put together of two.

What several comparisons share is one cell.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from peft_graft._align import align
from peft_graft._transfer import transfer
from peft_graft.config import AlignConfig, GraftConfig
from peft_graft.files import read_json
from peft_graft.outputs import written_aside
from peft_graft.run import Callback, Run
from peft_graft.study.cell import Cell, Config, load_plugins, unlabelled_text
from peft_graft.study.folder import StudyFolder
from peft_graft.study.fresh_polish import polish_fresh_module
from peft_graft.study.generation import GenerationTask
from peft_graft.study.modules import load_module, new_module, save_module
from peft_graft.study.plugins import Plugin
from peft_graft.study.spec import Budget, ModuleSpec
from peft_graft.study.tasks import Example, StudyTask
from peft_graft.study.training import TrainingSettings, Validation, fine_tune, score, with_teacher_answers

#: Seed of the examples and the module on which learning rates are tried, which no student has.
_RATE_SEED = 10_000
#: Examples on which a rate is chosen where a budget has all.
_RATE_EXAMPLES = 1000


# ---- teachers --------------------------------------------------------------------------------------------------------


class TeacherConfig(Config):
    """``model``: folder or hub id. ``keep_best``: see ``spec.Training``."""

    model: str
    module: ModuleSpec
    training: TrainingSettings
    keep_best: bool = True


class TeacherCell(Cell):
    """Train the teacher's module; it leaves a checkpoint."""

    kind = "teacher"
    config: TeacherConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train, score and write the module."""
        config = self.config
        task, train, validation, test = config.examples.read()
        library, settings = config.module.library, config.training
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        model = self.untrained(task)
        scored = _validation(task, validation, tokenizer, settings, keep_best=config.keep_best)
        state = folder.work(self.id) / "training"
        tuned = fine_tune(model, task.encode(train, tokenizer), tokenizer, settings, scored, folder=state)
        found = score(model, task.questions(test, tokenizer), tokenizer, task)
        with written_aside(folder.artifact(self.id), force=True) as staging:
            save_module(model, staging, library, task)
        return {
            "score": found,
            "metric": task.metric,
            "majority": task.majority_score(test),
            "curve": tuned.curve,
            "examples": len(train),
            "validation_examples": len(validation),
            "test_examples": len(test),
            "training_seconds": round(tuned.seconds, 1),
        }

    def untrained(self, task: StudyTask) -> Any:
        """What is trained."""
        config = self.config
        return new_module(config.model, config.module.library, task, config.training.seed, config.module.config)


# ---- alignments ------------------------------------------------------------------------------------------------------


class TwoModelsConfig(Config):
    """``plugins``: of the study where the method is not built in."""

    teacher: str
    student: str
    plugins: tuple[Plugin, ...] = ()

    def hashed_with(self, **options: dict[str, Any]) -> dict[str, Any]:
        """As it enters the id: of the options what decides the result, of the plugins their content."""
        contents = [plugin.sha256 for plugin in self.plugins]
        return {**self.model_dump(mode="json", exclude={*options, "plugins"}), **options, "plugins": contents}


class AlignmentConfig(TwoModelsConfig):
    """``align``: the options of ``peft_graft.align``."""

    align: AlignConfig

    def hashed(self) -> dict[str, Any]:
        """See ``TwoModelsConfig``."""
        return self.hashed_with(align=self.align.record())


class AlignmentCell(Cell):
    """Align two models on a task's training text, without its labels; it leaves an alignment."""

    kind = "alignment"
    config: AlignmentConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Align and write."""
        config = self.config
        load_plugins(config.plugins)
        with unlabelled_text(config.examples, folder.work(self.id)) as text:
            found = align(
                config.teacher,
                config.student,
                text=text,
                out=folder.artifact(self.id),
                config=config.align.model_copy(update={"force": True}),
                callbacks=callbacks,
            )
        return {"spaces": len(found.maps)}


# ---- grafts ----------------------------------------------------------------------------------------------------------


class TransferConfig(TwoModelsConfig):
    """``transfer``: the options of ``peft_graft.transfer``."""

    transfer: GraftConfig

    def hashed(self) -> dict[str, Any]:
        """See ``TwoModelsConfig``; with the steps that ``auto`` stands for."""
        return self.hashed_with(transfer={**self.transfer.record(), "polish": self.transfer.polish_steps})


class GraftCell(Cell):
    """Move a teacher's module; it leaves a checkpoint with its report."""

    kind = "graft"
    version = 3  # text is split by what differs, and what judges chooses nothing
    config: TransferConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Transfer and write; an interrupted polish goes on."""
        load_plugins(self.config.plugins)
        kept, artifact = folder.work(self.id) / "graft", folder.artifact(self.id)
        with unlabelled_text(self.config.examples, folder.work(self.id)) as text:
            if not (kept / "graft.json").exists():  # else an interruption came between writing it and its result
                self.transferred(folder, text, kept, callbacks)
        report = read_json(kept / "graft.json")
        if not artifact.exists():
            artifact.parent.mkdir(parents=True, exist_ok=True)
            kept.rename(artifact)
        return {
            key: report[key]
            for key in ("method", "method_reason", "verdict", "tried", "polish", "layers", "notes", "seconds")
        } | {"head": report["head"]["how"] if report["head"] else None}

    def transferred(self, folder: StudyFolder, text: Path, out: Path, callbacks: Sequence[Callback]) -> None:
        """Transfer, into a folder of its own."""
        config, needs = self.config, self.needs
        assert needs.teacher is not None
        transfer(
            folder.artifact(needs.teacher),
            teacher=config.teacher,
            student=config.student,
            text=text,
            alignment=folder.artifact(needs.alignment) if needs.alignment else None,
            out=out,
            config=self.options(folder).model_copy(update={"force": True}),
            callbacks=callbacks,
        )

    def options(self, folder: StudyFolder) -> GraftConfig:
        """Those of the transfer, some of which may be known only now."""
        return self.config.transfer


class FreshPolishConfig(TransferConfig):
    """``module``: the fresh module's."""

    module: ModuleSpec


class FreshPolishCell(Cell):
    """Polish the student's own untrained module on the teacher's answers; it leaves a checkpoint."""

    kind = "polish"
    version = 3
    config: FreshPolishConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Polish and write; an interrupted polish goes on."""
        config, work = self.config, folder.work(self.id)
        assert self.needs.teacher is not None
        fresh = self.fresh_module(folder)
        with unlabelled_text(config.examples, work) as text:
            return polish_fresh_module(
                (folder.artifact(self.needs.teacher), fresh),
                (config.teacher, config.student),
                text,
                folder.artifact(self.id),
                config.transfer,
                Run(callbacks, work / "polish"),
            )

    def fresh_module(self, folder: StudyFolder) -> Path:
        """The student's own untrained module, as a checkpoint."""
        config, fresh = self.config, folder.work(self.id) / "fresh"
        if not fresh.exists():
            task = config.examples.read()[0]
            with written_aside(fresh) as staging:
                model = new_module(
                    config.student, config.module.library, task, config.transfer.seed, config.module.config
                )
                save_module(model, staging, config.module.library, task)
        return fresh


# ---- students --------------------------------------------------------------------------------------------------------


class RateConfig(Config):
    """``training``: the fresh module's schedule, whose learning rate is replaced by each of ``rates``."""

    model: str
    module: ModuleSpec
    training: TrainingSettings
    rates: tuple[float, ...]
    budget: Budget


class RateCell(Cell):
    """Choose the learning rate that suits the fresh module best on the validation examples, with labels of its own."""

    kind = "rate"
    config: RateConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Try every rate."""
        config, scores = self.config, dict[float, float]()
        task, train, validation, _ = config.examples.read()
        budget = _RATE_EXAMPLES if config.budget == "all" else config.budget
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        chosen = task.encode(random.Random(_RATE_SEED).sample(train, min(budget, len(train))), tokenizer)
        held_out = task.questions(validation, tokenizer)
        for rate in config.rates:
            model = new_module(config.model, config.module.library, task, _RATE_SEED, config.module.config)
            settings = config.training.model_copy(update={"learning_rate": rate, "seed": _RATE_SEED})
            fine_tune(model, chosen, tokenizer, settings)
            scores[rate] = score(model, held_out, tokenizer, task)
        return {"scores": scores, "rate": max(scores, key=lambda rate: scores[rate])}


class StudentConfig(Config):
    """``share``: of the learning rate. ``teacher``: its model, for a start that goes on distilling."""

    model: str
    module: ModuleSpec
    budget: Budget
    training: TrainingSettings
    share: float = 1.0
    keep_best: bool = True
    teacher: str | None = None


class StudentCell(Cell):
    """Score a student with a fresh module or a graft, fine-tune it and score it again."""

    kind = "student"
    config: StudentConfig

    def run(self, folder: StudyFolder, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Score, fine-tune, score."""
        config, settings = self.config, self.training(folder)
        task, train, validation, test = config.examples.read()
        module, seed = config.module, settings.seed
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
        if self.needs.graft:
            model = load_module(config.model, folder.artifact(self.needs.graft), module.library, task)
        else:
            model = new_module(config.model, module.library, task, seed, module.config)
        rows = task.questions(test, tokenizer)
        before = score(model, rows, tokenizer, task)
        result: dict[str, Any] = {"metric": task.metric, "before": before, "score": before}
        budget = len(train) if config.budget == "all" else min(config.budget, len(train))
        if budget:
            examples = train if budget == len(train) else random.Random(seed).sample(train, budget)
            encoded = task.encode(examples, tokenizer)
            if settings.distillation:
                encoded = with_teacher_answers(encoded, *self._teacher(folder, task, examples))
            scored = _validation(task, validation, tokenizer, settings, keep_best=config.keep_best)
            tuned = fine_tune(model, encoded, tokenizer, settings, scored, folder=folder.work(self.id) / "training")
            result |= {
                "curve": tuned.curve,
                "training_seconds": round(tuned.seconds, 1),
                "training": settings.model_dump(mode="json"),
            }
            result["score"] = score(model, rows, tokenizer, task)
        return {**result, "examples": budget, "test_examples": len(test)}

    def training(self, folder: StudyFolder) -> TrainingSettings:
        """The schedule, with the learning rate that was chosen for this budget."""
        config = self.config
        rate = folder.result(self.needs.rate)["rate"] if self.needs.rate else config.training.learning_rate
        return config.training.model_copy(update={"learning_rate": rate * config.share})

    def _teacher(self, folder: StudyFolder, task: StudyTask, examples: Sequence[Example]) -> tuple[Any, Any, Any]:
        """The teacher's model, the examples as it reads them, and its tokenizer."""
        config = self.config
        assert config.teacher is not None
        assert self.needs.teacher is not None
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.teacher, trust_remote_code=False)
        teacher = load_module(config.teacher, folder.artifact(self.needs.teacher), config.module.library, task)
        return teacher, task.encode(examples, tokenizer), tokenizer


# ---- what they share -------------------------------------------------------------------------------------------------


def _validation(
    task: StudyTask, examples: Sequence[Example], tokenizer: Any, settings: TrainingSettings, *, keep_best: bool
) -> Validation | None:
    """What is scored after every epoch; nothing where answers would be generated for the sake of a curve alone."""
    if isinstance(task, GenerationTask) and not keep_best and settings.patience is None:
        return None
    return Validation(task.questions(examples, tokenizer), task, tokenizer, keep_best=keep_best)
