"""The methods that find maps between spaces from statistics of paired activations, a file each.

A method is a pure function ``PairedStatistics -> (SpaceMap, diagnostics)``; it never sees text or models. One that
shrinks its estimate is also given statistics of held-out pairs to choose by. ``register_method`` adds others.
"""

from peft_graft.alignment.methods import copy, functional, procrustes, prune_align, ridge
from peft_graft.alignment.methods.base import (
    METHODS,
    Diagnostics,
    Method,
    Solver,
    automatic_methods,
    map_axis,
    map_methods,
    register_method,
)

__all__ = [
    "METHODS",
    "Diagnostics",
    "Method",
    "Solver",
    "automatic_methods",
    "map_axis",
    "map_methods",
    "register_method",
]
