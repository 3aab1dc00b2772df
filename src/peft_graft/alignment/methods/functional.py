"""``functional``: prune-align's maps for the head; ``distill.fit_layers`` fits the modules."""

from __future__ import annotations

from peft_graft.alignment.methods.base import Method, add_method
from peft_graft.alignment.methods.prune_align import assign_by_correlation

add_method(Method("functional", solve=assign_by_correlation, automatic=True, fits_layers=True))
