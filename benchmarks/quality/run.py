"""What grafts are worth: fresh, copied, pruned, fitted and polished students on real encoders, tasks and label budgets.

    python benchmarks/quality/run.py --models MODELS --data DATA --out out/quality [--pairs ...] [--tasks ...]

MODELS holds the folders named in cells.py, DATA the folders of TASKS with train.parquet and test.parquet. Every run is
one JSON file in OUT/runs; finished runs are not repeated, so several processes may share OUT, and an interrupted one
goes on. ``report.py`` makes the tables from those files alone. Learning rates are chosen for the fresh module, on
held-out examples of the train file, once for each student, task and budget; moved modules take the same, fitted ones a
tenth. Test files are only scored.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from pathlib import Path

import torch
import transformers
from cells import PAIRS, TASKS, Data, teacher
from peft_graft.options import POLISH
from peft_graft.settings import Clock

import peft_graft
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import resolve
from peft_graft.distill.agreement import judge
from peft_graft.distill.choose import FIT, Candidate, Outcome, open_classroom, polished
from peft_graft.distill.polish import PolishSettings
from peft_graft.environment import hardware, versions
from peft_graft.files import read_json, write_json, written_aside
from peft_graft.graft import checkpoint_of_student, written_names
from peft_graft.models.loading import load_model
from peft_graft.study.comparison import load_module, new_module, save_module
from peft_graft.study.training import TrainingSettings, Watch, fine_tune, score, taught

#: budget -> epochs; None is all that there is.
BUDGETS = {100: 20, 1000: 5, None: 3}
RATES = (1e-3, 3e-3)
#: start -> options of transfer; None: the student's own fresh module.
STARTS = {
    "fresh": None,
    "default": {},
    "default, distilling": {},
    "polish from fresh": {},
    "half polish": {"polish": POLISH // 2},
    "fitted, no polish": {"polish": 0},
    "prune-align": {"method": "prune-align", "head": "carry"},
    "copy": {"method": "copy", "head": "carry"},
}
#: A module that is fitted already is trained on with a tenth of the rate that suits a fresh one (chosen on held-out
#: examples of L6-L3, NER, 100 labels: 0.592 with a tenth, 0.569 with a third, 0.522 with the same rate).
POLISHED = ("default", "default, distilling", "half polish", "fitted, no polish", "polish from fresh")
POLISHED_RATE = 0.1
#: Weight of the teacher's answers beside the labels, for the start that goes on distilling while it learns from labels.
DISTILLATION = 0.5


class Bench:
    def __init__(self, args):
        self.args, self.out = args, args.out
        self.datas = {name: Data(name, args.data / TASKS[name]) for name in args.tasks}
        (self.out / "runs").mkdir(parents=True, exist_ok=True)

    def tokenizer(self, model):
        return transformers.AutoTokenizer.from_pretrained(self.args.models / model)

    # ---- what a run is -----------------------------------------------------------------------------------------------

    def run(self, pair, task, start, budget, seed):
        """One run: a student from a start, with a budget of labels, scored on the test rows."""
        models = PAIRS[pair]
        owner = f"{models.student}{models.mark}" if start == "fresh" else pair
        name = _slug(f"{owner}-{task}-{start}-{'all' if budget is None else budget}-{seed}")
        path = self.out / "runs" / f"{name}.json"
        lock = path.with_suffix(".lock")
        if path.exists() or not _claim(lock):
            return
        try:
            record = self._run(pair, task, start, budget, seed)
        finally:
            lock.unlink(missing_ok=True)
        record |= {"owner": owner, "task": task, "start": start, "budget": budget, "seed": seed}
        record |= {"versions": versions(), "hardware": hardware("cpu")}
        write_json(path, record)
        print(f"{name}: {record['score']:.3f} ({record.get('seconds', 0)} s)", flush=True)

    def _run(self, pair, task, start, budget, seed):
        data, models = self.datas[task], PAIRS[pair]
        base, tokenizer, record = self.args.models / models.student, self.tokenizer(models.student), {}
        if start == "fresh":
            model = new_module(base, models.library, data.task, seed)
        else:
            folder = self.graft(pair, task, start.removesuffix(", distilling"), seed)
            record["graft"] = read_json(folder / "bench.json")
            torch.manual_seed(seed)
            model = load_module(base, folder, models.library, data.task)
        if budget != 0:
            examples = data.train if budget is None else random.Random(seed).sample(data.train, budget)
            rate = self.rate(models, task, budget) * (POLISHED_RATE if start in POLISHED else 1)
            distillation = DISTILLATION if start.endswith("distilling") else 0.0
            settings = TrainingSettings(
                learning_rate=rate, epochs=BUDGETS[budget], seed=seed, bf16=True, distillation=distillation
            )  # fmt: skip
            rows = data.task.encode(examples, tokenizer)
            watch = Watch(data.task.encode(data.held_out[:300], tokenizer), data.task, tokenizer, keep_best=False)
            if distillation:
                module, _ = teacher(self.out, self.args.models, models, data)
                theirs = self.tokenizer(models.teacher)
                rows = taught(
                    rows, load_module(self.args.models / models.teacher, module, models.library, data.task),
                    data.task.encode(examples, theirs), theirs,
                )  # fmt: skip
            record["seconds"] = round(fine_tune(model, rows, tokenizer, settings, watch), 1)
            record |= {"settings": settings.model_dump(), "held_out_curve": watch.curve}
        record["score"] = score(model, data.task.encode(data.test, tokenizer), tokenizer, data.task)
        return record

    def rate(self, models, task, budget):
        """The learning rate that suits the fresh module best on held-out examples, with a draw of its own."""
        budget = budget or 1000
        path = self.out / "rates" / f"{models.student}{models.mark}-{task}-{budget}.json"
        if not path.exists():
            data, tokenizer, scores = self.datas[task], self.tokenizer(models.student), {}
            examples = data.task.encode(random.Random(10_000).sample(data.train, budget), tokenizer)
            held_out = data.task.encode(data.held_out, tokenizer)
            for rate in RATES:
                model = new_module(self.args.models / models.student, models.library, data.task, 10_000)
                settings = TrainingSettings(learning_rate=rate, epochs=BUDGETS[budget], seed=10_000, bf16=True)
                fine_tune(model, examples, tokenizer, settings)
                scores[rate] = score(model, held_out, tokenizer, data.task)
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"scores": {str(r): s for r, s in scores.items()}, "best": max(scores, key=scores.get)})
            print(f"{models.student}{models.mark} {task} {budget}: rates {scores}", flush=True)
        return read_json(path)["best"]

    # ---- grafts ------------------------------------------------------------------------------------------------------

    def graft(self, pair, task, start, seed):
        """The folder of a graft, made when it is not there; explicit methods do not depend on the seed."""
        options = STARTS[start]
        if "method" in options:
            seed = 0
        folder = self.out / "grafts" / _slug(f"{pair}-{task}-{start}-{seed}")
        if folder.exists():
            return folder
        data, models = self.datas[task], PAIRS[pair]
        module, _ = teacher(self.out, self.args.models, models, data)
        begin = time.perf_counter()
        first = load_model(str(self.args.models / models.teacher), tokenizer=True)
        second = load_model(str(self.args.models / models.student), tokenizer=True)
        checkpoint = read_checkpoint(module)
        text = data.text(seed)
        if start == "polish from fresh":
            raw, record = self._polish_from_fresh(checkpoint, first, second, text, data, models, seed)
        else:
            graft = peft_graft.transfer_checkpoint(
                checkpoint, first.base, second.base, teacher_tokenizer=first.tokenizer,
                student_tokenizer=second.tokenizer, text=text, seed=seed, dtype="bfloat16", max_tokens=20_000,
                **options,
            )  # fmt: skip
            raw, record = graft.raw(), {
                "method": graft.report.method, "head": graft.report.head.how if graft.report.head else None,
                "verdict": graft.report.verdict.model_dump(), "seconds": graft.report.seconds,
                "tried": {name: found.model_dump() for name, found in graft.report.tried.items()},
                "polish": graft.report.polish.model_dump() if graft.report.polish else None,
            }  # fmt: skip
        record["total_seconds"] = round(time.perf_counter() - begin, 1)
        with written_aside(folder) as staging:
            write_checkpoint(staging, raw, written_names(second, raw.task))
            write_json(staging / "bench.json", record)
        return folder

    def _polish_from_fresh(self, checkpoint, first, second, text, data, models, seed):
        """The polish that the default does, started from an untrained module and head."""
        module = self.out / "grafts" / f"fresh-{models.student}{models.mark}-{data.name}-{seed}"
        if not module.exists():
            with written_aside(module) as staging:
                fresh = new_module(self.args.models / models.student, models.library, data.task, seed)
                save_module(fresh, staging, models.library, data.task)
        taught = resolve(checkpoint, first.architecture, first.base_tensors())
        raw = read_checkpoint(module)
        fresh = resolve(raw, second.architecture, second.base_tensors())
        # An untrained head takes the module's rate, chosen by a trial as for a graft.
        settings = PolishSettings(steps=POLISH, head_rate=1.0, seed=seed)
        clock = Clock(None)
        room = open_classroom(
            taught, first, second, text, lessons=max(FIT, POLISH * settings.batch_size), write=None, bf16=True,
            clock=clock,
        )  # fmt: skip
        start = Outcome(Candidate("fresh", None, fresh, [], None), None, judge(None), {}, {})
        outcome = polished(room, start, settings, work=None, identity="", clock=clock, starts=("moved",))
        record = {"verdict": outcome.verdict.model_dump(), "polish": outcome.polish.model_dump(),
                  "seconds": clock.seconds}  # fmt: skip
        return checkpoint_of_student(outcome.candidate.checkpoint, second), record


def _slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-")


def _claim(lock: Path) -> bool:
    """Whether this process may do a run: no living process has claimed it."""
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        try:
            os.kill(int(lock.read_text() or 0), 0)
        except (ProcessLookupError, ValueError, FileNotFoundError):
            lock.unlink(missing_ok=True)
            return _claim(lock)
        return False
    os.write(handle, str(os.getpid()).encode())
    os.close(handle)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--tasks", nargs="+", default=["ner", "sick", "mrpc"], choices=list(TASKS))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--budgets", nargs="+", default=["0", "100", "1000", "all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of this process; run one process a core")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    budgets = [None if budget == "all" else int(budget) for budget in args.budgets]
    for seed in args.seeds:  # outermost, so that an interrupted grid leaves whole comparisons
        for pair in args.pairs:
            for task in args.tasks:
                for budget in budgets:
                    for start in args.starts:
                        if start == "fresh" and budget == 0 and seed > 0:
                            continue
                        if start == "copy" and pair == "mpnet-L6":
                            continue
                        bench.run(pair, task, start, budget, seed)


if __name__ == "__main__":
    main()
