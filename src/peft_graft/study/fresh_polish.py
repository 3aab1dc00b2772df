"""A fresh module polished on the teacher's answers: what a graft has to be better than."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import TextSource
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.raw import RawCheckpoint
from peft_graft.checkpoints.read import read_checkpoint
from peft_graft.checkpoints.resolve import PeftCheckpoint, checkpoint_of_student, resolve
from peft_graft.checkpoints.student_names import written_names
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Verdict, judge
from peft_graft.distill.candidates import Candidate
from peft_graft.distill.choose import Outcome
from peft_graft.distill.polish import PolishRecord, PolishSettings, polish
from peft_graft.distill.teacher import FIT, ask_teacher
from peft_graft.files import written_aside
from peft_graft.models.loading import ModelHandle
from peft_graft.planning.sources import ModelSources, ModuleSource
from peft_graft.run import Run

#: Samples that are looked at, as ``transfer`` does.
_POOL = 20_000
#: Stands where a graft names its method.
_FRESH = "fresh"


def polish_fresh_module(
    trained: Path, fresh: Path, models: tuple[str, str], text: Path, out: Path, config: GraftConfig, run: Run
) -> tuple[Verdict, PolishRecord | None]:
    """Polish an untrained module and head as ``transfer`` polishes a graft, and write the checkpoint.

    Args:
        trained, fresh: checkpoints, of the teacher's module and of the student's untrained one.
        models: teacher and student, by folder or hub id.
        run: its work folder keeps the state of an interrupted polish.

    Returns:
        How the polished module agrees with the teacher, and the record of the polish.
    """
    module = ModuleSource.of(trained, config)
    with run.stage("loading models"):
        pair = ModelSources.of(module, *models, config, None).loaded(tokenizers=True)
    theirs, own = _resolved(module.raw, pair.teacher), _resolved(read_checkpoint(fresh), pair.student)
    pool = list(islice(TextSource(text, config.columns, config.seed).samples(), _POOL))
    # An untrained head takes the rate of the module, which is chosen by a trial as for a graft.
    settings = PolishSettings(steps=config.polish_steps, head_rate=1.0, seed=config.seed)
    distillation = ask_teacher(
        theirs, pair, pool, run,
        train=max(FIT, settings.steps * settings.batch_size), bf16=config.dtype == "bfloat16",
    )  # fmt: skip
    empty = Alignment(_FRESH, "", "", {})
    candidate = Candidate(_FRESH, empty, own, [], None, distillation, distillation.attach(own))
    identity = f"{pair.fingerprints}{dict(module.raw.files)}{dict(own.raw.files)}{config.record()}{len(pool)}"
    outcome, record = polish(Outcome(candidate, None, judge(candidate.measure())), settings, run, identity=identity, starts=("moved",))
    raw = checkpoint_of_student(outcome.candidate.checkpoint, pair.student)
    with written_aside(out, force=True) as staging:
        write_checkpoint(staging, raw, written_names(pair.student, raw.task))
    return outcome.verdict, record


def _resolved(raw: RawCheckpoint, model: ModelHandle) -> PeftCheckpoint:
    return resolve(raw, model.architecture, model.base_tensors())
