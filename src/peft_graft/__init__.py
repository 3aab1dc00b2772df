"""Move trained parameter-efficient modules (LoRA, adapters) from one transformer to another.

graft = peft_graft.transfer("my-lora", "new-base", text="sentences.txt")
graft.save_pretrained("my-lora-on-new-base")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_graft._align import align
    from peft_graft._evaluate import Evaluation, evaluate
    from peft_graft._export import Export, export
    from peft_graft._inspect import inspect
    from peft_graft._transfer import transfer
    from peft_graft._transfer_all import transfer_all
    from peft_graft.alignment.alignment import Alignment
    from peft_graft.alignment.methods import register_method
    from peft_graft.checkpoints.formats.base import register_format
    from peft_graft.config import AlignConfig, EvaluateConfig, ExportConfig, GraftConfig
    from peft_graft.errors import GraftError
    from peft_graft.graft import Graft
    from peft_graft.models.families import register_architecture
    from peft_graft.modules.base import register_module
    from peft_graft.progress import ProgressCallback
    from peft_graft.report import GraftReport
    from peft_graft.run import Callback
    from peft_graft.shelf import ShelfModule, ShelfReport

__all__ = [
    "AlignConfig",
    "Alignment",
    "Callback",
    "EvaluateConfig",
    "Evaluation",
    "Export",
    "ExportConfig",
    "Graft",
    "GraftConfig",
    "GraftError",
    "GraftReport",
    "ProgressCallback",
    "ShelfModule",
    "ShelfReport",
    "align",
    "evaluate",
    "export",
    "inspect",
    "register_architecture",
    "register_format",
    "register_method",
    "register_module",
    "transfer",
    "transfer_all",
]
#: The module of every public name.
_HOME = {
    "AlignConfig": "config",
    "Alignment": "alignment.alignment",
    "Callback": "run",
    "EvaluateConfig": "config",
    "Evaluation": "_evaluate",
    "Export": "_export",
    "ExportConfig": "config",
    "Graft": "graft",
    "GraftConfig": "config",
    "GraftError": "errors",
    "GraftReport": "report",
    "ProgressCallback": "progress",
    "ShelfModule": "shelf",
    "ShelfReport": "shelf",
    "align": "_align",
    "evaluate": "_evaluate",
    "export": "_export",
    "inspect": "_inspect",
    "register_architecture": "models.families",
    "register_format": "checkpoints.formats.base",
    "register_method": "alignment.methods",
    "register_module": "modules.base",
    "transfer": "_transfer",
    "transfer_all": "_transfer_all",
}


def __getattr__(name: str) -> Any:
    """A public name when it is first used: torch, transformers and peft take seconds to import."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peft-graft")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
