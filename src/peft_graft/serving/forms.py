"""All forms of export: importing this makes them known."""

from peft_graft.serving import library, merged

__all__ = ["library", "merged"]
