"""Where the graft of a verb lies."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from peft_graft.config.base import LOADING, Config, Force, Option, Token, TrustRemoteCode


class GraftPlaceConfig(Config):
    """Choices of every verb that reads a graft: where it lies, and whether what is written replaces something."""

    revision: Annotated[str | None, Option(LOADING)] = Field(default=None, description="Hub revision of the graft.")
    subfolder: Annotated[str | None, Option(LOADING)] = Field(
        default=None, description="Folder of the graft in its repository."
    )
    token: Token = None
    trust_remote_code: TrustRemoteCode = False
    force: Force = False

    @property
    def place(self) -> dict[str, Any]:
        """What tells one folder of a repository from others, and opens it."""
        return {"revision": self.revision, "subfolder": self.subfolder, "token": self.token}
