"""Controls and chains of a study: what they are made of, that they run, and how tables compare with them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import tiny
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.errors import StudyError
from peft_graft.study.cells import StudentCell
from peft_graft.study.controls import write_random
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import cells_of
from peft_graft.study.read_study import read_study
from peft_graft.study.runner import Here, run_study
from peft_graft.study.spec import CONTROL
from peft_graft.study.tables import grid_of, holm, result_tables

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("accelerate", "seqeval", "matplotlib", "psutil")),
    reason="the extra study is not installed",
)

STUDY = """
name = "controls"
max_tokens = 300

[models]
big = "{models}/teacher"
small = "{models}/shallow"

[tasks.names]
kind = "token-classification"
train = "./names.parquet"
test = "./names.parquet"
validation_examples = 10
test_examples = 20

[tasks.ends]
kind = "token-classification"
train = "./ends.parquet"
test = "./ends.parquet"
validation_examples = 10
test_examples = 20

[modules.lora]
config = {{ r = 4, lora_alpha = 8 }}

[training]
teacher = {{ learning_rate = 5e-3, epochs = 1, batch_size = 8 }}

[defaults]
modules = ["lora"]
tasks = ["names"]
budgets = [0]

[[grid]]
teacher = "big"
student = "small"
polish = [4]
methods = ["copy"]
heads = ["carry"]
controls = ["other-task", "random", "untrained", "bare-teacher", "head"]

[[grid]]
teacher = "big"
student = "big"
polish = [0]
methods = ["procrustes"]
heads = ["carry"]
through = ["small"]
"""


@pytest.fixture(scope="module")
def file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("controls")
    rows = [line.rstrip(".").split() for line in tiny.sentences(90, seed=3)]
    for name, kind in (("names", lambda word: tiny.WORDS.index(word) < 15), ("ends", lambda word: word[-1] in "aeiou")):
        tags = [["B-X" if kind(word) else "O" for word in row] for row in rows]
        Dataset.from_dict({"tokens": rows, "ner_tags": tags}).to_parquet(root / f"{name}.parquet")
    (root / "study.toml").write_text(STUDY.format(models=world))
    return root / "study.toml"


def test_controls_and_chains_are_declared_and_change_no_other_cell(file: Path) -> None:
    cells = cells_of(read_study(file))
    kinds = [cell.kind for cell in cells.values()]
    # Of chains: the straight alignment, those of both steps, and one that they make; four grafts, one on the way.
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "teacher": 2, "bare-teacher": 1, "control": 5, "alignment": 3, "chain": 1, "graft": 5, "student": 11,
    }  # fmt: skip
    order = list(cells)
    assert all(order.index(need) < order.index(name) for name, cell in cells.items() for need in cell.needed)
    starts = {cell.names.start: cell for cell in cells.values() if isinstance(cell, StudentCell)}
    assert [start.removeprefix(CONTROL) for start in starts if start.startswith(CONTROL)] == [
        "module of another task, polish 4", "random module, polish 4", "untrained module, head fitted, polish 4",
        "bare teacher, polish 4", "head alone",
    ]  # fmt: skip
    made = {start: cells[cell.needs.graft] for start, cell in starts.items() if cell.needs.graft}
    other = made[f"{CONTROL}module of another task, polish 4"]
    assert cells[other.needs.other].names.task == "ends"
    assert cells[other.needs.teacher].names.task == "names"
    assert cells[made[f"{CONTROL}bare teacher, polish 4"].needs.teacher].kind == "bare-teacher"
    twice = made["procrustes/skip, head carry, polish 0, through small"]
    assert cells[twice.needs.teacher].names.student == "small"
    assert cells[made["procrustes/skip, head carry, polish 0, composed through small"].needs.alignment].kind == "chain"
    published = cells_of(read_study(Path(__file__).parent.parent.parent / "benchmarks" / "controls.toml")).values()
    assert {cell.kind for cell in published} == set(kinds) | {"polish"}
    longer = cells_of(read_study(file, ["grid.0.polish=[4, 8]"]))
    controls = [cell.names.start.removeprefix(CONTROL) for cell in longer.values() if cell.kind == "control"]
    assert len(controls) == 9, "a head alone is one, however long others are polished"
    assert "random module, polish 8" in controls
    plain = cells_of(read_study(file, ["grid.0.controls=[]", "grid.1.through=[]"]))
    assert set(plain) < set(cells)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["grid.0.controls=['luck']"],
            "grid.0.controls.0: Input should be 'other-task', 'random', 'untrained', 'bare-teach",
        ),
        (["tasks.ends.languages=['de']"], "grid 0: the control other-task needs another task in the language of names"),
        (["grid.1.through=['huge']"], "grid 1: unknown model huge; named are big, small"),
    ],
)
def test_controls_that_cannot_be_are_refused(file: Path, changes: list[str], message: str) -> None:
    with pytest.raises(StudyError) as caught:
        read_study(file, changes)
    assert message in str(caught.value)


def test_a_random_module_has_the_norms_of_the_trained_one(world: Path, tmp_path: Path) -> None:
    write_random(world / "lora", tmp_path / "random", str(world / "teacher"), seed=0)
    before, after = (
        load_file(folder / "adapter_model.safetensors") for folder in (world / "lora", tmp_path / "random")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        if "lora" in name:
            assert after[name].norm() == pytest.approx(value.norm())
            assert abs(torch.cosine_similarity(after[name].flatten(), value.flatten(), 0)) < 0.6
        else:
            assert torch.equal(after[name], value), "the head stays"


@pytest.mark.skipif(not tiny.HAS_ADAPTERS, reason="the extra adapters is not installed")
def test_a_random_bottleneck_has_nothing_of_the_trained_one(world: Path, tmp_path: Path) -> None:
    tiny.adapterhub_module(tmp_path / "trained", world / "teacher")
    write_random(tmp_path / "trained", tmp_path / "random", str(world / "teacher"), seed=0)
    trained, drawn = (read_checkpoint(tmp_path / name).parts for name in ("trained", "random"))
    values = [
        (value, drawn[path].tensors[name]) for path, part in trained.items() for name, value in part.tensors.items()
    ]
    assert values
    for value, other in values:
        assert other.norm() == pytest.approx(value.norm())
        assert not torch.equal(other, value)


def test_controls_and_chains_run_and_tables_show_the_best_control(file: Path, tmp_path: Path) -> None:
    study = read_study(file)
    outcome = run_study(study, tmp_path, Here(tmp_path))
    assert not [json.loads(path.read_text())["error"] for path in (tmp_path / "failures").iterdir()]
    assert not outcome.blocked
    folder = StudyFolder(tmp_path)
    records = folder.records(cells_of(study))
    (bare,) = (record["id"] for record in records if record["kind"] == "bare-teacher")
    trained = load_file(folder.artifact(bare) / "adapter_model.safetensors")
    assert not any(value.any() for name, value in trained.items() if "lora_B" in name), "the module is not trained"
    assert any(value.any() for name, value in trained.items() if "classifier" in name)
    by_control = {record["config"]["control"]: record for record in records if record["kind"] == "control"}
    assert by_control["head"]["result"]["polish"] is None
    assert all(by_control[name]["result"]["polish"]["settings"]["steps"] == 4 for name in ("random", "untrained"))
    alone = load_file(folder.artifact(by_control["head"]["id"]) / "adapter_model.safetensors")
    assert not any(value.any() for name, value in alone.items() if "lora_B" in name)
    table = next(table for table in result_tables(records) if table.student == "small")
    header, lines = grid_of(table)
    shown = {line[0]: line[header.index("Δ best control")] for line in lines}
    best = max(row.entries["mean"].score for row in table.rows if row.start.startswith(CONTROL))
    graft = next(row for row in table.rows if row.start == "copy/skip, head carry, polish 4")
    assert shown[graft.start] == f"{100 * (graft.entries['mean'].score - best):+.1f}"
    composed = next(one for one in records if one["kind"] == "graft" and "composed" in one["names"]["start"])
    # Of two layers in the model between, each serves two of the student's.
    assert composed["result"]["layers"] == [[0], [0], [2], [2]]
    assert all(shown[row.start] == "" for row in table.rows if row.start.startswith(CONTROL))


def test_a_corrected_p_stands_beside_each_p() -> None:
    """For all tests of all tables: six languages in which two starts are ahead of the fresh module."""

    def student(start: str, language: str, score: float) -> dict:
        names = {"student": "s", "module": "lora", "task": "ner", "budget": "all", "seed": 0}
        names |= {"start": start, "language": language} | ({} if start == "fresh" else {"teacher": "t"})
        return {"id": "", "kind": "student", "names": names, "result": {"metric": "entity F1", "score": score}}

    scores = {"fresh": 0.5, "a": 0.6, "b": 0.7}
    records = [
        student(start, language, score + 0.001 * number * (start != "fresh"))
        for start, score in scores.items()
        for number, language in enumerate("abcdef")
    ]
    (table,) = result_tables(records)
    assert [(row.p, row.holm) for row in table.rows] == [(None, None), (0.03125, 0.0625), (0.03125, 0.0625)]
    header, lines = grid_of(table)
    assert header[-2:] == ["p", "p (Holm)"]
    assert lines[1][-2:] == ["0.031", "0.062"]


def test_holm_steps_down() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_graft_is_compared_with_the_controls_of_its_own_polish() -> None:
    """And with a fresh module that was polished as long; the largest p of the paired tests is the one that is shown."""

    def student(start: str, seed: int, score: float) -> dict:
        names = {"student": "s", "module": "lora", "task": "ner", "budget": 0, "seed": seed, "language": "en"}
        names |= {"start": start} | ({} if start == "fresh" else {"teacher": "t"})
        needs = {} if start == "fresh" else {"graft": f"graft of {start}"}
        result = {"metric": "entity F1", "score": score}
        return {"id": start, "kind": "student", "names": names, "result": result, "needs": needs}

    scores = {
        "fresh": 0.1, "default, short": 0.6, "default": 0.8, "polish from fresh, short": 0.55,
        "polish from fresh": 0.5, f"{CONTROL}head alone": 0.3,
        f"{CONTROL}random module, short": 0.5, f"{CONTROL}random module": 0.75,
    }  # fmt: skip
    lengths = {start: 9 if start.endswith("short") else "auto" for start in scores}
    grafts = [
        {"id": f"graft of {start}", "kind": "graft", "names": {}, "config": {"transfer": {"polish": length}}}
        for start, length in lengths.items()
    ]
    records = [student(start, seed, score + 0.001 * seed) for start, score in scores.items() for seed in range(6)]
    # One seed in which it is behind the fresh module that was polished.
    records[-1 - 6 * 4 - 0] = student("polish from fresh, short", 5, 0.7)
    (table,) = result_tables([*grafts, *records])
    header, lines = grid_of(table)
    shown = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert shown["default"]["Δ best control"] == "+5.0", "of random module's and not of a shorter polish"
    assert shown["default"]["p (controls)"] == "0.031"
    assert shown["default, short"]["Δ best control"] == "+2.6"
    assert float(shown["default, short"]["p (controls)"]) > 0.05
    assert shown["polish from fresh"]["Δ best control"] == shown[f"{CONTROL}head alone"]["p (controls)"] == ""
