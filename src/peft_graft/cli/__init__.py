"""The command ``peft-graft``."""

from peft_graft.cli.main import main

__all__ = ["main"]
