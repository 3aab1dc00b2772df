"""The command ``schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from peft_graft.cli.late import command
from peft_graft.cli.output import print_json


@command
def schema(
    verb: Annotated[
        str, typer.Argument(help="A verb, with the option that changes its result: 'demo --llm'; or error.")
    ],
) -> None:
    """Print the JSON schema of what a verb prints with --json, or of an error.

    Example:
        peft-graft schema transfer > transfer.schema.json
    """
    from peft_graft.cli.schemas import schema_of

    print_json(schema_of(verb))
