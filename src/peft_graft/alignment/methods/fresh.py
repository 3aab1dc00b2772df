"""``fresh``: untrained modules of the same form at the student's sites, for a polish to begin from."""

from __future__ import annotations

from peft_graft.alignment.methods.base import Method, add_method
from peft_graft.config import FRESH

add_method(Method(FRESH, moves_nothing=True))
