"""How ``study`` runs cells."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
)

from peft_graft.config.base import (
    OUTPUT,
    WHAT,
    WHERE,
    Config,
    Option,
)


class StudyConfig(Config):
    """How ``study`` runs the cells of a study file."""

    ray: Annotated[str | None, Option(WHERE, "Run on Ray: local, or a cluster's address.")] = Field(
        default=None, description="Run on Ray: local for this machine, or a cluster's address."
    )
    cpus: Annotated[float, Option(WHERE)] = Field(default=1, description="CPUs that one cell takes on Ray.")
    gpus: Annotated[float, Option(WHERE)] = Field(default=0, description="GPUs that one cell takes on Ray.")
    only: Annotated[str | None, Option(WHAT, "Only cells whose id matches this pattern, and what they need.")] = Field(
        default=None, description="Only cells whose id matches this pattern, and what they need."
    )
    export: Annotated[
        str | None, Option(OUTPUT, "Add finished results to this file, a line of JSON each.", decides=False)
    ] = Field(None, description="Add the results of the finished cells to this file, a line of JSON each.")
