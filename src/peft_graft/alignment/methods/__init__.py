"""The methods that find maps between spaces from statistics of paired activations: a file each, which registers itself.

A method is a pure function ``PairedStatistics -> (SpaceMap, diagnostics)``; it never sees text or models. One that
shrinks its estimate is also given statistics of held-out pairs to choose by. ``register_method`` adds others.
"""

from importlib import import_module
from pkgutil import iter_modules

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

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")

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
