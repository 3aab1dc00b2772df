"""What a graft says about itself, as ``graft.json`` holds it."""

from __future__ import annotations

from pathlib import Path

from peft_graft.alignment.tokens import PairingRecord
from peft_graft.checkpoints.verify import Verification
from peft_graft.config import GraftConfig
from peft_graft.distill.agreement import Agreement, Verdict
from peft_graft.distill.ask_documents import DocumentRecord
from peft_graft.distill.breakdown import ClassCounts, DecidedText, PromptKind
from peft_graft.distill.candidates import HeadRecord, SiteRecord
from peft_graft.distill.completions import PromptRecord
from peft_graft.distill.cost import CostRecord
from peft_graft.distill.polish import PolishRecord
from peft_graft.errors import CheckpointError
from peft_graft.files import read_json
from peft_graft.models.loading import ModelRecord
from peft_graft.models.tasks import Task
from peft_graft.record import Record, html_table

#: What people call kinds of modules, where that is another word.
KINDS = {"lora": "LoRA", "ia3": "IA³", "bottleneck": "Adapter"}
#: Its file, beside the checkpoint.
REPORT = "graft.json"


class AnswerSample(Record):
    """A held-out prompt, and what the teacher, the graft and the student without it say to it."""

    prompt: str
    teacher: str
    graft: str
    bare: str


class FileRecord(Record):
    """A file that was written: bytes, and the SHA-256 of its content."""

    size: int
    sha256: str


class GraftReport(Record):
    """Everything about a graft, as written to ``graft.json``.

    ``layers``: the teacher layers of each student layer, by stack where the student has several. ``teacher_layers``:
    how many the teacher has of these, by stack; empty in those of before.
    ``tried``: agreement with the teacher, on the text that chooses, of everything that the default chose from.
    ``classes``, ``decisions``: how a classifier decides the text that judges, and some of that text.
    ``prompts``, ``kinds``, ``answers``: what a language model was asked, how it agrees with the teacher by kind of
    prompt, and some of what was answered. ``documents``: the plain text of which it learned what comes next.
    ``cost``: sizes and speed beside the teacher's. ``files``: what was written, but for the report itself.
    ``identity``: a hash of all that the graft depends on, by which a finished one is known; None in those of before.
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
    teacher_layers: dict[str, int] = {}
    sites: list[SiteRecord]
    head: HeadRecord | None
    pairing: PairingRecord | None
    verdict: Verdict
    tried: dict[str, Agreement] = {}
    polish: PolishRecord | None = None
    prompts: PromptRecord | None = None
    documents: DocumentRecord | None = None
    kinds: list[PromptKind] = []
    answers: list[AnswerSample] = []
    classes: ClassCounts | None = None
    decisions: list[DecidedText] = []
    cost: CostRecord | None = None
    files: dict[str, FileRecord] = {}
    notes: list[str]
    identity: str | None = None
    verification: Verification | None = None
    seconds: dict[str, float]
    versions: dict[str, str]
    hardware: dict[str, str | int]

    @property
    def summary(self) -> dict[str, str]:
        """What a reader asks first, by name."""
        figure = self.verdict.figure
        found = {
            "module": f"{self.module_kind} of {self.teacher.hub_id or self.teacher.name}",
            "student": self.student.hub_id or self.student.name,
            "method": self.method,
            "verdict": f"{self.verdict.level}: {self.verdict.text}",
        }
        if figure and figure.agreement is not None:
            spread = figure.agreement_interval
            found["agreement"] = f"{figure.agreement:.2f}" + (f" ({spread[0]:.2f}–{spread[1]:.2f})" if spread else "")
        if self.polish:
            found["polish"] = f"{self.polish.settings.steps} steps"
        if self.notes:
            found["notes"] = "; ".join(self.notes)
        return found

    @property
    def polished_from(self) -> str:
        """Where the polish began, in words; of a report with one."""
        assert self.polish is not None
        moved = "an untrained module" if self.method == "fresh" else "the moved module"
        begun = {"moved": moved, "gradient": "an untrained module that reads where the gradient points"}
        return begun.get(self.polish.start, self.polish.start)

    @property
    def tags_words(self) -> bool:
        """Whether it gives every word a class, and not the whole text."""
        return bool(self.head and self.head.task == Task.TOKEN_CLASSIFICATION)

    @property
    def decided_alike(self) -> list[str]:
        """What the agreement of a classifier means in counts (``ClassCounts.in_words``); nothing of others."""
        return self.classes.in_words("words" if self.tags_words else "texts") if self.classes else []

    @property
    def answered_alike(self) -> list[str]:
        """What one answer to all prompts would come to, where agreement counts from that; else nothing."""
        found = self.verdict.generated
        if found is None or (found.constant_token_f1 or 0.0) <= found.bare_token_f1:
            return []
        return [
            f"One answer to all of them would have {found.constant_token_f1:.0%} of the words: agreement is what the "
            "graft does beyond that."
        ]

    def __repr__(self) -> str:
        return f"GraftReport({self.module_kind} of {self.teacher.name} on {self.student.name}: {self.verdict.level})"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table("Graft", self.summary.items())


def read_report(folder: Path, where: str) -> GraftReport:
    """The report in a graft's folder.

    Args:
        where: what the user called the folder, for messages.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    if not (folder / REPORT).is_file():
        raise CheckpointError(
            "the folder holds no graft",
            where=where,
            expected=REPORT,
            fix="make one with transfer, or load a module without it with its own library",
        )
    try:
        return GraftReport.model_validate(read_json(folder / REPORT))
    except ValueError as error:
        raise CheckpointError(
            f"the report was written by another version ({str(error).splitlines()[0]})",
            where=str(folder / REPORT),
            fix="transfer the module again",
        ) from error
