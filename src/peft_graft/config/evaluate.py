"""How ``evaluate`` asks a graft and the models around it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
)

from peft_graft.config.base import (
    ANSWERS,
    AUTO,
    PROMPTS,
    WHERE,
    WHO,
    Dtype,
    Option,
    as_dict,
)
from peft_graft.config.graft_place import GraftPlaceConfig


class EvaluateConfig(GraftPlaceConfig):
    """How ``evaluate`` puts prompts with answers to a graft and to the models around it.

    Attributes:
        format, student_format, system, template_args, max_new_tokens: as for ``GraftConfig``; what the graft was made
            with where nothing is said.
        module: the teacher's module, if it is not where the graft's report says.
    """

    columns: Annotated[tuple[str, ...] | None, Option(PROMPTS)] = Field(
        default=None, description="Columns of prompt and answer, where they have no usual names: question,answer."
    )
    limit: Annotated[int | None, Option(PROMPTS, "Prompts that are asked at most; all by default.")] = Field(
        default=None, ge=1, description="Prompts that are asked at most, in random order; all by default."
    )
    seed: Annotated[int, Option(PROMPTS)] = Field(
        default=0, description="Of the order of prompts, of draws with a temperature, and of the intervals."
    )
    format: Annotated[
        str | None, Option(PROMPTS, "How a prompt is put, if not by the chat template: 'Q: {prompt}\\nA:'.")
    ] = Field(
        default=None,
        description="How the module was trained to read a prompt, if not as the graft's report says or by its model's "
        "chat template: 'Question: {prompt}\\nAnswer:'.",
    )
    student_format: Annotated[str | None, Option(PROMPTS)] = Field(
        default=None, description="The student's format, where it differs: chat for its chat template."
    )
    system: Annotated[str | None, Option(PROMPTS)] = Field(
        default=None, description="System message of prompts that have none."
    )
    template_args: Annotated[dict[str, Any] | None, Option(PROMPTS)] = Field(
        default=None, description='Arguments of the chat templates as JSON, such as {"enable_thinking": false}.'
    )
    max_new_tokens: Annotated[int | None, Option(ANSWERS)] = Field(
        default=None, ge=1, description="Tokens of an answer, 256 where the graft's report says nothing; more are cut."
    )
    temperature: Annotated[float, Option(ANSWERS)] = Field(
        default=0.0, ge=0, description="Draw answers; 0 takes the likeliest token always."
    )
    teacher_base: Annotated[bool, Option(WHO)] = Field(
        default=False, description="Also the teacher's model without its module."
    )
    module: Annotated[str | None, Option(WHO)] = Field(
        default=None, description="The module that was moved, if it is not where the graft's report says."
    )
    device: Annotated[str, Option(WHERE, "auto, cpu, cuda, cuda:1, ...")] = Field(
        default=AUTO, description="cpu, cuda, cuda:1, ...; auto is the GPU where there is one."
    )
    device_map: Annotated[str | dict[str, Any] | None, Option(WHERE)] = Field(
        default=None, description="auto spreads the layers over what is there (accelerate), in place of --device."
    )
    dtype: Annotated[Dtype, Option(WHERE, "of the models.")] = Field(default="float32", description="Of the models.")
    quantization_config: Annotated[dict[str, Any] | None, BeforeValidator(as_dict), Option(WHERE)] = Field(
        default=None,
        description="Load the models quantised: transformers' quantization_config as JSON, such as "
        '{"load_in_4bit": true}.',
    )
