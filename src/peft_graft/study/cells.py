"""The cells of a study: what can be done on its own, what each needs, and how it is done.

    teacher    train the teacher's module                  -> a checkpoint
    alignment  align two models for one task's text        -> an alignment, shared by modules of the same roles
    graft      move a teacher's module to a student        -> a checkpoint
    student    fine-tune and score one student             -> scores

A cell is data with a stable id: a readable slug and a hash of everything that its result depends on. What several
comparisons share is one cell.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import transformers

from peft_graft._align import align
from peft_graft._transfer import transfer
from peft_graft.alignment.methods import METHODS
from peft_graft.errors import StudyError
from peft_graft.files import read_json, written_aside
from peft_graft.options import Progress
from peft_graft.study.comparison import load_module, new_module, save_module
from peft_graft.study.data import read_task, text_file
from peft_graft.study.spec import FRESH, Grid, ModuleSpec, Study, TaskSpec
from peft_graft.study.training import TrainingSettings, Validation, fine_tune, score, with_teacher_answers


@dataclass(frozen=True)
class Cell:
    """One unit of work.

    Attributes:
        kind: ``teacher``, ``alignment``, ``graft`` or ``student``.
        names: what it is called in tables: teacher, student, module, task, language, start, budget, seed.
        config: everything that its result depends on, JSON. needs: ids of the cells that come before it.
    """

    kind: str
    names: dict[str, Any] = field(hash=False)
    config: dict[str, Any] = field(hash=False)
    needs: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """Stable: the same work has the same id in every study, other work another."""
        content = json.dumps([self.kind, self.config, self.needs], sort_keys=True)
        slug = "-".join(str(value) for value in self.names.values() if value is not None)
        plain = "".join(char if char.isalnum() or char in "-." else "_" for char in slug)
        return f"{self.kind}-{plain[:120]}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def cells_of(study: Study, only: str | None = None) -> dict[str, Cell]:
    """All cells by id, each after those that it needs.

    Args:
        only: a pattern (``fnmatch``) that the ids of students and teachers must match; what they need comes along.

    Raises:
        StudyError: nothing matches.
    """
    found: dict[str, Cell] = {}
    for grid in study.grid:
        for cell in _grid_cells(study, grid):
            found.setdefault(cell.id, cell)
    if only is None:
        return found
    wanted = [
        name for name, cell in found.items() if cell.kind in ("student", "teacher") and fnmatch.fnmatch(name, only)
    ]
    if not wanted:
        raise StudyError(
            "no cell matches", where=f"--only {only}", expected="a pattern of the ids that --dry-run lists"
        )
    kept: set[str] = set()
    while wanted:
        name = wanted.pop()
        kept.add(name)
        wanted.extend(found[name].needs)
    return {name: cell for name, cell in found.items() if name in kept}


def start_name(layers: str, method: str, head: str, polish: int | str, distil: bool) -> str:
    """What a start is called in tables: only what is not as usual is named."""
    parts = [method if method == "default" else f"{method}/{layers}"]
    if head != "auto":
        parts.append(f"head {head}")
    if polish != "default":
        parts.append(f"polish {polish}")
    if distil:
        parts.append("distilling")
    return ", ".join(parts)


def _grid_cells(study: Study, grid: Grid) -> Iterator[Cell]:
    for module, task in product(grid.modules, grid.tasks):
        spec = study.tasks[task]
        for language in [name for name in spec.languages if not grid.languages or name in grid.languages]:
            yield from _comparison(study, grid, module, task, language)


def _comparison(study: Study, grid: Grid, module: str, task: str, language: str) -> Iterator[Cell]:
    """The cells of one pair, module, task and language."""
    place = {"task": task, "language": language, "task_spec": study.tasks[task].model_dump(mode="json")}
    kind = study.modules[module].model_dump(mode="json")
    names = {"teacher": grid.teacher, "student": grid.student, "module": module, "task": task, "language": language}
    teacher = Cell(
        "teacher",
        {key: value for key, value in names.items() if key != "student"},
        {**place, "model": study.models[grid.teacher], "module": kind,
         "training": study.training.teacher.model_dump(mode="json"), "device": study.device},
    )  # fmt: skip
    yield teacher
    for budget, seed in product(grid.budgets, grid.seeds):
        yield _student(study, grid, names, place, kind, FRESH, None, budget, seed, False)
    options = product(grid.layers, grid.methods, grid.heads, grid.polish, grid.distil)
    for layers, method, head, polish, distil in options:
        if method == "default" and layers != grid.layers[0]:
            continue  # the default is one start, not one for each way of choosing layers
        start = start_name(layers, method, head, polish, distil)
        for seed in grid.seeds:
            steps = None if polish == "default" else polish
            polished = _is_polished(None if method == "default" else method, steps)
            alignment = None
            if method != "default" and METHODS[method].needs_text and not METHODS[method].fits_shifts:
                roles = _roles(study.modules[module])
                alignment = Cell(
                    "alignment",
                    {"teacher": grid.teacher, "student": grid.student, "task": task, "language": language,
                     "method": method, "layers": layers, "roles": "+".join(roles or ["all"])},
                    {**place, "models": [study.models[grid.teacher], study.models[grid.student]], "method": method,
                     "layers": layers, "roles": roles, "max_tokens": study.max_tokens, "dtype": study.dtype,
                     "device": study.device},
                )  # fmt: skip
                yield alignment
            graft = Cell(
                "graft",
                {**names, "start": start.removesuffix(", distilling"), "seed": seed if polished else None},
                {**place, "models": [study.models[grid.teacher], study.models[grid.student]], "layers": layers,
                 "method": None if method == "default" else method, "head": head, "polish": steps,
                 "max_tokens": study.max_tokens, "dtype": study.dtype, "device": study.device,
                 # Only a polish depends on the seed; without one all seeds share the graft.
                 "seed": seed if polished else 0},
                (teacher.id, *([alignment.id] if alignment else [])),
            )  # fmt: skip
            yield graft
            for budget in grid.budgets:
                yield _student(study, grid, names, place, kind, start, graft, budget, seed, distil)


def _is_polished(method: str | None, steps: int | None) -> bool:
    """What ``transfer`` does when these are asked for."""
    return method is None if steps is None else steps > 0


def _roles(spec: ModuleSpec) -> list[str] | None:
    """The roles that an alignment has to cover for such a module; None for all."""
    name = spec.config if isinstance(spec.config, str) else (spec.config or {}).get("name", "")
    if spec.library == "adapterhub" and "lora" not in str(name).lower():
        return ["adapter"]
    if spec.library == "peft" and "target_modules" in (spec.config if isinstance(spec.config, dict) else {}):
        return None
    return ["attn.query", "attn.value"]


def _student(
    study: Study, grid: Grid, names: dict[str, Any], place: dict[str, Any], kind: dict[str, Any], start: str,
    graft: Cell | None, budget: int | str, seed: int, distil: bool,
) -> Cell:  # fmt: skip
    training = study.training.student
    fitted = graft is not None and (
        graft.config["polish"] or (graft.config["polish"], graft.config["method"]) == (None, None)
    )
    if fitted:
        training = training.model_copy(update={"learning_rate": training.learning_rate * study.training.fitted_rate})
    weight = study.training.distillation if distil else 0.0
    training = training.model_copy(update={"seed": seed, "distillation": weight})
    own = {key: value for key, value in names.items() if key != "teacher"} if graft is None else names
    return Cell(
        "student",
        {**own, "start": start, "budget": budget, "seed": seed},
        {**place, "model": study.models[grid.student], "module": kind, "budget": budget, "seed": seed,
         "teacher_model": study.models[grid.teacher] if distil else None,
         "training": training.model_dump(mode="json"), "device": study.device},
        (graft.id, *([graft.needs[0]] if distil else [])) if graft else (),
    )  # fmt: skip


# ---- doing them ------------------------------------------------------------------------------------------------------


def do_cell(cell: Cell, artifacts: Path, work: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Do the work of one cell.

    Args:
        artifacts: folder of what cells leave for others, by id; those that this one needs are there.
        work: the cell's own folder for what an interrupted run can go on from.

    Returns:
        What its result says: scores, curve, seconds, ...
    """
    kinds = {"teacher": _do_teacher, "alignment": _do_alignment, "graft": _do_graft, "student": _do_student}
    return kinds[cell.kind](cell, artifacts, work, progress)


def _task(cell: Cell) -> Any:
    return read_task(cell.config["task"], TaskSpec.model_validate(cell.config["task_spec"]), cell.config["language"])


def _settings(cell: Cell) -> TrainingSettings:
    return TrainingSettings.model_validate(cell.config["training"])


def _do_teacher(cell: Cell, artifacts: Path, work: Path, progress: Progress | None) -> dict[str, Any]:
    del progress
    task, train, validation, test = _task(cell)
    spec, settings = ModuleSpec.model_validate(cell.config["module"]), _settings(cell)
    tokenizer = transformers.AutoTokenizer.from_pretrained(cell.config["model"])
    model = new_module(cell.config["model"], spec.library, task, settings.seed, spec.config)
    scored = Validation(task.encode(validation, tokenizer), task, tokenizer)
    tuned = fine_tune(model, task.encode(train, tokenizer), tokenizer, settings, scored, folder=work / "training")
    found = score(model, task.encode(test, tokenizer), tokenizer, task)
    with written_aside(artifacts / cell.id, force=True) as staging:
        save_module(model, staging, spec.library, task)
    return {
        "score": found, "metric": task.metric, "majority": task.majority_score(test), "curve": tuned.curve,
        "examples": len(train), "validation_examples": len(validation), "test_examples": len(test),
        "training_seconds": round(tuned.seconds, 1),
    }  # fmt: skip


def _do_alignment(cell: Cell, artifacts: Path, work: Path, progress: Progress | None) -> dict[str, Any]:
    config = cell.config
    with _text(cell, work) as text:
        found = align(
            *config["models"], text=text, out=artifacts / cell.id, layers=config["layers"], method=config["method"],
            sites=config["roles"], max_tokens=config["max_tokens"],
            device=config["device"], dtype=config["dtype"], force=True, progress=progress,
        )  # fmt: skip
    return {"spaces": len(found.maps)}


def _do_graft(cell: Cell, artifacts: Path, work: Path, progress: Progress | None) -> dict[str, Any]:
    config = cell.config
    teacher, alignment = artifacts / cell.needs[0], artifacts / cell.needs[1] if len(cell.needs) > 1 else None
    kept = work / "graft"
    with _text(cell, work) as text:
        if not (kept / "graft.json").exists():  # else an interruption came between writing it and its result
            transfer(
                teacher, teacher=config["models"][0], student=config["models"][1], out=kept, layers=config["layers"],
                method=config["method"], text=text, alignment=alignment, head=config["head"], polish=config["polish"],
                max_tokens=config["max_tokens"], seed=config["seed"], device=config["device"], dtype=config["dtype"],
                force=True, progress=progress,
            )  # fmt: skip
    report = read_json(kept / "graft.json")
    if not (artifacts / cell.id).exists():
        artifacts.mkdir(parents=True, exist_ok=True)
        kept.rename(artifacts / cell.id)
    return {
        key: report[key]
        for key in ("method", "method_reason", "verdict", "tried", "polish", "layers", "notes", "seconds")
    } | {"head": report["head"]["how"] if report["head"] else None}


def _do_student(cell: Cell, artifacts: Path, work: Path, progress: Progress | None) -> dict[str, Any]:
    del progress
    config = cell.config
    task, train, validation, test = _task(cell)
    spec, settings = ModuleSpec.model_validate(config["module"]), _settings(cell)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config["model"])
    if cell.needs:
        model = load_module(config["model"], artifacts / cell.needs[0], spec.library, task)
    else:
        model = new_module(config["model"], spec.library, task, config["seed"], spec.config)
    rows = task.encode(test, tokenizer)
    result: dict[str, Any] = {"metric": task.metric, "before": score(model, rows, tokenizer, task)}
    budget = len(train) if config["budget"] == "all" else min(config["budget"], len(train))
    if budget:
        examples = train if budget == len(train) else random.Random(config["seed"]).sample(train, budget)
        encoded = task.encode(examples, tokenizer)
        if settings.distillation:
            encoded = with_teacher_answers(encoded, *_teacher_rows(cell, spec, task, examples, artifacts))
        scored = Validation(task.encode(validation, tokenizer), task, tokenizer)
        tuned = fine_tune(model, encoded, tokenizer, settings, scored, folder=work / "training")
        result |= {"curve": tuned.curve, "training_seconds": round(tuned.seconds, 1)}
    result["score"] = score(model, rows, tokenizer, task) if budget else result["before"]
    return {**result, "examples": budget, "test_examples": len(test)}


def _teacher_rows(cell: Cell, spec: ModuleSpec, task: Any, examples: Any, artifacts: Path) -> tuple[Any, Any, Any]:
    base = cell.config["teacher_model"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    teacher = load_module(base, artifacts / cell.needs[1], spec.library, task)
    return teacher, task.encode(examples, tokenizer), tokenizer


class _text:  # noqa: N801 - a context manager, used as a function
    """The task's training text without labels, as a file for the time of a block."""

    def __init__(self, cell: Cell, work: Path) -> None:
        self.path = work / "text.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        text_file(_task(cell)[1], self.path)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *exception: object) -> None:
        self.path.unlink(missing_ok=True)
