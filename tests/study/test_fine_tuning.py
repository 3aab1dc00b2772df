"""Fine-tuning: interrupted and resumed, the best epoch kept, and scores of batches of any size."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import tiny
from peft_graft.labelled.examples import TaggedSentence
from peft_graft.models.tasks import Task
from peft_graft.study.ner import IGNORED
from peft_graft.study.tasks import StudyTask, ner_task
from peft_graft.study.training import TrainingSettings, Validation, collate, fine_tune, score

pytestmark = pytest.mark.skipif(importlib.util.find_spec("seqeval") is None, reason="the extra study is not installed")
SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=4, batch_size=8, accumulation=2)


def examples(count: int, seed: int) -> list[TaggedSentence]:
    rows = [tuple(line.rstrip(".").split()) for line in tiny.sentences(count, seed=seed)]
    return [TaggedSentence(row, tuple("B-PER" if tiny.WORDS.index(w) < 15 else "O" for w in row)) for row in rows]


class Setting:
    """A student, its rows and its validation set."""

    def __init__(self, world: Path, validation_task: StudyTask | None = None) -> None:
        train, held_out = examples(60, 1), examples(20, 2)
        self.task = ner_task(train)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(world / "shallow")
        torch.manual_seed(1)
        base = transformers.AutoConfig.from_pretrained(world / "shallow")
        base.hidden_dropout_prob = 0.2
        self.model = transformers.AutoModelForTokenClassification.from_pretrained(world / "shallow", config=base)
        self.rows = self.task.encode(train, self.tokenizer)
        held = self.task.encode(held_out, self.tokenizer)
        self.validation = Validation(held, validation_task or self.task, self.tokenizer)

    def run(self, settings: TrainingSettings = SETTINGS, **options) -> list[tuple[int, float]]:
        return fine_tune(self.model, self.rows, self.tokenizer, settings, self.validation, **options).curve


class Interrupted(StudyTask):
    """A task whose second scoring is interrupted."""

    scored = 0

    def score(self, logits, targets) -> float:
        type(self).scored += 1
        if type(self).scored == 2:
            raise KeyboardInterrupt
        return super().score(logits, targets)


def test_an_interrupted_fine_tuning_goes_on_to_the_same_result(world, tmp_path) -> None:
    whole = Setting(world)
    curve = whole.run()
    assert [step for step, _ in curve] == [4, 8, 12, 16]
    task = whole.task
    with pytest.raises(KeyboardInterrupt):
        Setting(world, Interrupted(task.name, task.kind, task.labels, task.metric)).run(folder=tmp_path / "state")
    resumed = Setting(world)
    assert resumed.run(folder=tmp_path / "state") == curve
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_best_epoch_is_kept_and_patience_ends_the_training(world) -> None:
    setting = Setting(world)
    curve = setting.run(TrainingSettings(learning_rate=3e-3, epochs=30, batch_size=8, patience=2))
    scores = [found for _, found in curve]
    assert len(scores) < 30
    assert scores.index(max(scores)) == len(scores) - 3
    assert score(setting.model, setting.validation.rows, setting.tokenizer, setting.task) == max(scores)


def test_a_score_does_not_depend_on_how_rows_are_batched(world) -> None:
    setting = Setting(world)
    torch.nn.init.normal_(setting.model.classifier.weight)  # which says this here and that there
    setting.model.eval()
    width = max(len(row["input_ids"]) for row in setting.rows)
    logits, targets = np.zeros((len(setting.rows), width, len(setting.task.labels))), np.full((60, width), IGNORED)
    for number, row in enumerate(setting.rows):
        batch = collate(setting.tokenizer, [row])
        targets[number, : len(row["labels"])] = batch.pop("labels")[0]
        with torch.no_grad():
            logits[number, : len(row["labels"])] = setting.model(**batch).logits[0]
    assert setting.task.kind == Task.TOKEN_CLASSIFICATION
    expected = setting.task.score(logits, targets)
    assert expected > 0.1
    assert score(setting.model, setting.rows, setting.tokenizer, setting.task) == pytest.approx(expected)


def test_trackers_are_told_of_losses_and_scores(world, monkeypatch) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    told: list[dict] = []

    class Tracker(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "tensorboard", False, None

        def __init__(self, run_name: str, **options) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict) -> None:
            told.append(values)

        def log(self, values: dict, step: int | None = None, **options) -> None:
            told.append({"step": step, **values})

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    setting = Setting(world)
    setting.run(TrainingSettings(epochs=1, batch_size=30, report_to=("tensorboard",)))
    assert told[0]["batch_size"] == 30
    assert [sorted(entry) for entry in told[1:]] == [["loss", "step"], ["score", "step"], ["loss", "step"]]
