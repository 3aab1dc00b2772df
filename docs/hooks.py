"""Pages that mkdocs makes anew at every build: the command line's reference, from its options, and the changelog."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from peft_graft.cli import late
from peft_graft.cli.main import app

ROOT = Path(__file__).parent.parent
ABOUT = """# Command line

Every verb is a function of the same name in Python ([reference](python.md)), and every option below the
first panel is a field of its config: `--max-tokens` is `GraftConfig(max_tokens=...)`. `peft-graft VERB --help` says the
same.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def command_line() -> str:
    """The reference of all verbs, as Markdown."""
    group = typer.main.get_command(app)
    with group.make_context("peft-graft", [], resilient_parsing=True) as context:
        names = group.list_commands(context)
        parts = [_section(late.with_options(name), name) for name in names]
    return ABOUT + "\n".join(parts)


def _section(command: Any, name: str) -> str:
    """A verb: what it does, how it is called, its options by panel."""
    about, _, example = inspect.cleandoc(command.help or "").partition("Example:\n")
    lines = [f"## {name}", "", *_paragraphs(about)]
    if example:
        lines += ["```bash", inspect.cleandoc(example), "```", ""]
    with command.make_context(name, [], resilient_parsing=True) as context:
        usage = " ".join(command.collect_usage_pieces(context))
        lines += ["```text", f"peft-graft {name} {usage}", "```", ""]
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if parameter.name != "help" and not parameter.hidden:
                panels.setdefault(parameter.rich_help_panel or "", []).append(_row(parameter, context))
    for panel, rows in panels.items():
        lines += [f"### {panel} {{ #{name}-{panel.lower().replace(' ', '-')} }}", ""] if panel else []
        lines += ["| | takes | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _paragraphs(text: str | None) -> list[str]:
    return [*(text or "").replace("\b", "").strip().splitlines(), ""]


def _row(parameter: Any, context: Any) -> str:
    """A line of a table: names, what is given, what holds where nothing is, and what it is for."""
    is_argument = parameter.param_type_name == "argument"
    names = [parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    takes = "" if getattr(parameter, "is_flag", False) else parameter.display_type(context).strip("<>")
    default = parameter.default
    if parameter.required:
        default = "required"
    elif default is None or isinstance(default, bool) or callable(default):
        default = ""
    else:
        default = f"`{getattr(default, 'value', default)}`"
    takes = " or ".join(f"`{choice}`" for choice in takes.split("|")) if "|" in takes else takes
    about = re.sub(r"([\\`*_\[<])", r"\\\1", " ".join((parameter.help or "").split()))
    cells = ("<br>".join(f"`{name}`" for name in names), takes, default, about)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
