"""The JSON schemas of what the verbs print; studies, whose libraries take long to import, among them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from peft_graft._evaluate import Evaluation
from peft_graft._export import Export
from peft_graft._inspect import Inspection
from peft_graft.cli.results import (
    AlignResult,
    ErrorResult,
    EvaluateResult,
    PageResult,
    Placed,
    ShelfResult,
    TransferResult,
)
from peft_graft.errors import PlanError
from peft_graft.study.command import StudyPlan, StudyRun
from peft_graft.study.demo import DemoResult as Demo


class DemoResult(Placed, Demo):
    """What the demo measured, and its folder."""

    out: str


class DemoLlmResult(Placed, Evaluation):
    """What the demo of language models measured, and the file of it."""

    out: str


#: What each verb prints with ``--json``, by its name with the option that asks for it.
RESULTS: dict[str, type[BaseModel]] = {
    "inspect": Inspection,
    "transfer": TransferResult,
    "transfer --list": ShelfResult,
    "align": AlignResult,
    "compose": AlignResult,
    "evaluate": EvaluateResult,
    "report": PageResult,
    "export": Export,
    "study": StudyRun,
    "study --dry-run": StudyPlan,
    "demo": DemoResult,
    "demo --llm": DemoLlmResult,
    "error": ErrorResult,
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a verb's result, or of an error.

    Raises:
        PlanError: there is none of this name.
    """
    if name not in RESULTS:
        raise PlanError("prints nothing as JSON", where=f"schema {name}", expected=", ".join(RESULTS))
    return RESULTS[name].model_json_schema(mode="serialization")
