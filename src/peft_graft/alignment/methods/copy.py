"""``copy``: every unit stands for itself."""

from __future__ import annotations

from peft_graft.alignment.methods.base import Method, add_method

add_method(Method("copy", automatic=True))
