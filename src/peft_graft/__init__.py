"""Move trained parameter-efficient modules (LoRA, adapters) from one transformer to another.

graft = peft_graft.transfer("my-lora", student="new-base", text="sentences.txt", out="my-lora-on-new-base")
"""

from peft_graft.aligning import align
from peft_graft.alignment import Alignment
from peft_graft.alignment_files import load_alignment, save_alignment
from peft_graft.checkpoints import PeftCheckpoint, read_checkpoint
from peft_graft.errors import GraftError
from peft_graft.graft import Graft
from peft_graft.inspection import inspect
from peft_graft.methods import METHODS
from peft_graft.report import GraftReport
from peft_graft.transfer import transfer, transfer_checkpoint

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
