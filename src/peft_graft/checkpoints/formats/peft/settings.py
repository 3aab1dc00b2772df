"""What peft's configurations have to hold, as far as it is looked at."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peft_graft.record import Stored

Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Names = list[str]


class _Mapping(Stored):
    base_model_class: str | None = None


class PeftSettings(Stored):
    """Types of the options that are read, of all kinds; what they mean is up to each kind's codec."""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = Field(None, max_length=4096)
    auto_mapping: _Mapping | None = None
    target_modules: Names | str | None = None
    exclude_modules: Names | str | None = None
    modules_to_save: Names | None = None
    inference_mode: bool | None = None
    # LoRA and its relatives
    r: Count | None = None
    lora_alpha: Number = 8
    lora_dropout: Annotated[float, Field(ge=0, le=1)] | None = None
    rank_pattern: dict[str, Count | list[bool]] | None = None
    alpha_pattern: dict[str, Number] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | str | None = None
    trainable_token_indices: list[Count] | dict[str, list[Count]] | None = None
    feedforward_modules: Names | str | None = None
    # virtual tokens
    num_virtual_tokens: Count | None = None
    num_transformer_submodules: Count | None = None
    num_attention_heads: Count | None = None
    num_layers: Count | None = None
    token_dim: Count | None = None
