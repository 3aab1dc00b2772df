"""What a graft says about itself: ``graft.json`` for machines and a model card for people."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from pydantic import BaseModel, ConfigDict

from peft_graft.checkpoints.verify import Verification
from peft_graft.distill.agreement import Agreement, Verdict
from peft_graft.distill.polish import CurvePoint, PolishSettings
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


class MapRecord(_Record):
    """One space's map, as it served a site: what the method said about it (``pairs``, ``mean_correlation``, ...)."""

    space: str
    teacher_space: str
    diagnostics: dict[str, float]


class SiteRecord(_Record):
    """One module of the student.

    ``norm_kept``: Frobenius norm of the grafted update over the mean of the teacher's updates that it is made from
    (LoRA: of B A; bottleneck adapter: of up times down). ``share``: how much of the teacher's whole module, by squared
    norm, those updates are.
    """

    site: str
    teacher_sites: list[str]
    norm_kept: float
    share: float
    maps: list[MapRecord]


class HeadRecord(_Record):
    """The head: task, what it reads, label names, the map it came through, inner units dropped for lack of room.

    ``how``: ``carried`` through the map, or ``fitted`` to the teacher's predictions; then ``fit`` says how well.
    """

    task: Task
    reads: str
    labels: list[str]
    dropped_inner_units: int
    diagnostics: dict[str, float]
    how: str | None = None
    fit: dict[str, float] = {}


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


class PolishRecord(_Record):
    """A label-free polish: its settings, the samples it learned from and the held-out curve.

    ``start``: ``moved`` or ``gradient`` (``teaching.STARTS``). ``pilots``: what was tried first, as "start rate", and
    how far it came.
    """

    settings: PolishSettings
    start: str
    pilots: dict[str, CurvePoint]
    samples: int
    curve: list[CurvePoint]


class GraftReport(_Record):
    """Everything about a graft, as written to ``graft.json``.

    ``layers``: the teacher layers of each student layer, by stack where the student has several.
    ``tried``: agreement with the teacher on held-out text of everything that the default chose from.
    """

    format_version: int = 1
    module: str
    module_files: dict[str, str]
    module_library: str
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
