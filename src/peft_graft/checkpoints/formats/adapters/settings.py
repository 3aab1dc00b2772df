"""What AdapterHub's configurations have to hold, as far as it is looked at."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from peft_graft.record import Stored

Positive = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=0, le=2**31)]
#: Of an adapter or head; a module of torch, which it becomes, has no dot in its name.
Name = Annotated[str, Field(pattern=r"^[^.]+$", max_length=200)]


class ModuleSettings(Stored):
    """The adapter's own settings, of all kinds."""

    architecture: str | None = None
    alpha: Annotated[float, Field(ge=-1e9, le=1e9)] = 1
    r: Annotated[int, Field(ge=1, le=2**20)] = 1
    composition_mode: str | None = None
    leave_out: list[Count] | None = None
    reduction_factor: Positive | dict[str, Positive] | None = None
    phm_layer: bool | None = None
    ln_before: bool | None = None
    is_parallel: bool | None = None
    original_ln_before: bool | None = None
    flat: bool | None = None
    prefix_length: Count | None = None
    non_linearity: str | None = None
    dropout: float | None = None


class FileSettings(Stored):
    """``adapter_config.json``."""

    config: str | dict[str, Any] | None
    name: Name | None = None
    hidden_size: Count | None = None
    model_name: str | None = Field(None, max_length=4096)
    model_class: str | None = None
    model_type: str | None = None


class _HeadSettings(Stored):
    head_type: str | None = None
    activation_function: str | None = None
    use_pooler: bool | None = None
    num_labels: Count | None = None
    layers: Count | None = None


class HeadFile(Stored):
    """``head_config.json``."""

    config: _HeadSettings | None = None
    name: Name | None = None
    model_class: str | None = None
    num_labels: Count | None = None
