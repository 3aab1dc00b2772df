"""Where the graft of a verb lies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from peft_graft.config.base import LOADING, OUTPUT, Config, Option


class GraftPlaceConfig(Config):
    """Choices of every verb that reads a graft: where it lies, and whether what is written replaces something."""

    revision: Annotated[str | None, Option(LOADING)] = Field(default=None, description="Hub revision of the graft.")
    subfolder: Annotated[str | None, Option(LOADING)] = Field(
        default=None, description="Folder of the graft in its repository."
    )
    token: Annotated[str | None, Option(LOADING, decides=False)] = Field(
        default=None, description="Hub token, for private repositories.", repr=False, exclude=True
    )
    trust_remote_code: Annotated[bool, Option(LOADING)] = Field(
        default=False, description="Run model code that comes with a repository."
    )
    force: Annotated[bool, Option(OUTPUT, "Replace --out if it exists.", decides=False)] = Field(
        default=False, description="Replace --out if it exists."
    )

    @property
    def place(self) -> dict[str, Any]:
        """What tells one folder of a repository from others, and opens it."""
        return {"revision": self.revision, "subfolder": self.subfolder, "token": self.token}
