"""How ``align`` aligns two models."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import (
    BeforeValidator,
    Field,
    model_validator,
)

from peft_graft.config.base import (
    HOW,
    WHAT,
    Option,
    as_names,
    check_method,
)
from peft_graft.config.graft import PairConfig


class AlignConfig(PairConfig):
    """How ``align`` aligns two models.

    Attributes:
        sites: roles to cover, such as ``("attn.query", "attn.value")``, ``adapter`` for bottleneck adapters; all when
            None.
    """

    method: Annotated[str, Option(HOW, "prune-align unless told otherwise; procrustes or ridge.")] = Field(
        default="prune-align", description="The method whose maps to find."
    )
    sites: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_names),
        Option(WHAT, "Roles to cover, such as attn.query,attn.value; all by default."),
    ] = Field(default=None, description="Roles to cover, such as attn.query,attn.value or adapter; all by default.")

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        check_method(self.method, allow_auto=False)
        return self
