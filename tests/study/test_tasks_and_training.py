"""Tasks and training around a transfer."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value

import tiny
from peft_graft.errors import TextError
from peft_graft.labelled.examples import LabelledPair, TaggedSentence, read_examples
from peft_graft.models.tasks import Task
from peft_graft.study.ner import IGNORED
from peft_graft.study.tasks import StudyTask, ner_task

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("seqeval") is None,
    reason="the extra demo is not installed",
)
SENTENCES = [
    TaggedSentence(("Maria", "river", "Lisbon"), ("B-PER", "O", "B-LOC")),
    TaggedSentence(("winter", "Okafor"), ("O", "B-PER")),
]
PAIRS = [LabelledPair("river mountain", "harbour", "no"), LabelledPair("engine", "letter", "yes"),
         LabelledPair("engine", "green", "yes")]  # fmt: skip
NLI = StudyTask("nli", Task.SEQUENCE_CLASSIFICATION, ("no", "yes"), "accuracy")


def test_tokens_are_labelled_at_the_first_piece_of_a_word(world) -> None:
    task = ner_task(SENTENCES)
    assert task.labels == ("O", "B-LOC", "B-PER")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    (row, _) = task.encode(SENTENCES, tokenizer)
    assert [label for label in row["labels"] if label != IGNORED] == [2, 0, 1]
    logits = np.full((1, len(row["labels"]), 3), -1.0)
    for place, label in enumerate(row["labels"]):
        logits[0, place, label if label != IGNORED else 0] = 1
    assert task.score(logits, np.array([row["labels"]])) == 1
    assert task.majority_score(SENTENCES) == 0


def test_pairs_are_encoded_together_and_scored_by_accuracy(world) -> None:
    task = NLI
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    rows = task.encode(PAIRS, tokenizer)
    assert [row["labels"] for row in rows] == [0, 1, 1]
    assert rows[0]["input_ids"].count(tokenizer.sep_token_id) == 2
    assert task.score(np.array([[1.0, 0], [1, 0], [0, 1]]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    assert task.majority_score(PAIRS) == pytest.approx(2 / 3)


def test_pairs_are_read_with_names_or_numbers_as_labels(tmp_path) -> None:
    columns = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [1, 0]}
    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["x", "y"])}
    )
    Dataset.from_dict(columns, features).to_parquet(tmp_path / "named.parquet")
    Dataset.from_dict(columns).to_parquet(tmp_path / "numbered.parquet")
    kind = "sequence-classification"

    def labels(name: str, **options) -> list[str]:
        return [example.label for example in read_examples(str(tmp_path / name), kind, **options)]

    assert labels("named.parquet") == ["y", "x"]
    assert labels("numbered.parquet") == ["1", "0"]
    assert labels("numbered.parquet", labels=("no", "yes")) == ["yes", "no"]
    with pytest.raises(TextError, match="a label has no name; expected 0 to 0, found 1"):
        labels("numbered.parquet", labels=("no",))
    (single,) = read_examples(str(tmp_path / "numbered.parquet"), kind, columns=("premise",))[:1]
    assert (single.first, single.second) == ("a", None)
    Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(TextError, match="columns are missing; expected text, label, found text"):
        labels("other.parquet")


def test_tags_are_read_with_names_or_numbers(tmp_path) -> None:
    Dataset.from_dict({"tokens": [["a", "b"], []], "ner_tags": [[1, 0], []]}).to_parquet(tmp_path / "n.parquet")
    (found,) = read_examples(str(tmp_path / "n.parquet"), "token-classification", labels=("O", "B-PER"))
    assert found == TaggedSentence(("a", "b"), ("B-PER", "O"))


@pytest.mark.parametrize("kind", ["words", "samples"])
def test_the_teachers_answers_stand_where_the_student_is_asked(world, kind: str) -> None:
    from peft_graft.study.training import with_teacher_answers

    task, examples = (ner_task(SENTENCES), SENTENCES) if kind == "words" else (NLI, PAIRS)
    teacher = tiny.task_model(world / "teacher", task.kind, task.labels)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(world / name) for name in ("teacher", "narrow")]
    rows = [task.encode(examples, tokenizer) for tokenizer in tokenizers]
    found = with_teacher_answers(rows[1], teacher, rows[0], tokenizers[0])
    for row, mine, original in zip(rows[0], found, rows[1], strict=True):
        inputs = {key: torch.tensor([value]) for key, value in row.items() if key not in ("labels", "words")}
        with torch.inference_mode():
            expected = teacher(**inputs).logits[0].softmax(-1)
        assert mine["labels"] == original["labels"]
        if kind == "words":
            expected = expected[torch.tensor(row["labels"]) != IGNORED]
            given = [answer for answer in mine["teacher"] if not math.isnan(answer[0])]
            places = [not math.isnan(answer[0]) for answer in mine["teacher"]]
            assert places == [label != IGNORED for label in original["labels"]]
        else:
            given = mine["teacher"]
        torch.testing.assert_close(torch.tensor(given), expected, atol=1e-5, rtol=1e-4)
    silent = with_teacher_answers(rows[1], teacher, rows[0], tokenizers[0], keep_labels=False)
    assert all(label == IGNORED for row in silent for label in np.atleast_1d(row["labels"]))


def test_a_word_that_one_tokenizer_does_not_see_shifts_no_answers(tmp_path) -> None:
    from peft_graft.study.training import with_teacher_answers

    tokenizers = [tiny.tokenizer(tmp_path / kind, kind=kind) for kind in ("wordpiece", "unigram")]
    sentences = [TaggedSentence(("\u200e", "river", "mountain"), ("O", "B-PER", "B-LOC"))]
    task = ner_task(sentences)
    rows = [task.encode(sentences, tokenizer) for tokenizer in tokenizers]
    assert [row["words"] for (row,) in rows] == [[1, 2], [0, 1, 2]], "BERT's normaliser drops the mark"

    class Right(torch.nn.Module):
        """Says the right tag wherever it is asked."""

        def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
            labels = torch.tensor([row["labels"] for row in rows[0]])
            return SimpleNamespace(logits=20 * torch.nn.functional.one_hot(labels.clamp_min(0), 3).float())

    (found,) = with_teacher_answers(rows[1], Right(), rows[0], tokenizers[0])
    said = {
        label: max(range(3), key=answer.__getitem__)
        for label, answer in zip(found["labels"], found["teacher"], strict=True)
        if not math.isnan(answer[0])
    }
    assert said == {1: 1, 2: 2}, "each tag at its own word, and none at the word that the teacher does not see"


@pytest.mark.parametrize("kind", ["words", "samples"])
def test_distilling_needs_no_label(world, kind: str) -> None:
    from peft_graft.study.training import TrainingSettings, fine_tune, with_teacher_answers

    task, examples = (ner_task(SENTENCES), SENTENCES) if kind == "words" else (NLI, PAIRS)
    teacher = tiny.task_model(world / "teacher", task.kind, task.labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    encoded = task.encode(examples * 8, tokenizer)
    rows = with_teacher_answers(encoded, teacher, encoded, tokenizer, keep_labels=False)
    torch.manual_seed(3)
    student = tiny.task_model(world / "shallow", task.kind, task.labels)

    def distance() -> float:
        answers = with_teacher_answers(encoded, student, encoded, tokenizer)
        both = [np.array([row["teacher"] for row in side]) if kind == "samples" else
                np.concatenate([row["teacher"] for row in side]) for side in (rows, answers)]  # fmt: skip
        return float(np.nanmean(np.abs(both[0] - both[1])))

    before = distance()
    settings = TrainingSettings(learning_rate=3e-3, epochs=6, batch_size=8, distillation=1.0)
    fine_tune(student, rows, tokenizer, settings)
    assert distance() < before / 2


def test_training_in_bfloat16_on_a_processor_takes_no_fused_attention(world) -> None:
    """Its gradients take longer there than all the rest of a step."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from peft_graft.study.training import TrainingSettings, fine_tune, score

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

        def fused(self) -> bool:
            return any("flash_attention" in name for name in self.names)

    task = NLI
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "teacher")
    rows = task.encode(PAIRS, tokenizer)
    for bf16 in (True, False):
        student = tiny.task_model(world / "shallow", task.kind, task.labels)
        with Seen() as seen:
            fine_tune(student, rows, tokenizer, TrainingSettings(epochs=1, bf16=bf16))
        assert seen.names
        assert seen.fused() is not bf16
    with Seen() as seen:
        score(student, rows, tokenizer, task)
    assert seen.fused()
