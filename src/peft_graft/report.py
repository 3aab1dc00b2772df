"""What a graft says about itself: ``graft.json`` for machines and a model card for people."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from pydantic import BaseModel, ConfigDict

from peft_graft.checkpoints.verify import Verification
from peft_graft.distill.agreement import Agreement, Verdict
from peft_graft.distill.candidates import HeadRecord, SiteRecord
from peft_graft.distill.polish import PolishRecord
from peft_graft.models.tasks import Task
from peft_graft.settings import TransferSettings


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRecord(_Record):
    """A teacher or student: name, family, depth, and fingerprint of its weights (``models.fingerprint``)."""

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    inferred_architecture: bool
    fingerprint: str | None = None


class PairingRecord(_Record):
    """How the text's tokens paired (``token_pairing.PairingCounts``), with shares of each model's tokens."""

    samples: int
    pairs: int
    one_to_one: int
    teacher_tokens: int
    student_tokens: int
    teacher_share_paired: float
    student_share_paired: float
    nonfinite_pairs: int


class GraftReport(_Record):
    """Everything about a graft, as written to ``graft.json``.

    ``layers``: the teacher layers of each student layer, by stack where the student has several.
    ``tried``: agreement with the teacher on held-out text of everything that the default chose from.
    """

    format_version: int = 1
    module: str
    module_files: dict[str, str]
    module_format: str
    module_kind: str
    teacher: ModelRecord
    student: ModelRecord
    settings: TransferSettings
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
    notes: list[str]
    verification: Verification | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    hardware: dict[str, str | int]


def write_model_card(folder: Path, report: GraftReport, task: Task, labels: tuple[str, ...]) -> None:
    """Write README.md: what the checkpoint is, how it was made and how to load it."""
    card = _template("model_card.md.jinja").render(report=report, task=task, labels=labels)
    (folder / "README.md").write_text(card, encoding="utf-8")


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("peft_graft", "templates"), undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(name)
