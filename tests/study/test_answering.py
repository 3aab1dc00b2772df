"""Studies of question answering: read, trained, moved, controlled and scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from conftest import needs_adapters
from peft_graft.errors import GraftError
from peft_graft.labelled.examples import AnsweredQuestion
from peft_graft.models.tasks import Task
from peft_graft.study.answering import AnsweringTask
from peft_graft.study.data import read_task, text_file
from peft_graft.study.grids import cells_of
from peft_graft.study.read_study import read_study
from peft_graft.study.runner import Here, run_study
from peft_graft.study.training import collate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TASK = AnsweringTask("names", Task.QUESTION_ANSWERING, (), "token F1")

STUDY = """
name = "answers"

[models]
big = "./big"
small = "./small"

[tasks.names]
kind = "question-answering"
train = "./train.jsonl"
test = "./test.jsonl"
validation_examples = 10

[tasks.twice]
kind = "question-answering"
train = "./train.jsonl"
test = "./test.jsonl"
validation_examples = 10

[modules.lora]
config = {{ r = 8, lora_alpha = 16, target_modules = "all-linear" }}

[modules.adapter]
library = "adapters"
config = {{ name = "seq_bn", bottleneck = 16 }}

[training]
teacher = {{ learning_rate = 1e-2, epochs = 6, batch_size = 24 }}
student = {{ learning_rate = 1e-2, epochs = 1, batch_size = 24 }}
keep_best = false

[[grid]]
teacher = "big"
student = "small"
modules = ["{module}"]
tasks = ["names"]
methods = ["ridge"]
polish = [60]
budgets = [0, 50]
from_fresh = [false, true]
controls = {controls}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tiny.base_model(tmp_path / "big", layers=2, hidden=32)
    tiny.base_model(tmp_path / "small", layers=1, hidden=24, seed=3, tokens="unigram")
    for name, count in (("train", 500), ("test", 60)):
        rows = [
            {"question": asked, "context": text, "answers": {"text": [answer], "answer_start": [text.index(answer)]}}
            for asked, text, answer in tiny.questions(count, seed=len(name))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "study.toml").write_text(STUDY.format(module="lora", controls='["random", "bare-teacher", "head"]'))
    return tmp_path / "study.toml"


def test_answers_are_encoded_by_their_characters(file: Path, tmp_path: Path) -> None:
    task, train, validation, test = read_task("names", read_study(file).tasks["names"], "en")
    assert isinstance(task, AnsweringTask)
    assert (task.metric, task.peft_type, task.majority_score(test)) == ("token F1", "QUESTION_ANS", 0.0)
    assert (len(train), len(validation), len(test)) == (490, 10, 60)
    for tokens in ("wordpiece", "unigram"):
        tokenizer = tiny.tokenizer(tmp_path / tokens, kind=tokens)
        for example, row in zip(test, task.encode(test, tokenizer), strict=True):
            assert isinstance(example, AnsweredQuestion)
            marked = tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
            assert re.sub("[ #▁]", "", marked).lower() == example.answers[0].lower()
    text_file(list(test), tmp_path / "text.jsonl")
    assert [*json.loads((tmp_path / "text.jsonl").read_text().splitlines()[0])] == ["question", "context"]


@pytest.mark.parametrize("starts", [(), (4,), (9,), (400,)])
def test_where_an_answer_stands_is_found_if_it_is_not_where_it_is_said_to_be(starts: tuple[int, ...]) -> None:
    assert AnsweredQuestion("who?", "the orchestra plays", ("orchestra",), starts).place == (4, 13)
    assert AnsweredQuestion("who?", "the orchestra plays", ("a choir",), starts).place is None


def test_what_is_not_there_is_no_answer(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    none = AnsweredQuestion("who?", "the orchestra plays", ())
    cut = AnsweredQuestion("who?", "river " * 500 + "orchestra", ("orchestra",))
    for row in TASK.encode([none, cut], tokenizer):
        assert (row["start_positions"], row["end_positions"]) == (0, 0)
    rows = TASK.questions([none], tokenizer)
    nowhere = torch.zeros(2, len(rows[0]["input_ids"]))
    nowhere[:, 0] = 9
    assert TASK.score_answers([nowhere], rows) == 1.0
    there = nowhere.flip(-1)
    assert TASK.score_answers([there], rows) == 0.0


def test_batches_are_padded_where_answers_stay_in_place(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer(tmp_path)
    tokenizer.padding_side = "left"
    short, long = (AnsweredQuestion("who?", "the river Maria. " * count, ("Maria",)) for count in (1, 90))
    rows = TASK.encode([short, long], tokenizer)
    assert len(rows[1]["input_ids"]) == tokenizer.model_max_length
    batch = collate(tokenizer, rows)
    for ids, first, last in zip(batch["input_ids"], batch["start_positions"], batch["end_positions"], strict=True):
        assert tokenizer.decode(ids[first : last + 1]) == "maria"
    assert tokenizer.padding_side == "left"


def test_a_study_from_teacher_to_table(file: Path, tmp_path: Path) -> None:
    study, out = read_study(file), tmp_path / "out"
    run_study(study, out, Here(out))
    results = {name: json.loads((out / "cells" / f"{name}.json").read_text())["result"] for name in cells_of(study)}

    def score_of(start: str, budget: int) -> float:
        (found,) = [
            result["score"] for name, result in results.items()
            if name.startswith("student-") and start in name and result["examples"] == budget
        ]  # fmt: skip
        return found

    (teacher,) = [result["score"] for name, result in results.items() if name.startswith("teacher-")]
    assert teacher > 0.8
    assert score_of("-ridge", 0) > score_of("-fresh-", 0) + 0.2
    assert score_of("-ridge", 0) > score_of("bare_teacher", 0)
    (graft,) = [result for name, result in results.items() if name.startswith("graft-")]
    assert graft["verdict"]["measured"]["answers"] > 0
    assert graft["head"] in ("carried", "fitted")


@needs_adapters
def test_adapters_are_studied_too(file: Path, tmp_path: Path) -> None:
    file.write_text(STUDY.format(module="adapter", controls="[]").replace("from_fresh = [false, true]", ""))
    study, out = read_study(file), tmp_path / "out"
    run_study(study, out, Here(out))
    results = {name: json.loads((out / "cells" / f"{name}.json").read_text())["result"] for name in cells_of(study)}
    teacher, fresh = (
        next(results[name]["score"] for name in results if part in name) for part in ("teacher-", "-fresh-0")
    )
    assert teacher > fresh + 0.1
    assert any(name.startswith("graft-") for name in results)


def test_labels_and_the_teacher_at_once_are_refused(file: Path) -> None:
    file.write_text(file.read_text() + "distil = [true]\n")
    with pytest.raises(GraftError, match="question answering, which takes no distil"):
        read_study(file)


def test_the_model_of_a_task_marks_answers(file: Path) -> None:
    from peft_graft.config import Library
    from peft_graft.study.modules import new_module

    model = new_module(file.parent / "big", Library.PEFT, TASK, 0)
    assert isinstance(model.base_model.model, transformers.BertForQuestionAnswering)
    assert "qa_outputs" in model.peft_config["default"].modules_to_save
