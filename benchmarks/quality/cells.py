"""The pairs, tasks and splits of the quality benchmark, and the teachers' modules."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import transformers

from peft_graft.experiments.comparison import load_module, new_module, save_module
from peft_graft.experiments.ner import read_parquet
from peft_graft.experiments.tasks import ner_task, pair_task, read_pairs, sample_of
from peft_graft.experiments.training import TrainingSettings, fine_tune, score
from peft_graft.report import hardware, versions
from peft_graft.weights import read_json, write_json, written_aside

L6, L3, E5 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "multilingual-e5-small"
E5_6L, MPNET = "multilingual-e5-small-6L", "all-mpnet-base-v2"
#: pair -> teacher, student
PAIRS = {
    "L6-L3": (L6, L3),
    "E5-L6": (E5, L6),
    "L6-E5": (L6, E5),
    "E5-E56L": (E5, E5_6L),
    "mpnet-L6": (MPNET, L6),
}
#: task -> folder of the data
TASKS = {"ner": "wikineural/en", "sick": "sick/en", "mrpc": "mrpc/en", "xnli": "xnli/en"}
HELD_OUT, TEST = 500, 1000
TEACHER = TrainingSettings(learning_rate=2e-3, epochs=3, batch_size=16, bf16=True)


@dataclass(frozen=True)
class Data:
    """One task's examples.

    ``train``: what teachers learn from and students' labels are drawn from. ``held_out``: for tuning, never trained on.
    ``test``: the first rows of the test file, never tuned on.
    """

    name: str
    folder: Path

    @cached_property
    def _rows(self):
        read = read_parquet if self.name == "ner" else read_pairs
        train, test = read(self.folder / "train.parquet"), read(self.folder / "test.parquet")
        random.Random(0).shuffle(train)
        return train, test

    @property
    def held_out(self):
        return self._rows[0][:HELD_OUT]

    @property
    def train(self):
        return self._rows[0][HELD_OUT : HELD_OUT + 5000]

    @property
    def test(self):
        return self._rows[1][:TEST]

    @cached_property
    def task(self):
        return ner_task(self.train) if self.name == "ner" else pair_task(self.name, self.train)

    def text(self, seed: int):
        """The training sentences without labels, in an order of their own for every seed."""
        samples = [sample_of(example) for example in self.train]
        random.Random(seed).shuffle(samples)
        return samples


def teacher(out: Path, models: Path, model: str, data: Data):
    """The teacher's trained module: its folder and its record, trained when it is not there yet."""
    folder = out / "teachers" / f"{model}-{data.name}"
    record = folder.with_suffix(".json")
    if record.exists():
        return folder, read_json(record)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / model)
    module = new_module(models / model, "peft", data.task, 0)
    seconds = fine_tune(module, data.task.encode(data.train, tokenizer), tokenizer, TEACHER)
    scores = {
        name: score(module, data.task.encode(rows, tokenizer), tokenizer, data.task)
        for name, rows in (("test", data.test), ("held_out", data.held_out))
    }
    with written_aside(folder, force=True) as staging:
        save_module(module, staging, "peft", data.task)
    found = {
        "model": model, "task": data.name, **scores, "majority": data.task.majority_score(data.test),
        "examples": len(data.train), "seconds": round(seconds, 1), "settings": TEACHER.model_dump(),
        "versions": versions(), "hardware": hardware("cpu"),
    }  # fmt: skip
    write_json(record, found)
    return folder, found


def loaded_teacher(models: Path, model: str, folder: Path, data: Data):
    """The teacher with its module, and its tokenizer."""
    return (
        load_module(models / model, folder, "peft", data.task).eval(),
        transformers.AutoTokenizer.from_pretrained(models / model),
    )
