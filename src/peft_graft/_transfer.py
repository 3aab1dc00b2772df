"""``transfer``: a trained module moved to another model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_graft.alignment.alignment import Alignment
from peft_graft.alignment.text import TextLike
from peft_graft.config import GraftConfig, known_arguments
from peft_graft.graft import Graft
from peft_graft.models.devices import placed
from peft_graft.move import Move
from peft_graft.outlook import outlook
from peft_graft.outputs import check_apart, check_place, reserving_output
from peft_graft.planning.sources import ModelLike, Tokenizers, config_of_live
from peft_graft.processes import Processes
from peft_graft.progress import watchers
from peft_graft.prompts.read import PromptLike
from peft_graft.run import UNFINISHED, Callback, Run
from peft_graft.surroundings import undisturbed


@known_arguments(GraftConfig)
@reserving_output
@undisturbed
def transfer(  # what moves, from where, to where, on which text: these differ from call to call, all else is config
    adapter: str | Path | nn.Module | Graft,
    student: ModelLike,
    *,
    teacher: ModelLike | None = None,
    text: TextLike | PromptLike | None = None,
    seeds: PromptLike | None = None,
    alignment: str | Path | Alignment | None = None,
    out: str | Path | None = None,
    config: GraftConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] | None = None,
    tokenizers: Tokenizers | None = None,
) -> Graft:
    """Move a trained module to another model.

    Among the processes of torchrun or accelerate each runs its share of the text, of the prompts and of every batch
    that is learned from; all return the same graft, and the first writes.

    Args:
        adapter: folder or hub id of a checkpoint of peft or adapters, a live ``peft.PeftModel``, or a ``Graft``.
        student: folder or hub id of the model that receives the module, or a live model of transformers.
        teacher: the model that the module was trained on, if its configuration does not name it; a live
            ``PeftModel`` brings its own.
        text: unlabelled text to align, fit, polish and judge on: a file, a data set of the hub
            (``alignment.text.read_text``), or strings, pairs of strings and lists of tokens, or rows of a list, a
            ``datasets.Dataset`` or a ``pandas.DataFrame``. For a language model also
            prompts (``prompts.read.PromptSource``), whose answers by the teacher are learned.
        seeds: in place of text, 5 to 15 examples of prompts for a language model, as a file or in memory, with an
            answer or without: the teacher's base makes more of their kind (``distill.make_prompts``).
        alignment: a saved alignment of the two models, or a live one; no text is needed then.
        out: folder to write the graft to (``Graft.save_pretrained``). State of an interrupted run is kept beside it,
            and the same call goes on from there. Nothing is written without it.
        config: how to move it; a ``GraftConfig``, or a dict of its fields.
        callbacks: watch the run; ``ProgressCallback`` in notebooks and terminals by default.
        tokenizers: the teacher's and the student's, of live models; by default those that lie where they come from.

    Returns:
        The graft, also when it was not written.

    Raises:
        GraftError: one of its kinds, naming the site or option, what was expected, what came and the fix. All that
            can be known without weights is checked before any weights are loaded.
    """
    config = config_of_live(placed(GraftConfig.of(config)), student)
    if out is not None:
        check_place(Path(out), force=config.force)
    move = Move.planned(
        adapter,
        student,
        teacher=teacher,
        text=text,
        seeds=seeds,
        alignment=alignment,
        config=config,
        tokenizers=tokenizers,
    )
    check_apart(out, [adapter, move.sources.teacher, move.sources.student, text, seeds, alignment])
    return moved(move, out, callbacks)


def moved(move: Move, out: str | Path | None, callbacks: Sequence[Callback] | None) -> Graft:
    """A planned transfer carried out, and written where a place is named; arguments and errors as for ``transfer``."""
    move.check_ray()
    processes = Processes.started()
    work = Path(f"{out}{UNFINISHED}") if out is not None and processes.first else None
    run = Run(watchers(callbacks) if processes.first else (), work, processes)
    run.planned(lambda: outlook(move))
    with run.stage("loading models"):
        models = move.sources.loaded(tokenizers=move.reads_text)
    graft = move.carried_out(models, run)
    if out is not None and processes.first:
        graft = written(graft, Path(out), run)
    processes.wait()
    return graft


def written(graft: Graft, out: Path, run: Run) -> Graft:
    """The graft in its folder, verified; the state of unfinished work goes."""
    with run.stage("writing and verifying"):
        graft = graft.save_pretrained(out, force=graft.report.settings.force)
    shutil.rmtree(f"{out}{UNFINISHED}", ignore_errors=True)
    return graft
