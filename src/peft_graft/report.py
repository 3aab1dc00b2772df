"""What a graft says about itself: ``graft.json`` for machines and a model card for people."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from peft_graft.alignment.tokens import PairingRecord
from peft_graft.checkpoints.verify import Verification
from peft_graft.config import GraftConfig, Library
from peft_graft.distill.agreement import Agreement, Verdict
from peft_graft.distill.candidates import HeadRecord, SiteRecord
from peft_graft.distill.completions import PromptRecord
from peft_graft.distill.polish import PolishRecord
from peft_graft.models.loading import ModelRecord
from peft_graft.models.tasks import Task
from peft_graft.record import Record


class AnswerSample(Record):
    """A held-out prompt, and what the teacher, the graft and the student without it say to it."""

    prompt: str
    teacher: str
    graft: str
    bare: str


class GraftReport(Record):
    """Everything about a graft, as written to ``graft.json``.

    ``layers``: the teacher layers of each student layer, by stack where the student has several.
    ``tried``: agreement with the teacher, on the text that chooses, of everything that the default chose from.
    ``prompts``, ``answers``: what a language model was asked, and some of what was answered.
    """

    format_version: int = 3
    module: str
    module_files: dict[str, str]
    module_library: str
    module_kind: str
    teacher: ModelRecord
    student: ModelRecord
    settings: GraftConfig
    method: str
    method_reason: str
    text: str | None
    alignment: str | None
    layers: list[list[int]] | dict[str, list[list[int]]]
    sites: list[SiteRecord]
    head: HeadRecord | None
    pairing: PairingRecord | None
    verdict: Verdict
    tried: dict[str, Agreement] = {}
    polish: PolishRecord | None = None
    prompts: PromptRecord | None = None
    answers: list[AnswerSample] = []
    notes: list[str]
    verification: Verification | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    hardware: dict[str, str | int]


def write_model_card(folder: Path, report: GraftReport, task: Task, labels: tuple[str, ...]) -> None:
    """Write README.md: what the checkpoint is, how it was made and how to load it."""
    about = ModelCardData(
        base_model=report.student.name,
        library_name=report.module_library,
        tags=["peft-graft", report.module_kind],
        pipeline_tag=task.pipeline_tag,
    )
    content = _template("model_card.md.jinja").render(
        card_data=about.to_yaml(),
        report=report,
        figure=report.verdict.figure,
        task=task,
        auto_class=task.auto_class_of(report.student.model_type),
        labels=labels,
        is_peft=report.module_library == Library.PEFT,
    )
    ModelCard(content).save(folder / "README.md")


@cache
def _template(name: str) -> Template:
    # huggingface_hub's own rendering of templates leaves the lines of blocks in, which would break tables.
    environment = Environment(
        loader=PackageLoader("peft_graft", "templates"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
