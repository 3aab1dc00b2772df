"""Every choice of a user: one model per verb, from which the command line, studies and records are made.

Nothing here imports torch, so that ``peft-graft --help`` answers at once.
"""

from __future__ import annotations

from peft_graft.config.align import AlignConfig
from peft_graft.config.arguments import known_arguments
from peft_graft.config.base import (
    AUTO,
    CHAT,
    FRESH,
    MAX_TOKENS,
    METHOD_SUMMARIES,
    POLISH_STEPS,
    Dtype,
    HeadChoice,
    Library,
    Option,
    method_help,
    option_name,
    option_of,
)
from peft_graft.config.evaluate import EvaluateConfig
from peft_graft.config.export import ExportConfig, Target
from peft_graft.config.graft import GraftConfig, PairConfig
from peft_graft.config.study import StudyConfig

__all__ = [
    "AUTO",
    "CHAT",
    "FRESH",
    "MAX_TOKENS",
    "METHOD_SUMMARIES",
    "POLISH_STEPS",
    "AlignConfig",
    "Dtype",
    "EvaluateConfig",
    "ExportConfig",
    "GraftConfig",
    "HeadChoice",
    "Library",
    "Option",
    "PairConfig",
    "StudyConfig",
    "Target",
    "known_arguments",
    "method_help",
    "option_name",
    "option_of",
]
