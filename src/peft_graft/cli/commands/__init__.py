"""The verbs, a file each: a thin layer over the functions of the same names.

A new verb is a file here and its name below, which is also its place on the help page.
"""

from peft_graft.cli.commands import (  # isort: skip
    inspect, transfer, report, align, compose, evaluate, export, study, demo, schema,
)  # fmt: skip

__all__ = ["align", "compose", "demo", "evaluate", "export", "inspect", "report", "schema", "study", "transfer"]
