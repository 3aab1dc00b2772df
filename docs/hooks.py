"""Pages that mkdocs makes anew at every build: the command line's reference, from its options, the changelog, and the
notebooks with what their cells showed."""

from __future__ import annotations

import inspect
import json
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
    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=notebook(path)))
    return files


def notebook(path: Path) -> str:
    """A notebook as Markdown: text, code, and what the code showed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            # Links between notebooks lead to their pages, and those within one to what mkdocs calls its headings.
            source = re.sub(r"\((\w+)\.ipynb\)", r"(\1.md)", source)
            parts.append(re.sub(r"\(#[\w-]+\)", lambda link: link[0].lower(), source))
        else:
            parts += [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]
    title, *rest = parts
    about = (
        f"This is [{path.name}]({path.name}) with what its cells showed. It runs wherever `peft-graft` is installed."
    )
    return "\n\n".join([title, about, *rest]) + "\n"


def _shown(output: dict[str, Any]) -> str:
    """What a cell showed: HTML where there is any, on one line, as Markdown wants it."""
    data = output.get("data", {})
    if "text/html" in data:
        content = "".join(data["text/html"]).replace("\n", "&#10;")
        return f"<div>{content}</div>"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"


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
