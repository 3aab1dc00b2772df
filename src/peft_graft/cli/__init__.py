"""The command ``peft-graft``."""
