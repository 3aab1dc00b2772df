"""Every choice of a user: one model per verb, from which the command line, studies and records are made.

Nothing here imports torch, so that ``peft-graft --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from peft_graft.errors import PlanError
from peft_graft.labels import Labels

AUTO = "auto"
#: Paired tokens that an alignment sees at most, where nothing else is said.
MAX_TOKENS = 50_000
#: Steps of the polish where nothing else is said.
POLISH_STEPS = 1000
#: Prompts that the teacher answers, and passes over them in a polish of at most ``POLISH_STEPS``, where nothing else is
#: said.
MAX_PROMPTS, PROMPT_PASSES = 2000, 4
#: Prompts that are made of examples.
MADE_PROMPTS = 500
#: What ``--student-format`` takes for the chat template.
CHAT = "chat"
#: The method that moves nothing.
FRESH = "fresh"
#: Built-in methods in one line each, in the order of help pages; ``alignment.methods.register_method`` adds to them.
METHOD_SUMMARIES: dict[str, str] = {
    "copy": "leave the weights as they are; for a student that shares the teacher's spaces",
    "prune-align": "correlate units over text, assign them one to one, reorder and prune the weights",
    "procrustes": "rotate one space onto the other, with one scale",
    "ridge": "regress one space on the other, one map for reading and one for writing",
    "functional": "fit a LoRA layer by layer so that the student's layers move as the teacher's do",
    "fresh": "begin from a module of the same form that changes nothing, and leave it all to the polish",
    "prune-align-published": "prune-align with LoRA's output rows pruned by the indices of its input, as in the "
    "paper's code",
}


class Library(StrEnum):
    """The library that a checkpoint is for."""

    PEFT = "peft"
    ADAPTERS = "adapters"


HeadChoice = Literal["auto", "carry", "fit", "drop"]
Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class Option:
    """How a field appears on the command line.

    Attributes:
        panel: the part of the help page that it stands in.
        decides: whether the result depends on it; what does not is left out of keys and records.
        later: whether it came after results were published: at its default it is left out too, so that keys stay.
    """

    panel: str
    decides: bool = True
    later: bool = False


_WHAT, _HOW, _WHERE, _LOADING, _OUTPUT = "What moves", "How it moves", "Where it runs", "Loading", "Output"
_PROMPTS = "Prompts, for language models"
_ANSWERS, _WHO = "Answers", "Who is asked"


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, defer_build=True)

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Validation errors as the one error that users of this package know."""
        try:
            return handler(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "extra_forbidden":
                raise PlanError(
                    "there is no such option", where=option_name(name), expected=", ".join(cls.model_fields)
                ) from None
            if first["type"] == "greater_than_equal":
                least = first["ctx"]["ge"]
                raise PlanError(
                    "must be positive" if least else "must not be negative",
                    where=option_name(name),
                    found=first["input"],
                ) from None
            choices = first.get("ctx", {}).get("expected")
            if choices:
                message, expected = "unknown choice", str(choices).replace("'", "").replace(" or ", ", ")
            else:
                message, expected = str(first["msg"]).removeprefix("Value error, "), None
            raise PlanError(
                message[0].lower() + message[1:], where=option_name(name), expected=expected, found=first["input"]
            ) from None

    def record(self) -> dict[str, Any]:
        """What the result depends on, as JSON."""
        return self.model_dump(mode="json", exclude=_undecided(type(self)) | self._new_defaults)

    @property
    def _new_defaults(self) -> set[str]:
        fields = type(self).model_fields
        return {
            name
            for name, field in fields.items()
            if option_of(type(self), name).later and getattr(self, name) == field.default
        }


def _as_dict(value: Any) -> Any:
    """An object of transformers, such as ``BitsAndBytesConfig``, as the dictionary that it is made from."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def option_name(field: str) -> str:
    """A field as the command line calls it: ``max_tokens`` is ``--max-tokens``."""
    return f"--{field.replace('_', '-')}"


def option_of(config: type[BaseModel], field: str) -> Option:
    """How a field of a config appears on the command line."""
    return next(entry for entry in config.model_fields[field].metadata if isinstance(entry, Option))


def _undecided(config: type[BaseModel]) -> set[str]:
    return {name for name in config.model_fields if not option_of(config, name).decides}


class PairConfig(_Config):
    """What every verb that runs a teacher and a student asks for."""

    layers: Annotated[str, Option(_WHAT)] = Field(
        default="skip",
        description="skip (every k-th layer), avg (the mean of every window), or one teacher layer for each student "
        "layer: 0,2,4. For models of several stacks one map for all, or encoder=skip;decoder=0,2.",
    )
    columns: Annotated[tuple[str, ...] | None, Option(_HOW)] = Field(
        default=None, description="Column of the text, or two columns of sentence pairs: premise,hypothesis."
    )
    max_tokens: Annotated[int, Option(_HOW)] = Field(
        default=MAX_TOKENS, ge=1, description="Paired tokens that the alignment sees at most."
    )
    seed: Annotated[int, Option(_HOW)] = Field(
        default=0, description="Of the order in which text is sampled, and of training."
    )
    device: Annotated[str, Option(_WHERE)] = Field(default="cpu", description="Torch device of the forward passes.")
    student_device: Annotated[str | None, Option(_WHERE)] = Field(
        default=None, description="The student's device, if it differs."
    )
    device_map: Annotated[str | dict[str, Any] | None, Option(_WHERE)] = Field(
        default=None,
        description="auto spreads the layers of both models over what is there (accelerate), in place of --device.",
    )
    dtype: Annotated[Dtype, Option(_WHERE)] = Field(default="float32", description="Of the forward passes.")
    quantization_config: Annotated[dict[str, Any] | None, BeforeValidator(_as_dict), Option(_WHERE)] = Field(
        default=None,
        description="Load both models quantised: transformers' quantization_config as JSON, such as "
        '{"load_in_4bit": true}.',
    )
    teacher_revision: Annotated[str | None, Option(_LOADING)] = Field(
        default=None, description="Hub revision of the teacher."
    )
    student_revision: Annotated[str | None, Option(_LOADING)] = Field(
        default=None, description="Hub revision of the student."
    )
    token: Annotated[str | None, Option(_LOADING, decides=False)] = Field(
        default=None, description="Hub token, for private repositories.", repr=False, exclude=True
    )
    trust_remote_code: Annotated[bool, Option(_LOADING)] = Field(
        default=False, description="Run model code that comes with a repository."
    )
    cache: Annotated[bool | None, Option(_OUTPUT, decides=False)] = Field(
        default=None,
        description="Keep alignments for later modules of the same models and text, and use kept ones, in the cache of "
        "huggingface_hub or where PEFT_GRAFT_CACHE says; on by default where that is set.",
    )
    force: Annotated[bool, Option(_OUTPUT, decides=False)] = Field(
        default=False, description="Replace --out if it exists."
    )


class GraftConfig(PairConfig):
    """How ``transfer`` moves a module, and what ``inspect`` plans.

    Attributes:
        layers: ``skip``, ``avg`` or one teacher layer for each student layer (``planning.layers``).
        method: a registered method; ``auto`` takes the one whose graft agrees best with the teacher on held-out text,
            and without text ``copy`` where the models share their spaces.
        polish: steps of label-free training; ``auto`` is ``POLISH_STEPS`` where the method is ``auto`` too and there
            is text, else 0.
    """

    method: Annotated[str, Option(_HOW)] = Field(
        default=AUTO, description="auto takes whichever graft agrees best with the teacher."
    )
    head: Annotated[HeadChoice, Option(_WHAT)] = Field(
        default="auto",
        description="The classification head saved with the module: carry it through the maps, fit it to the teacher's "
        "predictions on the text, drop it, or auto: carry or fit, whichever agrees better with the teacher.",
    )
    polish: Annotated[int | Literal["auto"], Option(_HOW)] = Field(
        default="auto",
        description=f"Steps of label-free training on the teacher's predictions; auto is {POLISH_STEPS} if there is "
        "text and no --method, else 0. An interrupted polish goes on when the same command is run again.",
    )
    sites: Annotated[tuple[str, ...] | None, Option(_WHAT)] = Field(
        default=None,
        description="Modules to move, by role (attn.value,ffn.*), layer (0/*) or head (attn.value@0+3); all by "
        "default.",
    )
    library: Annotated[Library | None, Option(_WHAT)] = Field(
        default=None, description="Write a LoRA for peft or for adapters; for the module's own library by default."
    )
    format: Annotated[str | None, Option(_PROMPTS, later=True)] = Field(
        default=None,
        description="How the module was trained to read a prompt, where not by its model's chat template, and how the "
        "student shall: 'Question: {prompt}\\nAnswer:'.",
    )
    student_format: Annotated[str | None, Option(_PROMPTS, later=True)] = Field(
        default=None, description="The student's format, where it differs: chat for its chat template."
    )
    system: Annotated[str | None, Option(_PROMPTS, later=True)] = Field(
        default=None, description="System message of prompts that have none."
    )
    template_args: Annotated[dict[str, Any] | None, Option(_PROMPTS, later=True)] = Field(
        default=None, description='Arguments of the chat templates as JSON, such as {"enable_thinking": false}.'
    )
    labels: Annotated[Labels, Option(_WHAT, later=True)] = Field(
        default="ignore",
        description="Names of a head's classes where no file has them: O,B-PER,I-PER, or a JSON or text file. Of a "
        "language model, answers that come with the prompts: ignore, or use: learn them in place of the teacher's.",
    )
    learn: Annotated[Literal["distributions", "text"], Option(_PROMPTS, later=True)] = Field(
        default="distributions",
        description="Of the teacher's answers: distributions, its next-token distributions wherever tokens pair, or "
        "text, their text alone.",
    )
    max_prompts: Annotated[int, Option(_PROMPTS, later=True)] = Field(
        default=MAX_PROMPTS, ge=1, description="Prompts that the teacher answers at most."
    )
    make_prompts: Annotated[int, Option(_PROMPTS, later=True)] = Field(
        default=MADE_PROMPTS,
        ge=1,
        description="Prompts that are made from --seeds at most, a fifth of which choose or judge; no more than "
        "--max-prompts.",
    )
    max_new_tokens: Annotated[int, Option(_PROMPTS, later=True)] = Field(
        default=256, ge=1, description="Tokens of an answer; a longer one is cut."
    )
    max_length: Annotated[int | None, Option(_PROMPTS, later=True)] = Field(
        default=None, description="Tokens of a prompt with its answer; what the models read where nothing is said."
    )
    on_policy: Annotated[float, Option(_PROMPTS, later=True)] = Field(
        default=0.0,
        ge=0,
        description="Share of the polish, its end, that learns from the student's own answers.",
    )
    gradient_checkpointing: Annotated[bool, Option(_WHERE, later=True)] = Field(
        default=False, description="Compute activations anew in the backward pass: less memory, more time."
    )
    revision: Annotated[str | None, Option(_LOADING)] = Field(default=None, description="Hub revision of the module.")
    subfolder: Annotated[str | None, Option(_LOADING)] = Field(
        default=None, description="Folder of the module in its repository."
    )

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        _check_method(self.method, allow_auto=True)
        if self.polish != AUTO and int(self.polish) < 0:
            raise PlanError("must not be negative", where="--polish", found=self.polish)
        if self.on_policy > 1:
            raise PlanError("must not be more than 1", where="--on-policy", found=self.on_policy)
        if self.method == FRESH and not self.polish_steps:
            raise PlanError(
                "a fresh module is of no use without a polish",
                where="--method fresh",
                fix=f"give --polish {POLISH_STEPS}",
            )
        return self

    @property
    def polish_steps(self) -> int:
        """Steps of the polish where there is text."""
        if self.polish == AUTO:
            return POLISH_STEPS if self.method == AUTO else 0
        return int(self.polish)

    @property
    def prompts_to_make(self) -> int:
        """How many prompts are made of examples."""
        return min(self.make_prompts, self.max_prompts)

    @property
    def format_of_student(self) -> str | None:
        """The student's format; None for its chat template."""
        own = self.format if self.student_format is None else self.student_format
        return None if own == CHAT else own

    def polish_steps_on(self, prompts: int, batch_size: int) -> int:
        """Steps of the polish on so many prompts: some passes over them where nothing is said."""
        steps = self.polish_steps
        return min(steps, -(-PROMPT_PASSES * prompts // batch_size)) if self.polish == AUTO else steps


class AlignConfig(PairConfig):
    """How ``align`` aligns two models.

    Attributes:
        sites: roles to cover, such as ``("attn.query", "attn.value")``, ``adapter`` for bottleneck adapters; all when
            None.
        ray: run the pass on Ray, by a cluster's address or ``local``, in ``shards`` parts, one for each CPU by default.
    """

    method: Annotated[str, Option(_HOW)] = Field(default="prune-align", description="The method whose maps to find.")
    sites: Annotated[tuple[str, ...] | None, Option(_WHAT)] = Field(
        default=None, description="Roles to cover, such as attn.query,attn.value or adapter; all by default."
    )
    ray: Annotated[str | None, Option(_WHERE, decides=False)] = Field(
        default=None, description="Run on Ray: local for this machine, or a cluster's address."
    )
    shards: Annotated[int | None, Option(_WHERE, decides=False)] = Field(
        default=None, description="Parts of the text on Ray; one for each CPU by default."
    )

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        _check_method(self.method, allow_auto=False)
        return self


class EvaluateConfig(_Config):
    """How ``evaluate`` puts prompts with answers to a graft and to the models around it.

    Attributes:
        format, student_format, system, template_args, max_new_tokens: as for ``GraftConfig``; what the graft was made
            with where nothing is said.
        module: the teacher's module, if it is not where the graft's report says.
    """

    columns: Annotated[tuple[str, ...] | None, Option(_PROMPTS)] = Field(
        default=None, description="Columns of prompt and answer, where they have no usual names: question,answer."
    )
    limit: Annotated[int | None, Option(_PROMPTS)] = Field(
        default=None, ge=1, description="Prompts that are asked at most, in random order; all by default."
    )
    seed: Annotated[int, Option(_PROMPTS)] = Field(
        default=0, description="Of the order of prompts, of draws with a temperature, and of the intervals."
    )
    format: Annotated[str | None, Option(_PROMPTS)] = Field(
        default=None,
        description="How the module was trained to read a prompt, if not as the graft's report says or by its model's "
        "chat template: 'Question: {prompt}\\nAnswer:'.",
    )
    student_format: Annotated[str | None, Option(_PROMPTS)] = Field(
        default=None, description="The student's format, where it differs: chat for its chat template."
    )
    system: Annotated[str | None, Option(_PROMPTS)] = Field(
        default=None, description="System message of prompts that have none."
    )
    template_args: Annotated[dict[str, Any] | None, Option(_PROMPTS)] = Field(
        default=None, description='Arguments of the chat templates as JSON, such as {"enable_thinking": false}.'
    )
    max_new_tokens: Annotated[int | None, Option(_ANSWERS)] = Field(
        default=None, ge=1, description="Tokens of an answer, 256 where the graft's report says nothing; more are cut."
    )
    temperature: Annotated[float, Option(_ANSWERS)] = Field(
        default=0.0, ge=0, description="Draw answers; 0 takes the likeliest token always."
    )
    teacher_base: Annotated[bool, Option(_WHO)] = Field(
        default=False, description="Also the teacher's model without its module."
    )
    module: Annotated[str | None, Option(_WHO)] = Field(
        default=None, description="The module that was moved, if it is not where the graft's report says."
    )
    device: Annotated[str, Option(_WHERE)] = Field(default="cpu", description="Torch device of the models.")
    device_map: Annotated[str | dict[str, Any] | None, Option(_WHERE)] = Field(
        default=None, description="auto spreads the layers over what is there (accelerate), in place of --device."
    )
    dtype: Annotated[Dtype, Option(_WHERE)] = Field(default="float32", description="Of the models.")
    quantization_config: Annotated[dict[str, Any] | None, BeforeValidator(_as_dict), Option(_WHERE)] = Field(
        default=None,
        description="Load the models quantised: transformers' quantization_config as JSON, such as "
        '{"load_in_4bit": true}.',
    )
    revision: Annotated[str | None, Option(_LOADING)] = Field(default=None, description="Hub revision of the graft.")
    subfolder: Annotated[str | None, Option(_LOADING)] = Field(
        default=None, description="Folder of the graft in its repository."
    )
    token: Annotated[str | None, Option(_LOADING, decides=False)] = Field(
        default=None, description="Hub token, for private repositories.", repr=False, exclude=True
    )
    trust_remote_code: Annotated[bool, Option(_LOADING)] = Field(
        default=False, description="Run model code that comes with a repository."
    )
    force: Annotated[bool, Option(_OUTPUT, decides=False)] = Field(
        default=False, description="Replace --out if it exists."
    )


class StudyConfig(_Config):
    """How ``study`` runs the cells of a study file."""

    ray: Annotated[str | None, Option(_WHERE)] = Field(
        default=None, description="Run on Ray: local for this machine, or a cluster's address."
    )
    cpus: Annotated[float, Option(_WHERE)] = Field(default=1, description="CPUs that one cell takes on Ray.")
    gpus: Annotated[float, Option(_WHERE)] = Field(default=0, description="GPUs that one cell takes on Ray.")
    only: Annotated[str | None, Option(_WHAT)] = Field(
        default=None, description="Only cells whose id matches this pattern, and what they need."
    )
    export: Annotated[str | None, Option(_OUTPUT, decides=False)] = Field(
        None, description="Add the results of the finished cells to this file, a line of JSON each."
    )


def _check_method(name: str, *, allow_auto: bool) -> None:
    """Refuse unknown methods; those that other packages register count once they are imported."""
    known = [*([AUTO] if allow_auto else []), *METHOD_SUMMARIES]
    if name not in known:
        raise PlanError("unknown choice", where="--method", expected=", ".join(known), found=name)


def method_help(summaries: Mapping[str, str] = METHOD_SUMMARIES) -> str:
    """What the help page says about ``--method``."""
    return "; ".join(f"{name}: {summary}" for name, summary in summaries.items())
