"""A fresh module polished on the teacher's answers: what a graft has to be better than."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import read_text
from peft_graft.checkpoints.resolve import read_checkpoint, resolve, write_checkpoint
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import judge
from peft_graft.distill.choose import FIT, Candidate, Outcome, open_classroom, polished
from peft_graft.distill.polish import PolishSettings
from peft_graft.files import written_aside
from peft_graft.graft import checkpoint_of_student, written_names
from peft_graft.models.loading import load_model
from peft_graft.run import Callback
from peft_graft.settings import Clock

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
    start = time.perf_counter()
    first, second = (load_model(name, device=config.device, dtype=config.dtype, tokenizer=True)
                     for name in (teacher, student))  # fmt: skip
    trained = resolve(read_checkpoint(teacher_module), first.architecture, first.base_tensors())
    checkpoint = resolve(read_checkpoint(fresh), second.architecture, second.base_tensors())
    # An untrained head takes the rate of the module, which is chosen by a trial as for a graft.
    settings = PolishSettings(steps=config.polish_steps, head_rate=1.0, seed=config.seed)
    clock = Clock(None)
    room = open_classroom(
        trained, first, second, list(islice(read_text(text, None, config.seed), _POOL)),
        lessons=max(FIT, settings.steps * settings.batch_size), write=None,
        bf16=config.dtype == "bfloat16", clock=clock,
    )  # fmt: skip
    before = Outcome(
        Candidate("fresh", Alignment("fresh", "", "", {}), checkpoint, [], None), None, judge(None), {}, {}
    )
    identity = f"{first.fingerprint}{second.fingerprint}{config.record()}{trained.raw.files}{checkpoint.raw.files}"
    outcome = polished(room, before, settings, work=work, identity=identity, clock=clock, starts=("moved",))
    raw = checkpoint_of_student(outcome.candidate.checkpoint, second)
    with written_aside(out, force=True) as staging:
        write_checkpoint(staging, raw, written_names(second, raw.task))
    return {
        "verdict": outcome.verdict.model_dump(mode="json"),
        "polish": outcome.polish.model_dump(mode="json") if outcome.polish else None,
        "seconds": {**clock.seconds, "all": round(time.perf_counter() - start, 1)},
    }
