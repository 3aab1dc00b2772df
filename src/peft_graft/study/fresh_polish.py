"""A fresh module polished on the teacher's answers: what a graft has to be better than."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import read_text
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import judge
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.choose import Outcome
from peft_graft.distill.polish import PolishSettings, polish
from peft_graft.distill.teacher import FIT, Distillation, ask_teacher
from peft_graft.files import written_aside
from peft_graft.models.pair import load_pair
from peft_graft.run import Callback, Run

#: Samples that are looked at, as ``transfer`` does.
_POOL = 20_000


def polish_fresh_module(
    teacher_module: Path, fresh: Path, teacher: str, student: str, text: Path, out: Path, config: GraftConfig,
    *, work: Path, callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:  # fmt: skip
    """Polish an untrained module and head as ``transfer`` polishes a graft, and write the checkpoint.

    Args:
        teacher_module, fresh: checkpoints, of the trained module and of the student's untrained one.
        teacher, student: models by folder or hub id.
        work: folder for the state of an interrupted polish.

    Returns:
        The verdict, the polish and the seconds that stages took, as a graft's report has them.
    """
    start, run = time.perf_counter(), Run(callbacks, work)
    models = load_pair(teacher, student, config, tokenizers=True)
    trained = resolve(read_checkpoint(teacher_module), models.teacher.architecture, models.teacher.base_tensors())
    checkpoint = resolve(read_checkpoint(fresh), models.student.architecture, models.student.base_tensors())
    # An untrained head takes the rate of the module, which is chosen by a trial as for a graft.
    settings = PolishSettings(steps=config.polish_steps, head_rate=1.0, seed=config.seed)
    pool = list(islice(read_text(text, None, config.seed), _POOL))
    train = max(FIT, settings.steps * settings.batch_size)
    bf16 = config.dtype == "bfloat16"
    before = _untrained(ask_teacher(trained, models, pool, run, train=train, bf16=bf16), checkpoint)
    identity = json.dumps([*models.fingerprints, config.record(), dict(trained.raw.files), dict(checkpoint.raw.files)])
    outcome, polished = polish(before, settings, run, identity=identity, starts=("moved",))
    raw = checkpoint_of_student(outcome.candidate.checkpoint, models.student)
    with written_aside(out, force=True) as staging:
        write_checkpoint(staging, raw, written_names(models.student, raw.task))
    return {
        "verdict": outcome.verdict.model_dump(mode="json"),
        "polish": polished.model_dump(mode="json") if polished else None,
        "seconds": {**run.seconds, "all": round(time.perf_counter() - start, 1)},
    }


def _untrained(distillation: Distillation, checkpoint: PeftCheckpoint) -> Outcome:
    """The fresh module where a graft stands before its polish."""
    alignment = Alignment("fresh", "", "", {})
    candidate = Candidate("fresh", alignment, checkpoint, [], None, distillation, distillation.attach(checkpoint))
    return Outcome(candidate, None, judge(candidate.measure()))
