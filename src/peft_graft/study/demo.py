"""The demo: a LoRA trained on a real six-layer encoder moves to a real three-layer one, and both are scored.

Everything comes from the package registry or from this package: the models from packages that carry them, the text
from ``corpus/sentences.txt``, sentences with people, organisations and places marked, written for this project.
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from peft_graft._transfer import transfer
from peft_graft.environment import hardware, versions
from peft_graft.errors import DependencyError
from peft_graft.files import check_output, write_json
from peft_graft.options import Progress
from peft_graft.study import packaged_models
from peft_graft.study.comparison import (
    Row,
    Run,
    load_module,
    new_module,
    run_student,
    save_module,
    summarise,
)
from peft_graft.study.ner import read_annotated
from peft_graft.study.tasks import StudyTask, ner_task
from peft_graft.study.training import FITTED_RATE, TrainingSettings, fine_tune, score

TEACHER_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=10)
STUDENT_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=12, batch_size=8)
TEST_SENTENCES, BUDGET, SEEDS = 200, 60, 3
#: How the module gets to the student: name in the table -> folder and options of ``transfer``. The paper's methods move
#: module and head through maps; the default also fits the head and polishes, on the same text without its labels.
STARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy, skip": ("copy-skip", {"method": "copy", "head": "carry"}),
    "copy, avg": ("copy-avg", {"method": "copy", "layers": "avg", "head": "carry"}),
    "prune-align": ("prune-align", {"method": "prune-align", "head": "carry"}),
    "default, 300 steps": ("default", {"polish": 300}),
}


class DemoResult(BaseModel):
    """What the demo measured: entity F1 on held-out sentences, one row per start and label budget."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    teacher: str
    student: str
    teacher_score: float
    teacher_sentences: int
    test_sentences: int
    rows: list[Row]
    runs: list[Run]
    folders: dict[str, str]
    text: str
    seconds: float
    versions: dict[str, str]
    hardware: dict[str, str | int]


def run_demo(out: Path, *, seed: int = 0, force: bool = False, progress: Progress | None = None) -> DemoResult:
    """Train a teacher's module, move it in four ways, and compare with a fresh one.

    Args:
        out: folder for models (made once), modules and ``demo.json``. seed: of the first student; two more follow.
        force: replace the modules of an earlier run.

    Raises:
        DependencyError: the extra ``demo`` is not installed.
        OutputError: ``out`` holds an earlier run and ``force`` is not set, or cannot be written.
    """
    try:
        import accelerate  # noqa: F401
        import seqeval  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"{error.name} is not installed", fix="pip install 'peft-graft[demo]'") from error
    start = time.perf_counter()
    teacher = packaged_models.minilm_l6(out / "models" / packaged_models.TEACHER)
    student = packaged_models.minilm_l3(out / "models" / packaged_models.STUDENT, teacher)
    run = out / "run"
    check_output(run, force=force)
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    try:
        result = _run(teacher, student, run, seed, progress)
        result = result.model_copy(update={"seconds": round(time.perf_counter() - start, 1)})
        write_json(run / "demo.json", result.model_dump(mode="json"))
    except BaseException:  # an interruption too: half a demo would only stand in the next one's way
        shutil.rmtree(run, ignore_errors=True)
        raise
    return result


def _run(teacher: Path, student: Path, run: Path, seed: int, progress: Progress | None) -> DemoResult:
    def say(stage: str, done: int = 0, total: int | None = None) -> None:
        if progress:
            progress(stage, done, total)

    corpus = Path(str(files("peft_graft.study") / "corpus" / "sentences.txt"))
    sentences = read_annotated(corpus)
    task = ner_task(sentences)
    test, train = sentences[:TEST_SENTENCES], sentences[TEST_SENTENCES:]
    text = run / "sentences.txt"
    text.write_text("\n".join(" ".join(sentence.tokens) for sentence in train) + "\n", encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher)

    say("training the teacher's module")
    module = run / "teacher-lora"
    model = new_module(teacher, "peft", task, seed)
    fine_tune(model, task.encode(train, tokenizer), tokenizer, TEACHER_SETTINGS.model_copy(update={"seed": seed}))
    save_module(model, module, "peft", task)
    teacher_score = score(model, task.encode(test, tokenizer), tokenizer, task)

    makers = {"fresh": partial(new_module, student, "peft", task)}
    for name, (folder, options) in STARTS.items():
        say(f"moving the module: {name}")
        transfer(module, student=student, out=run / folder, text=text, seed=seed, progress=progress, **options)
        makers[name] = partial(_loaded, student, run / folder, task)

    runs: list[Run] = []
    total = len(makers) * (1 + SEEDS)
    for name, make in makers.items():
        for budget, number in [(0, 0), *((BUDGET, number) for number in range(SEEDS))]:
            say("training and scoring students", len(runs), total)
            rate = STUDENT_SETTINGS.learning_rate * (FITTED_RATE if name.startswith("default") else 1)
            settings = STUDENT_SETTINGS.model_copy(update={"seed": seed + number, "learning_rate": rate})
            few = train[number * budget : (number + 1) * budget]
            runs.append(run_student(partial(make, seed + number), name, few, test, tokenizer, task, settings))
    return DemoResult(
        teacher=packaged_models.TEACHER,
        student=packaged_models.STUDENT,
        teacher_score=teacher_score,
        teacher_sentences=len(train),
        test_sentences=len(test),
        rows=summarise(runs, teacher_score),
        runs=runs,
        folders={"teacher": str(module), **{name: str(run / start[0]) for name, start in STARTS.items()}},
        text=str(text),
        seconds=0.0,
        versions=versions(),
        hardware=hardware("cpu"),
    )


def _loaded(student: Path, folder: Path, task: StudyTask, seed: int) -> torch.nn.Module:
    del seed  # the graft is the same for every seed; the sentences and their order are not
    model: torch.nn.Module = load_module(student, folder, "peft", task)
    return model


def show_demo(result: DemoResult, console: Console) -> None:
    """Print the table, the files and what to try next."""
    table = Table(
        "student starts from",
        "no labels",
        f"after {BUDGET} labelled sentences",
        "share of the gain",
        title=f"entity F1 on {result.test_sentences} sentences\n"
        f"{result.teacher} (6 layers) → {result.student} (3 layers)",
    )
    after = {row.start: row for row in result.rows if row.budget}
    for row in result.rows:
        if row.budget == 0:
            tuned = after[row.start]
            share = "" if tuned.share_of_gain is None else f"{tuned.share_of_gain:+.0%}"
            table.add_row(row.start, f"{row.mean:.3f}", f"{tuned.mean:.3f} ± {tuned.spread:.3f}", share)
    table.add_section()
    table.add_row(f"teacher, {result.teacher_sentences} labelled sentences", f"{result.teacher_score:.3f}", "", "")
    console.print(table)
    console.print(
        f"mean ± standard deviation over {SEEDS} draws of {BUDGET} sentences; share of the gain = (grafted - fresh) / "
        f"(teacher - fresh). {result.seconds:.0f} s in all."
    )
    for name, folder in result.folders.items():
        console.print(f"{name:12} {folder}", soft_wrap=True)
    models = Path(result.text).parent.parent / "models"
    console.print("\nnext:", style="bold")
    console.print(
        f"  peft-graft inspect {result.folders['teacher']} --student {models / result.student}\n"
        f"  peft-graft transfer {result.folders['teacher']} --student {models / result.student} "
        f"--text {result.text} --out out/my-graft",
        soft_wrap=True,
    )
