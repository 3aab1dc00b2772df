"""Move trained parameter-efficient modules (LoRA, adapters) from one transformer to another.

graft = peft_graft.transfer("my-lora", student="new-base", text="sentences.txt", out="my-lora-on-new-base")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_graft.aligning import align
    from peft_graft.alignment import Alignment
    from peft_graft.alignment_files import load_alignment, save_alignment
    from peft_graft.checkpoints import PeftCheckpoint, read_checkpoint
    from peft_graft.errors import GraftError
    from peft_graft.graft import Graft
    from peft_graft.inspection import inspect
    from peft_graft.methods import METHODS
    from peft_graft.report import GraftReport
    from peft_graft.transferring import transfer, transfer_checkpoint

__all__ = [
    "METHODS",
    "Alignment",
    "Graft",
    "GraftError",
    "GraftReport",
    "PeftCheckpoint",
    "align",
    "inspect",
    "load_alignment",
    "read_checkpoint",
    "save_alignment",
    "transfer",
    "transfer_checkpoint",
]
#: The module of every public name; none may have the name of a module, which would hide it.
_HOME = {
    "METHODS": "methods",
    "Alignment": "alignment",
    "Graft": "graft",
    "GraftError": "errors",
    "GraftReport": "report",
    "PeftCheckpoint": "checkpoints",
    "align": "aligning",
    "inspect": "inspection",
    "load_alignment": "alignment_files",
    "read_checkpoint": "checkpoints",
    "save_alignment": "alignment_files",
    "transfer": "transferring",
    "transfer_checkpoint": "transferring",
}


def __getattr__(name: str) -> Any:
    """A public name when it is first used: torch, transformers and peft take seconds to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
