"""The same module as a checkpoint of peft or of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from peft_graft.checkpoints.beside import write_labels
from peft_graft.checkpoints.formats.base import write_checkpoint
from peft_graft.checkpoints.student_names import written_names
from peft_graft.checkpoints.verify import verify
from peft_graft.config import ExportConfig, Library, Target
from peft_graft.serving.subject import Subject, compare
from peft_graft.serving.target import Form, Written, register_form

#: Of the module's effect: both libraries compute the same, in another order.
_LOST = 1e-2


class _InLibrary(Form):
    library: ClassVar[Library]
    use: ClassVar[str]
    rounds: ClassVar[bool] = False

    def check(self, subject: Subject, config: ExportConfig) -> None:
        """Refuse all but plain LoRA, where the module is of the other library."""
        subject.check_library(self.library)

    def write(self, folder: Path, subject: Subject, config: ExportConfig) -> Written:
        """Write the checkpoint, load it with its library, compare outputs with those in the library that it was for."""
        raw = subject.in_library(self.library)
        write_checkpoint(folder, raw, written_names(subject.base, raw.task))
        write_labels(folder, raw, subject.base, subject.labels)
        verification = verify(folder, raw, subject.base, subject.labels)
        comparison = None
        if verification.done:
            before, bare = subject.outputs(subject.raw)
            after, _ = subject.outputs(raw)
            comparison = compare(
                before, after, bare, logits=subject.has_logits, most=_LOST, where=f"--to {self.target}"
            )
        notes = [] if verification.done else [f"not verified: {self.library} is not installed"]
        return Written(comparison=comparison, notes=notes, use=self.use)


@register_form
class InPeft(_InLibrary):
    """A checkpoint of peft."""

    target: ClassVar = Target.PEFT
    library: ClassVar = Library.PEFT
    use: ClassVar = "peft.PeftModel.from_pretrained(base, {out!r})"


@register_form
class InAdapters(_InLibrary):
    """A checkpoint of adapters."""

    target: ClassVar = Target.ADAPTERS
    library: ClassVar = Library.ADAPTERS
    use: ClassVar = "model.load_adapter({out!r}, set_active=True)"
