"""Studies: declared, expanded, run, interrupted, scaled out, and their tables."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from filelock import FileLock, Timeout
from rich.console import Console

import processes
import tiny
from conftest import needs_adapters
from peft_graft.alignment.methods import METHODS
from peft_graft.config import METHOD_SUMMARIES, GraftConfig
from peft_graft.distill.agreement import EXACT
from peft_graft.errors import OutputError, StudyError
from peft_graft.study.cells import StudentCell
from peft_graft.study.command import PAPER, StudyPlan, StudyRun, show_tables
from peft_graft.study.folder import StudyFolder
from peft_graft.study.grids import Start, cells_of
from peft_graft.study.read_study import paper_study, read_study
from peft_graft.study.results import read_results
from peft_graft.study.runner import Here, OnRay, Outcome, estimate, run_study
from peft_graft.study.spec import FRESH, Study
from peft_graft.study.tables import MEAN, grid_of, latex, markdown, result_tables, write_tables

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("accelerate", "seqeval", "matplotlib", "psutil")),
    reason="the extra study is not installed",
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"

STUDY = """
name = "tiny"
max_tokens = 800

[models]
big = "{models}/teacher"
small = "{models}/shallow"

[tasks.ner]
kind = "token-classification"
train = "./{{language}}.parquet"
test = "./{{language}}.parquet"
languages = ["en", "de"]
validation_examples = 20
test_examples = 20

[modules.lora]
config = {{ r = 4, lora_alpha = 8 }}

[training]
teacher = {{ learning_rate = 2e-2, epochs = 8, batch_size = 8 }}
student = {{ learning_rate = 1e-2, epochs = 2, batch_size = 8 }}

[defaults]
modules = ["lora"]
tasks = ["ner"]
polish = [0]
budgets = [16]

[[grid]]
teacher = "big"
student = "small"
methods = ["copy"]
layers = ["skip", "avg"]
"""


def test_a_cell_has_one_holder(tmp_path: Path) -> None:
    """Also where one has opened the lock's file before another let go of it, on storage where it outlives its name."""
    folder = StudyFolder(tmp_path)
    folder.prepare({})
    with folder.claimed("cell") as mine, folder.claimed("cell") as other:
        assert (mine, other) == (True, False)
        held = (tmp_path / "locks" / "cell").stat().st_ino
    with folder.claimed("cell") as mine:
        assert mine
        assert (tmp_path / "locks" / "cell").stat().st_ino == held


def test_a_record_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    (tmp_path / "cells").write_text("")
    (tmp_path / "failures").write_text("")
    for keep in (folder.keep, folder.keep_failure):
        with pytest.raises(OutputError, match="cannot be written"):
            keep({"id": "cell"})


def made(world: Path, folder: Path) -> Path:
    """A study of tiny models on a task that they can learn: which words are names."""
    folder.mkdir()
    for number, language in enumerate(("en", "de")):
        rows = [line.rstrip(".").split() for line in tiny.sentences(80, seed=number)]
        tags = [["B-PER" if tiny.WORDS.index(word) < 15 else "O" for word in row] for row in rows]
        Dataset.from_dict({"tokens": rows, "ner_tags": tags}).to_parquet(folder / f"{language}.parquet")
    path = folder / "study.toml"
    path.write_text(STUDY.format(models=world))
    return path


@pytest.fixture
def file(world: Path, tmp_path: Path) -> Path:
    """A study that the test may change."""
    return made(world, tmp_path / "study")


@pytest.fixture(scope="module")
def kept(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that stays as it is, beside which results that several tests need lie."""
    return made(world, tmp_path_factory.mktemp("kept") / "study")


@pytest.fixture(scope="module")
def whole(kept: Path) -> tuple[Study, Outcome, Path]:
    """The study, what became of its cells, and where: undisturbed, in one process."""
    out = kept.parent / "whole"
    return *run(kept, out), out


def table(study: Study, out: Path) -> str:
    return markdown(result_tables(records(study, out)))


def run(file: Path, out: Path, **options):
    study = read_study(file)
    return study, run_study(study, out, Here(out), **options)


def records(study: Study, out: Path) -> list[dict]:
    return StudyFolder(out).records(cells_of(study))


# ---- declared --------------------------------------------------------------------------------------------------------


def test_a_study_expands_into_cells_that_share_their_work(file: Path) -> None:
    cells = cells_of(read_study(file))
    kinds = [cell.kind for cell in cells.values()]
    # for each of two languages: one teacher, two grafts (skip, avg), and fresh, skip, avg students
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"teacher": 2, "graft": 4, "student": 6}
    order = list(cells)
    assert all(order.index(need) < order.index(name) for name, cell in cells.items() for need in cell.needed)
    more = cells_of(read_study(file, ["defaults.seeds=[0, 1]", "defaults.budgets=[16, 'all']"]))
    kinds = [cell.kind for cell in more.values()]
    # grafts that are not polished do not depend on the seed
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"teacher": 2, "graft": 4, "student": 24}
    assert set(cells) < set(more), "the same cell has the same id in another study"
    other = cells_of(read_study(file, ["training.teacher.epochs=3"]))
    fresh = {name for name in cells if FRESH in name}
    assert set(cells) & set(other) == fresh, "only what does not depend on the teacher's training is the same"


def test_one_alignment_serves_modules_of_every_size(file: Path) -> None:
    changes = ["modules.wide.config={ r = 8 }", "defaults.modules=['lora', 'wide']", "grid.0.methods=['prune-align']"]
    cells = cells_of(read_study(file, changes))
    alignments = {name for name, cell in cells.items() if cell.kind == "alignment"}
    grafts = [cell for cell in cells.values() if cell.kind == "graft"]
    assert len(alignments) == 4  # two languages, two ways of choosing layers
    assert len(grafts) == 8
    assert {cell.needs.alignment for cell in grafts} == alignments


def test_only_takes_what_matches_and_what_that_needs(file: Path) -> None:
    cells = cells_of(read_study(file), "student-*-de-copy_avg*")
    assert [cell.kind for cell in cells.values()] == ["teacher", "graft", "student"]
    with pytest.raises(StudyError, match="--only nothing: no cell matches"):
        cells_of(read_study(file), "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grid.0.teacher=huge", "unknown model huge; named are big, small"),
        ("grid.0.methods=['magic']", "grid.0.methods: unknown choice; expected auto, copy"),
        ("defaults.languages=['xx']", "ner has none of the languages xx"),
        ("grid.0.seed=[1]", "grid.0.seed: unknown key; expected teacher, student, modules, "),
        ("grid.0.seed=[1]", "found seed. Fix: write seeds"),
        ("tasks.ner.trian=x", "tasks.ner.trian: unknown key; expected kind, train, "),
        ("training.teacher.epoch=1", "found epoch. Fix: write epochs"),
        ("training.rate=1", "training.rate: unknown key; expected teacher, student, teacher_rates, "),
        ("modules.lora.conf=1", "found conf. Fix: write config"),
        ("nmae=x", "nmae: unknown key; expected name, models, "),
        ("tasks.ner.kind=ner", "tasks.ner: no such kind of task; expected token-classification, "),
        ("grid.0.seeds=1", "grid.0.seeds: expected a list"),
        ("grid.0.seeds=[1, 0, 1]", "seeds: 1 is named twice; name it once"),
        ("grid.0.layers=['skipp']", "grid.0.layers: not a layer map; expected auto, skip, avg, or numbers such"),
        ("grid.0.budgets=[-1]", "Input should be greater than or equal to 0"),
        ("training.student.epochs=many", "training.student.epochs: Input should be a valid number"),
        ("tasks.ner.metric=macro F1", "token-classification is not scored by macro F1, but by entity F1"),
        ("tasks.ner.metric=bleu", "tasks.ner.metric: Input should be"),
        ("nonsense", "--set nonsense: cannot be understood; expected KEY=VALUE"),
        (
            "models.Bigg=/m",
            "--set models.Bigg=/m: no grid of the study names such a model; expected big, small, found Bigg. "
            "Fix: did you mean models.big?",
        ),
        ("tasks.zzz.kind=x", "tasks.zzz"),
    ],
)
def test_what_a_study_cannot_be_is_said(file: Path, change: str, message: str) -> None:
    with pytest.raises(StudyError) as caught:
        read_study(file, [change])
    assert message in str(caught.value)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_grids_cover_its_languages(name: str) -> None:
    study = read_study(paper_study(name))
    cells = cells_of(study).values()
    languages = {task: {cell.names.language for cell in cells if cell.names.task == task} for task in study.tasks}
    assert {task: len(found) for task, found in languages.items()} == {"ner": 9, "nli": 15, "paraphrase": 7}
    assert len(set.union(*languages.values())) == 21
    assert {cell.names.module for cell in cells if cell.kind == "teacher"} == {"adapter", "lora"}
    assert {task: spec.metric for task, spec in study.tasks.items()} == {
        "ner": "entity F1", "nli": "accuracy", "paraphrase": "accuracy"
    }  # fmt: skip


@needs_adapters
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_grids_run_on_local_stand_ins(name: str, world: Path, file: Path, tmp_path: Path) -> None:
    """Unchanged but for paths, sizes and the device, in one language."""
    texts = [" ".join(line.split()[:4]) for line in tiny.sentences(60, seed=5)]
    sources = {
        "ner": file.parent / "en.parquet",
        "nli": tmp_path / "nli.parquet",
        "paraphrase": tmp_path / "pi.parquet",
    }
    for task, first, second in (("nli", "premise", "hypothesis"), ("paraphrase", "sentence1", "sentence2")):
        columns = {first: texts[::2], second: texts[1::2], "label": [index % 2 for index in range(30)]}
        Dataset.from_dict(columns).to_parquet(sources[task])
    teacher, student, folder = {
        "matching": ("mBERT", "DistilmBERT", "shallow"), "incompatible": ("XLM-R-large", "XLM-R-base", "narrow")
    }[name]  # fmt: skip
    changes = [
        "device=cpu", "dtype=float32", "max_tokens=800", "defaults.seeds=[0]", "defaults.languages=['en']",
        f"models.{teacher}={world / 'teacher'}", f"models.{student}={world / folder}", "tasks.ner.labels=[]",
        "modules.adapter.config={ name = 'seq_bn', bottleneck = 4 }",
        *(f"training.{who}.{change}" for who in ("teacher", "student")
          for change in ("epochs=1", "batch_size=32", "bf16=false")),
        *(f"tasks.{task}.{split}={path}" for task, path in sources.items() for split in ("train", "test")),
        *(f"tasks.{task}.{change}" for task in sources for change in ("validation=", "validation_examples=10")),
    ]  # fmt: skip
    study = read_study(paper_study(name), changes)
    # A second grid is the default, tested above; all methods and ways of choosing layers run for one task.
    first = study.grid[0].model_copy(update={"layers": study.grid[0].layers if name == "matching" else ("skip",)})
    others = {"tasks": ("nli", "paraphrase"), "layers": ("skip",), "methods": first.methods[:1]}
    grids = (first.model_copy(update={"tasks": ("ner",)}), first.model_copy(update=others))
    study = study.model_copy(update={"grid": grids})
    outcome = run_study(study, tmp_path / "out", Here(tmp_path / "out"))
    errors = [json.loads(path.read_text())["error"] for path in (tmp_path / "out" / "failures").iterdir()]
    assert not errors
    assert not outcome.blocked
    tables = result_tables(records(study, tmp_path / "out"))
    assert {(table.module, table.task) for table in tables} == {
        (module, task) for module in ("adapter", "lora") for task in ("ner", "nli", "paraphrase")
    }


def test_records_of_cells_with_long_names_in_any_script_have_names_that_file_systems_take(
    file: Path, tmp_path: Path
) -> None:
    cell = next(iter(cells_of(read_study(file)).values()))
    renamed = cell.model_copy(update={"names": cell.names.model_copy(update={"task": "情感分析" * 40})})
    assert "情感分析" in renamed.id
    assert renamed.id[-10:] == cell.id[-10:], "what things are called is no part of the work"
    folder = StudyFolder(tmp_path)
    folder.prepare({})
    folder.keep({"id": renamed.id})
    assert folder.is_done(renamed.id)
    plain = cell.model_copy(update={"names": cell.names.model_copy(update={"task": "s" * 200})})
    assert len(plain.id) == len(cell.kind) + 1 + 120 + 1 + 10


def test_a_rate_is_chosen_once_for_all_students_of_a_budget(file: Path) -> None:
    changes = ["training.rates=[1e-3, 1e-2]", "training.epochs={ 16 = 3 }", "defaults.seeds=[0, 1]",
               "defaults.budgets=[0, 16, 'all']", "defaults.languages=['en']"]  # fmt: skip
    cells = cells_of(read_study(file, changes)).values()
    rates = {cell.id: cell for cell in cells if cell.kind == "rate"}
    assert {cell.names.budget for cell in rates.values()} == {16, "all"}
    assert len(rates) == 2, "seeds and starts share them"
    for cell in cells:
        if isinstance(cell, StudentCell):
            assert (cell.needs.rate in rates) == bool(cell.config.budget)
            assert cell.config.training.epochs == (3 if cell.config.budget == 16 else 2)


def test_a_fresh_module_is_polished_beside_a_graft(file: Path) -> None:
    changes = ["grid.0.methods=['auto']", "defaults.polish=[6]", "grid.0.from_fresh=[false, true]",
               "defaults.languages=['en']"]  # fmt: skip
    cells = cells_of(read_study(file, changes))
    kinds = [cell.kind for cell in cells.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"teacher": 1, "graft": 1, "polish": 1, "student": 3}
    (polish,) = [cell for cell in cells.values() if cell.kind == "polish"]
    assert cells[str(polish.needs.teacher)].kind == "teacher"
    students = {cell.names.start: cell for cell in cells.values() if isinstance(cell, StudentCell)}
    assert students["polish from fresh, polish 6"].needs.graft == polish.id
    assert students["polish from fresh, polish 6"].config.share == 0.1


PLUGIN = """
import torch
from peft_graft.alignment.maps import Selection
from peft_graft.alignment.methods import register_method

@register_method("{name}", summary="student unit i is teacher unit i")
def first_units(fit, held_out):
    d_s, d_t = fit.cross.shape
    return Selection(torch.arange(d_s).where(torch.arange(d_s) < d_t, -1), d_t), {{}}
"""


def test_grids_name_methods_of_plugins(file: Path) -> None:
    (file.parent / "mine.py").write_text(PLUGIN.format(name="first-units"))
    changes = ["plugins=['mine.py']", "grid.0.methods=['first-units', 'copy']", "defaults.languages=['en']"]
    cells = cells_of(read_study(file, changes))
    assert "first-units" in METHODS
    assert {cell.names.method for cell in cells.values() if cell.kind == "alignment"} == {"first-units"}
    (file.parent / "mine.py").write_text("# the same\n")
    changed = cells_of(read_study(file, changes))
    kept = set(cells) & set(changed)
    assert not [name for name in kept if "first-units" in name], "a plugin's content is part of the ids that need it"
    assert [name for name in kept if name.startswith("graft") and "copy" in name]


def test_methods_of_plugins_that_the_default_tries_are_part_of_what_it_is(file: Path) -> None:
    plugin = file.parent / "mine.py"
    plugin.write_text(PLUGIN.format(name="units-in-order").replace("summary=", "automatic=True, summary="))
    changes = ["plugins=['mine.py']", "grid.0.methods=['auto']", "defaults.languages=['en']"]
    try:
        cells = cells_of(read_study(file, changes)).values()
    finally:
        METHODS.pop("units-in-order", None)
        METHOD_SUMMARIES.pop("units-in-order", None)
    grafts = [cell.config for cell in cells if cell.kind == "graft"]
    assert grafts
    assert all([one.path for one in config.plugins] == [str(plugin)] for config in grafts)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "mine.py: the plugin cannot be read (No such file or directory)"),
     ("1 / 0", "mine.py: the plugin fails when it is imported (ZeroDivisionError: division by zero)")],
)  # fmt: skip
def test_a_plugin_that_fails_says_why(file: Path, content: str | None, message: str) -> None:
    if content:
        (file.parent / "mine.py").write_text(content)
    with pytest.raises(StudyError) as caught:
        read_study(file, ["plugins=['mine.py']"])
    assert message in str(caught.value)


@pytest.mark.parametrize("change", ["models.big='~nobody-of-this-name/m'", "plugins=['~nobody-of-this-name/p.py']"])
def test_a_place_in_the_folder_of_nobody_is_one_error(file: Path, change: str) -> None:
    with pytest.raises(StudyError, match="~nobody-of-this-name/.*there is no such place.*write the path in full"):
        read_study(file, [change])


def test_the_benchmarks_are_studies() -> None:
    quality = cells_of(read_study(BENCHMARKS / "quality.toml")).values()
    assert {cell.names.start for cell in quality if isinstance(cell, StudentCell)} == {
        FRESH, "default", "default, distilling", "default, polish 500", "polish from fresh", "copy/skip, head carry",
        "prune-align/skip, head carry",
    }  # fmt: skip
    ablation = cells_of(read_study(BENCHMARKS / "ablation.toml"))
    assert {cell.names.seed for cell in ablation.values() if cell.kind == "graft"} == {None}
    starts = {cell.names.start for cell in ablation.values() if cell.kind == "student"} - {FRESH}
    published = read_results(BENCHMARKS.parent / "docs" / "results" / "quality.jsonl")
    shown = {record["names"]["start"] for record in published if record["study"] == "ablation"}
    assert {start for start in shown if start.endswith(", head fit")} == starts


def test_starts_are_named_by_what_is_not_as_usual() -> None:
    assert Start(GraftConfig(layers="skip")).name == "default"
    assert Start(GraftConfig()).name == "default, layers auto", "which grids do not have unless they say so"
    copied = GraftConfig(layers="avg", method="copy", head="drop", polish=0)
    assert Start(copied, distil=True).name == "copy/avg, head drop, polish 0, distilling"
    assert Start(GraftConfig(polish=500), from_fresh=True).name == "polish from fresh, polish 500"


# ---- run -------------------------------------------------------------------------------------------------------------


def test_a_study_runs_and_what_is_done_is_not_done_again(kept: Path, whole) -> None:
    study, outcome, out = whole
    assert not outcome.failed
    assert len(outcome.done) == 12
    tables = write_tables(records(study, out), out / "tables")
    assert [table.budget for table in tables] == [0, 16]
    last = tables[1]
    assert [row.start for row in last.rows] == ["teacher", FRESH, "copy/avg, polish 0", "copy/skip, polish 0"]
    assert set(last.rows[1].entries) == {"en", "de", MEAN}
    assert last.rows[0].entries[MEAN].score > 0.1, "the teacher has learned"
    assert {path.name for path in (out / "tables").iterdir()} == {
        "results.md", "results.csv", "results.tex", "curves-small-lora-ner.png", "curves-small-lora-ner.svg"
    }  # fmt: skip
    lines = list(csv.DictReader((out / "tables" / "results.csv").open()))
    assert len(lines) == 2 * 4 * 3
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    _, again = run(kept, out)
    assert sorted(again.done) == sorted(outcome.done)
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    left, seconds = estimate(cells_of(read_study(kept, ["defaults.seeds=[0, 1]"])), StudyFolder(out))
    assert left == {"student": 6}
    assert seconds == pytest.approx(
        6 * sum(json.loads(p.read_text())["seconds"] for p in before if p.name.startswith("student")) / 6
    )
    record = json.loads(next(iter(sorted(before))).read_text())
    assert {"config", "versions", "hardware", "seconds", "result"} <= record.keys()
    assert not held(out)
    assert not list((out / "work").iterdir())


def test_polished_and_distilling_starts(file: Path, tmp_path: Path) -> None:
    changes = ["grid.0.methods=['auto']", "defaults.polish=[6]", "defaults.distil=[false, true]",
               "defaults.languages=['en']", "training.student.patience=1"]  # fmt: skip
    study = read_study(file, changes)
    outcome = run_study(study, tmp_path / "out", Here(tmp_path / "out"))
    assert not outcome.failed
    found = {record["id"]: record for record in records(study, tmp_path / "out")}
    students = {record["names"]["start"]: record for record in found.values() if record["kind"] == "student"}
    assert set(students) == {FRESH, "default, polish 6", "default, polish 6, distilling"}
    rates = {start: record["result"]["training"]["learning_rate"] for start, record in students.items()}
    assert rates["default, polish 6"] == pytest.approx(rates[FRESH] / 10)
    assert students["default, polish 6, distilling"]["config"]["training"]["distillation"] == 0.5
    grafts = [record for record in found.values() if record["kind"] == "graft"]
    assert len(grafts) == 1, "both learn from the same graft"
    assert grafts[0]["result"]["verdict"]["measured"]["answers"] > 0


def test_chosen_rates_and_a_polished_fresh_module(file: Path, tmp_path: Path) -> None:
    changes = ["grid.0.methods=['auto']", "defaults.polish=[6]", "grid.0.from_fresh=[true]",
               "defaults.languages=['en']", "training.rates=[1e-5, 1e-2]", "training.teacher.epochs=2",
               "training.keep_best=false"]  # fmt: skip
    study = read_study(file, changes)
    outcome = run_study(study, tmp_path / "out", Here(tmp_path / "out"))
    assert not outcome.failed
    found = records(study, tmp_path / "out")
    (rate,) = [record["result"] for record in found if record["kind"] == "rate"]
    assert set(rate["scores"]) == {"1e-05", "0.01"}
    assert rate["scores"][f"{rate['rate']:g}"] == max(rate["scores"].values())
    used = {record["names"]["start"]: record["result"]["training"]["learning_rate"]
            for record in found if record["kind"] == "student"}  # fmt: skip
    assert used == {FRESH: rate["rate"], "polish from fresh, polish 6": pytest.approx(rate["rate"] / 10)}
    (polish,) = [record["result"] for record in found if record["kind"] == "polish"]
    assert polish["polish"]["settings"]["steps"] == 6
    assert polish["verdict"]["measured"]["answers"] > 0


@pytest.mark.parametrize("method", ["nothing", "prune-align-absolute", "prune-align-scaled", "ridge-half"])
def test_candidates_of_the_ablation_run(method: str, kept: Path) -> None:
    out = kept.parent / "ablation"  # of one teacher
    changes = [f"plugins=['{BENCHMARKS / 'candidates.py'}']", f"grid.0.methods=['{method}']", "grid.0.layers=['skip']",
               "defaults.heads=['fit']", "defaults.budgets=[0]", "defaults.languages=['en']",
               "training.teacher.epochs=2"]  # fmt: skip
    study = read_study(kept, changes)
    run_study(study, out, Here(out), only="student-*head_fit*")
    assert not [json.loads(path.read_text())["error"] for path in (out / "failures").iterdir()]
    (graft,) = [record["result"] for record in records(study, out) if record["kind"] == "graft"]
    tried = {name: found["divergence"] for name, found in graft["tried"].items()}
    exact = tried[f"{method}, as moved"] <= EXACT  # and left alone
    assert tried.keys() == {f"{method}, as moved"} | (set() if exact else {f"{method}, head fitted"})


def test_a_failed_cell_says_why_and_the_rest_goes_on(command, file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace("epochs = 10", "epochs = 1").replace('["en", "de"]', '["de", "en"]')
    file.write_text(f'{text}heads = ["carry"]\n')  # which needs no text
    (file.parent / "de.parquet").unlink()
    out = tmp_path / "out"
    _, outcome = run(file, out)
    assert len(outcome.done) == 6, "everything in the other language"
    assert len(outcome.failed) == 2, "the teacher and the fresh student"
    assert len(outcome.blocked) == 4
    assert (
        "de.parquet: no such text file" in json.loads(next((out / "failures").glob("teacher-*")).read_text())["error"]
    )
    shown = " ".join(command("study", file, "--out", out, code=1).out.split())
    assert "6 cells done, 2 failed, 4 blocked" in shown
    assert "no such text file" in shown
    quiet = command("study", file, "--out", out, "--quiet", code=1)
    assert quiet.out == ""
    *failed, last = quiet.err.splitlines()
    assert [line.startswith("error: ") and "no such text file" in line for line in failed] == [True, True]
    assert "6 cells done, 2 failed, 4 blocked" in last
    assert str(out / "failures") in last


def test_a_plan_counts_cells_and_lists_them_only_when_asked(command, kept: Path, whole) -> None:
    out = whole[2]
    shown = command("study", kept, "--out", out, "--dry-run").out
    assert "student" in shown
    assert "student-" not in shown
    assert f"results {out}" in shown
    listed = command("study", kept, "--out", out, "--list").out
    assert listed.count("done    student-") == 6
    plan = StudyPlan.model_validate_json(command("study", kept, "--out", out, "--dry-run", "--json").out)
    assert {kind.kind: (kind.cells, kind.done) for kind in plan.kinds} == {
        "teacher": (2, 2), "graft": (4, 4), "student": (6, 6)
    }  # fmt: skip
    assert all(plan.cells.values())
    done = StudyRun.model_validate_json(command("study", kept, "--out", out, "--json").out)
    assert (len(done.done), done.failed, done.blocked, done.out) == (12, {}, [], str(out))


def test_killed_twice_it_ends_with_the_table_of_an_undisturbed_run(kept: Path, whole, tmp_path: Path) -> None:
    """In one of the study's languages."""
    changes, out = ["defaults.languages=['en']"], tmp_path / "out"
    command = ("study", str(kept), "--out", str(out), *(word for change in changes for word in ("--set", change)))
    before: dict[Path, int] = {}
    for cells in (1, 3):
        process = processes.start(processes.command, *command)
        end = time.monotonic() + 120
        while len(list((out / "cells").glob("*.json"))) < cells and process.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        for path, time_then in before.items():
            assert path.stat().st_mtime_ns == time_then, "a finished cell was done again"
        before = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*.json")}
        assert cells <= len(before) < 6
    study = read_study(kept, changes)
    outcome = run_study(study, out, Here(out))
    assert len(outcome.done) == 6
    assert all(path.stat().st_mtime_ns == time_then for path, time_then in before.items())
    assert table(study, out) == table(study, whole[2])


def held(out: Path) -> list[str]:
    """The cells that some process works on; the files of locks stay."""

    def is_held(path: Path) -> bool:
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        return False

    return [path.name for path in (out / "locks").iterdir() if is_held(path)]


def hold(out: Path) -> None:
    """Claim a cell, say so, and never let go of it."""
    with StudyFolder(out).claimed("cell") as mine:
        (out / "said").write_text(str(mine))
        (out / "said").rename(out / "held")
        time.sleep(600)


def test_a_lock_holds_while_its_owner_lives(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    folder = StudyFolder(tmp_path)
    with folder.claimed("cell") as first, folder.claimed("cell") as second:
        assert first
        assert not second
        assert held(tmp_path) == ["cell"]
    assert not held(tmp_path)
    with folder.claimed("cell") as again:
        assert again
    owner = processes.start(hold, tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "held").exists() and owner.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert (tmp_path / "held").read_text() == "True"
    with folder.claimed("cell") as of_another:
        assert not of_another, "the other process lives"
    owner.kill()
    owner.join()
    with folder.claimed("cell") as taken_over:
        assert taken_over
    assert not held(tmp_path)


def keep_all(out: Path) -> None:
    """Do what is left of a hundred cells, and say how many that were."""
    folder, done = StudyFolder(out), 0
    (out / f"ready-{os.getpid()}").touch()
    while len(list(out.glob("ready-*"))) < 2:  # else the first is through before the second begins
        time.sleep(0.001)
    for cell in map(str, range(100)):
        if not folder.is_done(cell):
            with folder.claimed(cell) as mine:
                if mine and not folder.is_done(cell):
                    folder.keep({"id": cell, "result": {}})
                    done += 1
    sys.stdout.write(str(done))


def test_two_processes_never_do_a_cell_twice(tmp_path: Path) -> None:
    """Both go through the same hundred cells; every one is done by one of them."""
    StudyFolder(tmp_path).prepare({})
    workers = [processes.start(keep_all, tmp_path, out=tmp_path / f"out-{number}") for number in range(2)]
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    counts = [int((tmp_path / f"out-{number}").read_text()) for number in range(2)]
    assert sum(counts) == 100


def on_two_nodes(file: Path, out: Path, changes: list[str], found: Path) -> None:
    """Run a study on a local Ray cluster of two nodes, and kill one of its workers in the middle of a cell."""
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    # Else workers let everything else go first, the tests beside them too.
    os.environ |= {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    killed: list[int] = []

    def holds_a_lock(process: psutil.Process) -> bool:
        try:
            return any("/locks/student-" in file.path for file in process.open_files())
        except psutil.Error:
            return False

    def kill_one() -> None:
        while not killed:
            for process in psutil.process_iter(["name"]):
                if (process.info["name"] or "").startswith("ray::") and holds_a_lock(process):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.2)

    threading.Thread(target=kill_one, daemon=True).start()
    outcome = run_study(read_study(file, changes), out, OnRay(out, cluster.address, 1, 0))
    found.write_text(json.dumps({"done": outcome.done, "failed": outcome.failed, "killed": killed}))
    ray.shutdown()
    cluster.shutdown()


@needs_ray
def test_on_two_nodes_a_killed_worker_costs_nothing(kept: Path, whole, tmp_path: Path) -> None:
    """In one of the study's languages, for every worker takes long to start."""
    changes, out = ["defaults.languages=['en']"], tmp_path / "out"
    driver = processes.start(on_two_nodes, kept, out, changes, tmp_path / "found", err=tmp_path / "errors")
    driver.join(300)
    assert driver.exitcode == 0, (tmp_path / "errors").read_text()[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    assert len(found["done"]) == 6
    assert not found["failed"]
    assert found["killed"], "no worker was killed"
    study = read_study(kept, changes)
    assert table(study, out) == table(study, whole[2])


# ---- tables ----------------------------------------------------------------------------------------------------------


def record(kind: str, start: str | None, language: str, seed: int | None, score: float, before: float = 0.1) -> dict:
    names = {"teacher": "T", "student": "S", "module": "lora", "task": "ner", "language": language}
    if kind == "teacher":
        del names["student"]
        return {"kind": kind, "names": names, "result": {"score": score, "metric": "entity F1"}}
    if start == FRESH:
        del names["teacher"]
    names |= {"start": start, "budget": 100, "seed": seed}
    return {"kind": kind, "names": names, "result": {"score": score, "before": before, "metric": "entity F1"}}


def test_tables_hold_means_spreads_differences_and_shares() -> None:
    records = [record("teacher", None, language, None, 0.8) for language in ("de", "en")]
    for seed in (0, 1):
        for language, fresh, graft in (("de", 0.4, 0.6), ("en", 0.5, 0.65)):
            records.append(record("student", FRESH, language, seed, fresh + 0.1 * seed))
            records.append(record("student", "copy/skip", language, seed, graft, before=0.3))
    none, hundred = result_tables(records)
    assert none.title == "T → S, lora, ner, no labels (entity F1)"
    row = {row.start: row for row in hundred.rows}["copy/skip"]
    assert row.entries["de"].score == pytest.approx(0.6)
    assert row.entries["de"].spread == pytest.approx(0)
    mean = row.entries[MEAN]
    assert (mean.score, mean.runs) == (pytest.approx(0.625), 4)
    assert mean.difference == pytest.approx(0.625 - 0.5)
    assert mean.share == pytest.approx(0.125 / 0.3)
    fresh = {row.start: row for row in hundred.rows}[FRESH].entries[MEAN]
    assert fresh.spread == pytest.approx(0.1 / 2**0.5)  # over the seeds' means, 0.45 and 0.55
    assert fresh.difference is None
    assert {row.start: row for row in none.rows}["copy/skip"].entries[MEAN].score == pytest.approx(0.3)
    header, lines = grid_of(hundred)
    assert header == ["", "de", "en", "mean", "Δ fresh", "share of the gain", "p"]
    assert lines[2][:6] == ["copy/skip", "60.0 ± 0.0", "65.0 ± 0.0", "62.5 ± 0.0", "+12.5", "+42%"]
    assert r"62.5 $\pm$ 0.0 & +12.5 & +42\%" in latex([hundred])
    named = replace(hundred, teacher="A&B", task="100%_#1")
    assert r"\caption{A\&B $\rightarrow$ S, lora, 100\%\_\#1, 100 labels (entity F1)}" in latex([named])


def test_there_is_no_share_of_a_gain_that_the_teacher_does_not_have() -> None:
    for teacher, share in ((0.511, "+200%"), (0.509, ""), (0.4, "")):
        records = [record("teacher", None, "de", None, teacher), record("student", FRESH, "de", 0, 0.5),
                   record("student", "copy/skip", "de", 0, 0.522)]  # fmt: skip
        _, lines = grid_of(result_tables(records)[1])
        assert lines[2][2:4] == ["+2.2", share]


def test_tables_are_turned_where_the_terminal_is_too_narrow() -> None:
    languages = [f"l{number:02}" for number in range(15)]
    records = [record("teacher", None, language, None, 0.8) for language in languages]
    for start, score in ((FRESH, 0.4), ("copy/skip", 0.6)):
        records += [record("student", start, language, 0, score) for language in languages]
    tables = result_tables(records)[1:]
    shown = {}
    for width in (80, 200):
        console = Console(file=io.StringIO(), width=width)
        show_tables(tables, console)
        shown[width] = console.file.getvalue()
        assert "…" not in shown[width]
        assert all(language in shown[width] for language in languages)
    narrow, wide = ([line.split("│")[1:-1] for line in shown[width].splitlines() if "│" in line] for width in (80, 200))
    assert [cell.strip() for cell in narrow[0]] == ["l00", "80.0", "40.0", "60.0"]
    assert [cell.strip() for cell in wide[0]][:3] == ["teacher", "80.0", "80.0"]
    assert len(narrow) == len(languages) + 5  # mean, difference, share, p and its correction


def test_the_test_is_paired_by_language_and_seed() -> None:
    from scipy.stats import wilcoxon

    fresh = {(language, seed): 0.5 + 0.01 * seed for language in ("de", "en", "fr") for seed in range(3)}
    graft = {key: value + 0.02 + 0.003 * index for index, (key, value) in enumerate(fresh.items())}
    records = [record("student", FRESH, *key, value) for key, value in fresh.items()]
    records += [record("student", "copy/skip", *key, value) for key, value in graft.items()]
    table = result_tables(records)[1]
    expected = wilcoxon([graft[key] - fresh[key] for key in fresh]).pvalue
    assert table.rows[-1].p == pytest.approx(expected)
    assert result_tables(records[:8] + records[9:12])[1].rows[-1].p is None, "too few pairs to say"


def test_means_are_over_the_languages_that_all_rows_have() -> None:
    records = [record("student", FRESH, "de", 0, 0.2), record("student", FRESH, "en", 0, 0.6),
               record("student", "copy/skip", "en", 0, 0.7)]  # fmt: skip
    rows = {row.start: row for row in result_tables(records)[1].rows}
    assert rows[FRESH].entries[MEAN].score == pytest.approx(0.6)
    assert rows["copy/skip"].entries[MEAN].difference == pytest.approx(0.1)


def test_a_name_with_a_dot_is_put_in_quotes(file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace("big = ", '"Big2.5" = ').replace('"big"', '"Big2.5"')
    (tmp_path / "dotted.toml").write_text(text)
    study = read_study(tmp_path / "dotted.toml", ['models."Big2.5"=/m/copy', "defaults.budgets=[3]"])
    assert study.models["Big2.5"] == "/m/copy"
    with pytest.raises(StudyError, match=r"no grid of the study names such a model.*found Bigg2\.5"):
        read_study(tmp_path / "dotted.toml", ['models."Bigg2.5"=/m/copy'])
