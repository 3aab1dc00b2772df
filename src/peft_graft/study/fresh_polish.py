"""A fresh module, or a control's, polished on the teacher's answers: what a graft has to be better than."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import read_text
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import GraftConfig
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.choose import Outcome, judged
from peft_graft.distill.distillation import Distillation
from peft_graft.distill.polish import PolishSettings, polish
from peft_graft.distill.teacher import FIT, ask_teacher, sample_parts
from peft_graft.models.pair import load_pair
from peft_graft.models.tasks import Task
from peft_graft.outputs import written_aside
from peft_graft.run import Run


def polish_fresh_module(
    modules: tuple[Path, Path],
    models: tuple[str, str],
    text: Path,
    out: Path,
    config: GraftConfig,
    run: Run,
    *,
    moved: Path | None = None,
    fit_head: bool = False,
) -> dict[str, Any]:
    """Polish an untrained module and head as ``transfer`` polishes a graft, and write the checkpoint.

    Args:
        modules: checkpoints of the teacher's trained module and of the student's untrained one.
        models: teacher and student by folder or hub id.
        run: with a folder for the state of an interrupted polish.
        moved: a checkpoint on the student, at the same sites, whose module takes the untrained one's place.
        fit_head: whether the head is fitted to the teacher's answers first, as a graft's is.

    Returns:
        The verdict, the polish and the seconds that stages took, as a graft's report has them.
    """
    start = time.perf_counter()
    pair = load_pair(*models, config, tokenizers=True)
    trained, checkpoint = (
        resolve(read_checkpoint(folder), model.architecture, model.base_tensors())
        for folder, model in zip(modules, (pair.teacher, pair.student), strict=True)
    )
    if moved is not None:
        source = resolve(
            read_checkpoint(moved), pair.student.architecture, pair.student.base_tensors(), with_head=False
        )
        checkpoint = replace(checkpoint, modules=source.modules)
    # An untrained head takes the rate of the module, which is chosen by a trial as for a graft.
    settings = PolishSettings(steps=config.polish_steps, seed=config.seed, **({} if fit_head else {"head_rate": 1.0}))
    questions = trained.raw.task is Task.QUESTION_ANSWERING
    parts = sample_parts(read_text(text, None, config.seed), questions=questions)
    train = max(FIT, settings.steps * settings.batch_size)
    before = _untrained(
        ask_teacher(trained, pair, parts, run, train=train, config=config), checkpoint, fit_head=fit_head
    )
    files: list[object] = [dict(module.raw.files) for module in (trained, checkpoint)]
    if moved is not None or fit_head:
        files += [dict(source.raw.files) if moved is not None else None, fit_head]
    content = parts.digest(lambda sample: sample.texts)
    identity = json.dumps([*pair.keys, config.record(), *files, content])
    outcome, polished = polish(before, settings, run, identity=identity, starts=("moved",))
    raw = checkpoint_of_student(outcome.candidate.checkpoint, pair.student)
    with written_aside(out, force=True) as staging:
        write_checkpoint(staging, raw, written_names(pair.student, raw.task))
    return {
        "verdict": judged(outcome, run, seed=config.seed).model_dump(mode="json"),
        "polish": polished.model_dump(mode="json") if polished else None,
        "seconds": {**run.seconds, "all": round(time.perf_counter() - start, 1)},
    }


def _untrained(distillation: Distillation, checkpoint: PeftCheckpoint, *, fit_head: bool) -> Outcome:
    """The module where a graft stands before its polish."""
    alignment = Alignment("fresh", "", "", {})
    candidate = Candidate("fresh", alignment, checkpoint, [], None, distillation, distillation.attach(checkpoint))
    if fit_head:
        candidate.checkpoint, _ = candidate.fit_head(checkpoint)
        candidate.put(candidate.checkpoint)
    return Outcome(candidate, None, found=candidate.measure())
