"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import peft_graft
from peft_graft.cli.display import show_export
from peft_graft.cli.late import command
from peft_graft.cli.output import give
from peft_graft.cli.progress import watching

if TYPE_CHECKING:
    from peft_graft.config import ExportConfig


@command
def export(
    graft: Annotated[str, typer.Argument(help="Folder or hub id of a graft, or of a plain module.")],
    config: ExportConfig,
    to: Annotated[str, typer.Option(help="merged, gguf, vllm, ollama, peft or adapters.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder to write; by default the graft's, with -merged, -gguf, ... behind it.",
            rich_help_panel="Output",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that it is on, if it is not where it was.")] = None,
) -> None:
    """Write a graft for another program: merged, or for llama.cpp, Ollama, vLLM, peft or adapters.

    Example:
        peft-graft export out/graft --to merged -o out/merged
    """
    with watching() as callbacks:
        found = peft_graft.export(graft, to=to, out=out, base=base, config=config, callbacks=callbacks)
    give(found, lambda: show_export(found))
