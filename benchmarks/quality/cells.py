"""The pairs, tasks and splits of the quality benchmark, and the teachers' modules."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import transformers

from peft_graft.environment import hardware, versions
from peft_graft.files import read_json, write_json, written_aside
from peft_graft.models.tasks import Task
from peft_graft.study.comparison import Library, new_module, save_module
from peft_graft.study.examples import read_examples
from peft_graft.study.tasks import ner_task, pair_task, sample_of
from peft_graft.study.training import TrainingSettings, fine_tune, score

L6, L3, E5 = "all-MiniLM-L6-v2", "paraphrase-MiniLM-L3-v2", "multilingual-e5-small"
E5_6L, MPNET = "multilingual-e5-small-6L", "all-mpnet-base-v2"


class Pair(NamedTuple):
    """Two models and the library of the module that moves: LoRA of peft, or a Pfeiffer adapter of adapters."""

    teacher: str
    student: str
    library: Library = "peft"

    @property
    def mark(self) -> str:
        """What tells files of one library from those of the other."""
        return "" if self.library == "peft" else "-pfeiffer"


PAIRS = {
    "L6-L3": Pair(L6, L3),
    "E5-L6": Pair(E5, L6),
    "L6-E5": Pair(L6, E5),
    "E5-E56L": Pair(E5, E5_6L),
    "mpnet-L6": Pair(MPNET, L6),
    "E5-L6-pfeiffer": Pair(E5, L6, "adapterhub"),
}
#: task -> folder of the data
TASKS = {"ner": "wikineural/en", "sick": "sick/en", "mrpc": "mrpc/en", "xnli": "xnli/en"}
HELD_OUT, TEST = 500, 1000
TEACHER = TrainingSettings(learning_rate=2e-3, epochs=3, batch_size=16, bf16=True)
#: Models that learn nothing at that rate (held-out score 0).
RATE_OF_TEACHER = {MPNET: 5e-4}


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
        kind = Task.TOKEN_CLASSIFICATION if self.name == "ner" else Task.SEQUENCE_CLASSIFICATION
        train, test = (read_examples(str(self.folder / f"{part}.parquet"), kind) for part in ("train", "test"))
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


def teacher(out: Path, models: Path, pair: Pair, data: Data):
    """The teacher's trained module: its folder and its record, trained when it is not there yet."""
    folder = out / "teachers" / f"{pair.teacher}-{data.name}{pair.mark}"
    record = Path(f"{folder}.json")
    if record.exists():
        return folder, read_json(record)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / pair.teacher)
    module = new_module(models / pair.teacher, pair.library, data.task, 0)
    settings = TEACHER.model_copy(update={"learning_rate": RATE_OF_TEACHER.get(pair.teacher, TEACHER.learning_rate)})
    seconds = fine_tune(module, data.task.encode(data.train, tokenizer), tokenizer, settings)
    scores = {
        name: score(module, data.task.encode(rows, tokenizer), tokenizer, data.task)
        for name, rows in (("test", data.test), ("held_out", data.held_out))
    }
    with written_aside(folder, force=True) as staging:
        save_module(module, staging, pair.library, data.task)
    found = {
        "model": pair.teacher, "library": pair.library, "task": data.name, **scores,
        "majority": data.task.majority_score(data.test), "examples": len(data.train), "seconds": round(seconds, 1),
        "settings": settings.model_dump(), "versions": versions(), "hardware": hardware("cpu"),
    }  # fmt: skip
    write_json(record, found)
    return folder, found
