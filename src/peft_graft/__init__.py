"""Move trained parameter-efficient modules (LoRA, adapters) from one transformer to another.

graft = peft_graft.transfer("my-lora", student="new-base", text="sentences.txt", out="my-lora-on-new-base")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_graft._align import align
    from peft_graft._inspect import inspect
    from peft_graft._transfer import transfer, transfer_checkpoint
    from peft_graft.alignment.alignment import Alignment
    from peft_graft.alignment.methods import METHODS
    from peft_graft.alignment.storage import load_alignment, save_alignment
    from peft_graft.checkpoints.read import read_checkpoint
    from peft_graft.checkpoints.resolve import PeftCheckpoint
    from peft_graft.errors import GraftError
    from peft_graft.graft import Graft
    from peft_graft.report import GraftReport

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
    "METHODS": "alignment.methods",
    "Alignment": "alignment.alignment",
    "Graft": "graft",
    "GraftError": "errors",
    "GraftReport": "report",
    "PeftCheckpoint": "checkpoints.resolve",
    "align": "_align",
    "inspect": "_inspect",
    "load_alignment": "alignment.storage",
    "read_checkpoint": "checkpoints.read",
    "save_alignment": "alignment.storage",
    "transfer": "_transfer",
    "transfer_checkpoint": "_transfer",
}


def __getattr__(name: str) -> Any:
    """A public name when it is first used: torch, transformers and peft take seconds to import."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
