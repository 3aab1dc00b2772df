"""The demo: a LoRA trained on a real six-layer encoder moves to a real three-layer one, and both are scored.

Everything comes from the package registry or from this package: the models from packages that carry them, the text
from ``corpus/sentences.txt``, sentences with people, organisations and places marked, written for this project.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from peft_graft._transfer import transfer
from peft_graft.config import GraftConfig, Library
from peft_graft.environment import hardware, versions
from peft_graft.errors import DependencyError, OutputError
from peft_graft.files import read_json, write_json
from peft_graft.labelled.examples import TaggedSentence
from peft_graft.outputs import check_output, written_aside
from peft_graft.record import Record
from peft_graft.run import Callback, Run
from peft_graft.study import packaged_models
from peft_graft.study.modules import load_module, new_module, save_module
from peft_graft.study.ner import read_annotated
from peft_graft.study.tables import share_of_gain
from peft_graft.study.tasks import StudyTask, ner_task
from peft_graft.study.training import FITTED_RATE, TrainingSettings, fine_tune, score

TEACHER_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=10)
STUDENT_SETTINGS = TrainingSettings(learning_rate=3e-3, epochs=12, batch_size=8)
TEST_SENTENCES, BUDGET, SEEDS = 200, 60, 3
FRESH = "fresh"
_TEACHER, _STUDENTS = "training the teacher's module", "training and scoring students"
#: How the module gets to the student: name in the table -> folder and options of ``transfer``. The paper's methods move
#: module and head through maps; the default also fits the head and polishes, on the same text without its labels.
STARTS: dict[str, tuple[str, GraftConfig]] = {
    "copy, skip": ("copy-skip", GraftConfig(method="copy", head="carry")),
    "prune-align": ("prune-align", GraftConfig(method="prune-align", head="carry")),
    "default, 300 steps": ("default", GraftConfig(polish=300)),
}


class StudentScore(Record):
    """One student, fine-tuned on ``budget`` labelled sentences (0: not at all) and scored on the test sentences."""

    start: str
    budget: int
    seed: int
    score: float
    seconds: float


class Row(Record):
    """Scores of one start and budget over seeds; ``share_of_gain`` as in ``tables``, at the same budget."""

    start: str
    budget: int
    mean: float
    spread: float
    seeds: int
    share_of_gain: float | None


class DemoResult(Record):
    """What the demo measured: entity F1 on held-out sentences, one row per start and label budget."""

    teacher: str
    student: str
    teacher_score: float
    teacher_sentences: int
    test_sentences: int
    rows: list[Row]
    runs: list[StudentScore]
    folders: dict[str, str]
    text: str
    seconds: float
    versions: dict[str, str]
    hardware: dict[str, str | int]


def run_demo(out: Path, *, seed: int = 0, force: bool = False, callbacks: Sequence[Callback] = ()) -> DemoResult:
    """Train a teacher's module, move it in three ways, and compare with a fresh one.

    Every part that is finished stays: after an interruption the same call goes on with the next one.

    Args:
        out: folder for models (made once), modules and ``demo.json``. seed: of the first student; two more follow.
        force: replace the modules of an earlier run that finished, or was made otherwise; one that was interrupted
            goes on.

    Raises:
        DependencyError: the extra ``demo`` is not installed.
        OutputError: ``out`` holds a finished run, or an unfinished one with another seed or other versions, and
            ``force`` is not set; or it cannot be written.
    """
    try:
        import accelerate  # noqa: F401
        import seqeval  # noqa: F401
    except ImportError as error:
        raise DependencyError(f"{error.name} is not installed", fix="pip install 'peft-graft[demo]'") from error
    start, run, folder = time.perf_counter(), Run(callbacks), out / "run"
    if force and not _goes_on(folder, seed):
        shutil.rmtree(folder, ignore_errors=True)
    if (folder / "demo.json").exists():
        check_output(folder, force=False)
    with run.stage("unpacking the models"):
        teacher = packaged_models.minilm_l6(out / "models" / packaged_models.TEACHER)
        student = packaged_models.minilm_l3(out / "models" / packaged_models.STUDENT, teacher)
    demo = _Demo(teacher, student, folder, seed, run)
    result = demo.result()
    result = result.model_copy(update={"seconds": round(time.perf_counter() - start + demo.seconds, 1)})
    demo.finish()
    write_json(folder / "demo.json", result.model_dump(mode="json"))
    return result


def _goes_on(folder: Path, seed: int) -> bool:
    """Whether a folder holds an unfinished demo that the same work goes on from."""
    state = folder / "parts.json"
    if not state.exists() or (folder / "demo.json").exists():
        return False
    found = read_json(state)
    return bool((found.get("seed"), found.get("versions")) == (seed, versions()))


def kept(out: Path, seed: int) -> str:
    """What an unfinished demo in a folder has done, in words; nothing where none goes on."""
    folder = out / "run"
    if not _goes_on(folder, seed):
        return ""
    parts = set(read_json(folder / "parts.json")["parts"])
    moves, students = parts & set(STARTS), parts - set(STARTS) - {"teacher"}
    done = [
        "the teacher's module" * ("teacher" in parts),
        f"{len(moves)} of {len(STARTS)} moves" * bool(moves),
        f"{len(students)} of {(1 + len(STARTS)) * (1 + SEEDS)} students" * bool(students),
    ]
    return ", ".join(filter(None, done))


class _Demo:
    """The parts of a demo, each done once; ``parts.json`` has what those that are finished found."""

    def __init__(self, teacher: Path, student: Path, folder: Path, seed: int, run: Run) -> None:
        self.teacher, self.student, self.folder, self.seed, self.run = teacher, student, folder, seed, run
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._state = folder / "parts.json"
        made_by = {"seed": seed, "versions": versions()}
        if folder.exists() and not self._state.exists():
            check_output(folder, force=False)
        folder.mkdir(parents=True, exist_ok=True)
        if self._state.exists():
            state = read_json(self._state)
            self._parts: dict[str, Any] = state["parts"]
            self.seconds = state["seconds"]
            if {key: state[key] for key in made_by} != made_by:
                raise OutputError(
                    "holds an unfinished demo with another seed or other versions of the software",
                    where=str(folder),
                    fix="start again with --force, or choose another --out",
                )
        else:
            self._parts = {}
        self._made_by = made_by
        self._keep()
        sentences = read_annotated(Path(str(files("peft_graft.study") / "corpus" / "sentences.txt")))
        self.task: StudyTask = ner_task(sentences)
        self.test, self.train = sentences[:TEST_SENTENCES], sentences[TEST_SENTENCES:]
        self.text, self.module = folder / "sentences.txt", folder / "teacher-lora"
        if not self.text.exists():
            lines = (" ".join(sentence.tokens) for sentence in self.train)
            self.text.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)

    def result(self) -> DemoResult:
        """Do what is left, and put everything together."""
        teacher_score = float(self._once("teacher", _TEACHER, self._train_teacher))
        for name in STARTS:
            self._once(name, f"moving the module: {name}", partial(self._move, name))
        scores = []
        for name in (FRESH, *STARTS):
            for budget, number in [(0, 0), *((BUDGET, number) for number in range(SEEDS))]:
                found = self._once(
                    f"{name} {budget} {number}",
                    _STUDENTS,
                    partial(self._student, name, budget, number),
                )
                scores.append(StudentScore.model_validate(found))
        return DemoResult(
            teacher=packaged_models.TEACHER,
            student=packaged_models.STUDENT,
            teacher_score=teacher_score,
            teacher_sentences=len(self.train),
            test_sentences=len(self.test),
            rows=summarise(scores, teacher_score),
            runs=scores,
            folders={"teacher": str(self.module), **{name: str(self._graft(name)) for name in STARTS}},
            text=str(self.text),
            seconds=0.0,
            versions=versions(),
            hardware=hardware("cpu"),
        )

    def finish(self) -> None:
        """Remove what only an interrupted demo needs."""
        self._state.unlink()

    def _once(self, part: str, stage: str, do: Callable[[], Any]) -> Any:
        """What a part found, done unless it is done already."""
        if part not in self._parts:
            with self.run.stage(stage):
                self._parts[part] = do()
            self._keep()
        return self._parts[part]

    def _keep(self) -> None:
        seconds = self.seconds + time.perf_counter() - self._started
        write_json(self._state, {**self._made_by, "parts": self._parts, "seconds": round(seconds, 1)})

    def _on_step(self, stage: str, place: int = 0, of: int = 1) -> Callable[[int, int, float], None]:
        """Tells of the steps of one training, the one of this place among others of its stage."""
        return lambda step, steps, loss: self.run.step(stage, place * steps + step, of * steps, loss)

    def _graft(self, name: str) -> Path:
        return self.folder / STARTS[name][0]

    def _train_teacher(self) -> float:
        model = new_module(self.teacher, Library.PEFT, self.task, self.seed)
        rows = self.task.encode(self.train, self.tokenizer)
        settings = TEACHER_SETTINGS.model_copy(update={"seed": self.seed})
        fine_tune(model, rows, self.tokenizer, settings, on_step=self._on_step(_TEACHER))
        with written_aside(self.module, force=True) as staging:
            save_module(model, staging, Library.PEFT, self.task)
            model.config.save_pretrained(staging)  # the label names, which peft does not store
        return score(model, self.task.encode(self.test, self.tokenizer), self.tokenizer, self.task)

    def _move(self, name: str) -> str:
        """Transfer; an interrupted polish goes on."""
        config = STARTS[name][1].model_copy(update={"seed": self.seed, "force": True})
        graft = transfer(
            self.module,
            student=self.student,
            out=self._graft(name),
            text=self.text,
            config=config,
            callbacks=self.run.callbacks,
        )
        return graft.report.method

    def _student(self, name: str, budget: int, number: int) -> dict[str, Any]:
        seed, task = self.seed + number, self.task
        if name == FRESH:
            model = new_module(self.student, Library.PEFT, task, seed)
        else:
            model = load_module(self.student, self._graft(name), Library.PEFT, task)
        rate = STUDENT_SETTINGS.learning_rate * (FITTED_RATE if name.startswith("default") else 1)
        settings = STUDENT_SETTINGS.model_copy(update={"seed": seed, "learning_rate": rate})
        few: list[TaggedSentence] = self.train[number * budget : (number + 1) * budget]
        seconds = 0.0
        if few:
            rows, place = task.encode(few, self.tokenizer), [FRESH, *STARTS].index(name) * SEEDS + number
            on_step = self._on_step(_STUDENTS, place, (1 + len(STARTS)) * SEEDS)
            seconds = fine_tune(model, rows, self.tokenizer, settings, on_step=on_step).seconds
        found = score(model, task.encode(self.test, self.tokenizer), self.tokenizer, task)
        return {"start": name, "budget": len(few), "seed": seed, "score": found, "seconds": round(seconds, 2)}


def summarise(scores: Sequence[StudentScore], teacher_score: float) -> list[Row]:
    """Mean and standard deviation over seeds, and the share of the gain recovered, per start and budget."""
    groups: dict[tuple[int, str], list[float]] = {}
    for one in scores:
        groups.setdefault((one.budget, one.start), []).append(one.score)
    rows = []
    for (budget, start), values in groups.items():
        mean, fresh = statistics.fmean(values), groups.get((budget, FRESH))
        share = share_of_gain(mean, statistics.fmean(fresh), teacher_score) if fresh and start != FRESH else None
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(Row(start=start, budget=budget, mean=mean, spread=spread, seeds=len(values), share_of_gain=share))
    return rows


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
