"""What the configs of all verbs share: how a field becomes an option, its checks, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from peft_graft.errors import PlanError

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
        brief: a line for the short help page, of options that matter most; the others are only named there.
        decides: whether the result depends on it; what does not is left out of keys and records.
        later: whether it came after results were published: at its default it is left out too, so that keys stay.
    """

    panel: str
    brief: str = ""
    decides: bool = True
    later: bool = False


WHAT, HOW, WHERE, LOADING, OUTPUT = "What", "How", "Where", "Loading", "Output"
PROMPTS = "Prompts, for language models"
ANSWERS, WHO, TEXT = "Answers", "Who is asked", "Text"


#: Fields of several configs.
Token = Annotated[
    str | None,
    Option(LOADING, decides=False),
    Field(description="Hub token, for private repositories.", repr=False, exclude=True),
]
TrustRemoteCode = Annotated[bool, Option(LOADING), Field(description="Run model code that comes with a repository.")]
Force = Annotated[
    bool,
    Option(OUTPUT, "Replace --out if it exists.", decides=False),
    Field(description="Replace --out if it exists."),
]


#: What is taken in place of a value of another type, by the first word that pydantic has for it.
_TYPES = {
    "string": "text",
    "tuple": "names in a list, or in one text with commas between them",
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "dict": "a dictionary",
}


def _as_text(value: object) -> str | None:
    """What to write for a value that text was expected for; None where that is not plain."""
    parts = value if isinstance(value, list | tuple) else [value]
    plain = parts and all(isinstance(part, str | int | float) and not isinstance(part, bool) for part in parts)
    return f'write "{",".join(map(str, parts))}"' if plain else None


class Config(BaseModel):
    """Choices with names, which do not change; what is no choice is refused in this package's own words."""

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
                    "there is no such option",
                    where=option_name(name),
                    expected=", ".join(cls.model_fields),
                    fix=nearest(name, cls.model_fields),
                ) from None
            if first["type"] == "greater_than_equal":
                least = first["ctx"]["ge"]
                raise PlanError(
                    "must be positive" if least else "must not be negative",
                    where=option_name(name),
                    found=first["input"],
                ) from None
            choices, fix, found = first.get("ctx", {}).get("expected"), None, first["input"]
            if choices:
                message, expected = "unknown choice", str(choices).replace("'", "").replace(" or ", ", ")
            elif (kind := str(first["type"]).partition("_")[0]) in _TYPES:
                message, expected = "is of another type", _TYPES[kind]
                fix = _as_text(found) if kind == "string" else None
                found = f"{found!r} ({type(found).__name__})"
                name += f" entry {number + 1}" if isinstance(number := first["loc"][-1], int) else ""
            else:
                message, expected = str(first["msg"]).removeprefix("Value error, "), None
            message = message[0].lower() + message[1:]
            raise PlanError(message, where=option_name(name), expected=expected, found=found, fix=fix) from None

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_no_answers(cls, value: Any) -> Any:
        """Refuse True and False for numbers, which Python takes for 1 and 0."""
        for name, field in cls.model_fields.items() if isinstance(value, Mapping) else ():
            taken = {field.annotation, *get_args(field.annotation)}
            if isinstance(value.get(name), bool) and taken & {int, float} and bool not in taken:
                raise PlanError(
                    "is of another type",
                    where=option_name(name),
                    expected="a number" + f" or {AUTO}" * (Literal[AUTO] in taken),
                    found=f"{value[name]} (bool)",
                )
        return value

    @classmethod
    def of(cls, given: object) -> Self:
        """The choices that a user gave in Python: the default ones for None; also a dictionary of some of them.

        Raises:
            PlanError: they are of another verb, or no choices at all.
        """
        if given is None:
            return cls()
        if isinstance(given, Mapping):
            return cls(**given)
        if not isinstance(given, cls):
            raise PlanError(
                "this holds no choices for it",
                where="config",
                expected=f"a {cls.__name__} or a dict of its fields",
                found=type(given).__name__,
            )
        return given

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


def as_names(value: Any) -> Any:
    """One name, or several with commas between them, as the shell has them; anything else stays."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def as_dict(value: Any) -> Any:
    """An object of transformers, such as ``BitsAndBytesConfig``, as the dictionary that it is made from."""
    return value.to_dict() if hasattr(value, "to_dict") else value


def nearest(name: str, known: Iterable[str]) -> str | None:
    """What to do about an unknown name: take the one that is spelt most like it, if any is."""
    found = get_close_matches(name, known, n=1)
    return f"write {found[0]}" if found else None


def option_name(field: str) -> str:
    """A field as the command line calls it: ``max_tokens`` is ``--max-tokens``, and ``for_`` is ``--for``."""
    return f"--{field.rstrip('_').replace('_', '-')}"


def option_of(config: type[BaseModel], field: str) -> Option:
    """How a field of a config appears on the command line."""
    return next(entry for entry in config.model_fields[field].metadata if isinstance(entry, Option))


def _undecided(config: type[BaseModel]) -> set[str]:
    return {name for name in config.model_fields if not option_of(config, name).decides}


def check_method(name: str, *, allow_auto: bool) -> None:
    """Refuse unknown methods; those that other packages register count once they are imported."""
    known = [*([AUTO] if allow_auto else []), *METHOD_SUMMARIES]
    if name not in known:
        raise PlanError("unknown choice", where="--method", expected=", ".join(known), found=name)


def method_help(summaries: Mapping[str, str] = METHOD_SUMMARIES) -> str:
    """What the help page says about ``--method``."""
    return "; ".join(f"{name}: {summary}" for name, summary in summaries.items())
