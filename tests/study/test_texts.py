"""What grafts are worth by the number of unlabelled texts: the cells of a grid, and the tables of records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from peft_graft.errors import StudyError, TextError
from peft_graft.study.cells import GraftCell, StudentCell
from peft_graft.study.controls import ControlCell
from peft_graft.study.data import read_unlabelled
from peft_graft.study.grids import cells_of
from peft_graft.study.read_study import read_study
from peft_graft.study.tables import controls_of, texts_of, without_texts
from peft_graft.study.texts import ahead_from, texts

BENCHMARK = Path(__file__).parent.parent.parent / "benchmarks" / "texts.toml"


def test_each_number_of_texts_is_a_start_with_controls_of_its_own() -> None:
    cells = cells_of(read_study(BENCHMARK, ["grid.0.texts=[50, 100]", "grid.1.texts=[50, 100]", "defaults.seeds=[0]"]))
    made = {cell.names.start: cell for cell in cells.values() if isinstance(cell, GraftCell | ControlCell)}
    untrained = "control: untrained module, head fitted, polish 200"
    assert list(made) == [
        "default, polish 200, 50 texts", "default, polish 200, 100 texts", f"{untrained}, 50 texts",
        f"{untrained}, 100 texts",
        "control: head alone, 50 texts", "control: head alone, 100 texts",
    ]  # fmt: skip
    assert [cell.config.examples.spec.unlabelled_examples for cell in made.values()] == [50, 100] * 3
    students = [cell for cell in cells.values() if isinstance(cell, StudentCell)]
    assert {cell.config.examples.spec.unlabelled_examples for cell in students} == {None}, "their labels are the task's"


def test_tasks_that_say_nothing_of_unlabelled_texts_keep_the_ids_of_their_cells() -> None:
    spec = read_study(BENCHMARK).tasks["ner"]
    assert "unlabelled_examples" not in spec.model_dump(mode="json")
    more = spec.model_copy(update={"unlabelled_examples": 50})
    assert more.model_dump(mode="json")["unlabelled_examples"] == 50
    assert type(spec).model_validate(more.model_dump(mode="json")) == more


def test_texts_come_after_what_the_teacher_learned_from(tmp_path: Path) -> None:
    """And none of them is one that it saw."""
    rows = [{"text": f"text {number % 9}", "label": str(number % 2)} for number in range(40)]
    pd.DataFrame(rows).to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    changes = [f"tasks.sick.train={tmp_path / 'train.jsonl'}", "tasks.sick.validation_examples=2"]
    spec = read_study(BENCHMARK, [*changes, "tasks.sick.train_examples=5"]).tasks["sick"]
    seen = {example.texts for example in read_unlabelled(spec, "en")}
    found = read_unlabelled(spec.model_copy(update={"unlabelled_examples": 7}), "en")
    assert len(found) == 7
    assert not seen & {example.texts for example in found}
    everything = spec.model_copy(update={"train_examples": 38, "unlabelled_examples": 7})
    with pytest.raises(TextError, match="there are no texts beyond the training examples"):
        read_unlabelled(everything, "en")


def test_texts_without_training_examples_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(BENCHMARK.read_text().replace("train_examples = 2500\n", ""))
    with pytest.raises(StudyError, match="grid 1: texts come after the train_examples of sick, so give these too"):
        read_study(file)


def test_controls_stand_beside_grafts_of_as_many_texts() -> None:
    polish: dict[str, int | str] = dict.fromkeys(["default, 50 texts", "control: random module, 50 texts"], 5)
    names = [*polish, "control: random module, 100 texts", "control: head alone, 50 texts", "control: head alone"]
    polish["control: random module, 100 texts"] = 5
    assert controls_of("default, 50 texts", names, polish) == [names[1], "control: head alone, 50 texts"]
    assert (texts_of(names[0]), without_texts(names[0])) == (50, "default")
    assert texts_of("default") is None


# ---- tables ----------------------------------------------------------------------------------------------------------

NAMES = {"teacher": "A", "student": "B", "module": "lora", "task": "ner", "language": "en"}


def student(start: str, seed: int, score: float, budget: int = 0) -> dict[str, Any]:
    names = {**NAMES, "start": start, "seed": seed, "budget": budget}
    if start == "fresh":
        del names["teacher"]
    return {"kind": "student", "id": f"{start} {seed} {budget}", "names": names, "needs": {},
            "result": {"metric": "f1", "score": score}}  # fmt: skip


def test_a_row_for_each_number_and_from_how_many_on_labels_are_beaten() -> None:
    scores = {50: (0.3, 0.4), 100: (0.5, 0.6), 1600: (0.7, 0.8)}
    records = [student(f"default, polish 9, {n} texts", s, v[s]) for n, v in scores.items() for s in (0, 1)]
    records += [student(f"control: head alone, {n} texts", 0, 0.2) for n in scores]
    records += [student("fresh", seed, 0.45, 100) for seed in (0, 1)] + [student("fresh", 0, 0.9, 1000)]
    records.append({"kind": "teacher", "id": "t", "names": {**NAMES, "seed": 0}, "result": {"score": 0.95}})
    assert texts(records) == [
        "", "### A → B, ner", "",
        "| texts | default | head alone |",
        "|---|---|---|",
        "| 50 | 0.350 ± 0.071 (2) | 0.200 (1) |",
        "| 100 | 0.550 ± 0.071 (2) | 0.200 (1) |",
        "| 1,600 | 0.750 ± 0.071 (2) | 0.200 (1) |",
        "",
        "- teacher: 0.950",
        "- fresh module, 100 labels: 0.450 ± 0.000 (2); the graft is ahead from 100 texts on",
        "- fresh module, 1,000 labels: 0.900 (1); the graft is never ahead",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({50: [2, 0], 100: [2, 2]}, 100),  # in every seed
        ({50: [2, 2], 100: [0, 0], 200: [2, 2]}, 200),  # and it stays ahead
        ({50: [1, 1]}, None),  # level is not ahead
        ({50: [2, 2], 100: [2, 2]}, 50),
    ],
)
def test_ahead_is_ahead_in_every_seed_from_there_on(scores: dict[int, list[float]], expected: int | None) -> None:
    assert ahead_from({number: pd.Series(values) for number, values in scores.items()}, pd.Series([1, 1])) == expected
