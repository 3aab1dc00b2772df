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
    TEXT,
    WHERE,
    WHO,
    Dtype,
    Option,
    as_dict,
    as_names,
)
from peft_graft.config.graft_place import GraftPlaceConfig
from peft_graft.labels import ProblemType, given_names


class EvaluateConfig(GraftPlaceConfig):
    """How ``evaluate`` puts labelled text, such as prompts with answers, to a graft and to the models around it.

    Attributes:
        format, student_format, system, template_args, max_new_tokens: as for ``GraftConfig``; what the graft was made
            with where nothing is said.
        module: the teacher's module, if it is not where the graft's report says.
    """

    columns: Annotated[
        tuple[str, ...] | None,
        BeforeValidator(as_names),
        Option(TEXT, "Columns of prompt and answer, or of text and label: message,label."),
    ] = Field(
        default=None,
        description="Columns of prompt and answer, or of text and label, if they have no usual names: question,answer.",
    )
    limit: Annotated[int | None, Option(TEXT, "Prompts or texts at most; all by default.")] = Field(
        default=None, ge=1, description="Prompts or texts at most, in random order; all by default."
    )
    labels: Annotated[tuple[str, ...] | None, BeforeValidator(given_names), Option(TEXT)] = Field(
        default=None,
        description="Names of a classifier's classes where no file has them: O,B-PER,I-PER, or a JSON or text file.",
    )
    problem_type: Annotated[ProblemType | None, Option(TEXT)] = Field(
        default=None,
        description="What the outputs of a classifier of whole texts are, where neither the report nor files say it.",
    )
    seed: Annotated[int, Option(TEXT)] = Field(
        default=0, description="Of the order of rows, of draws with a temperature, and of the intervals."
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
