"""HTML from templates: styles, script and pictures inside the file, every string escaped, nothing fetched."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


def render(template: str, **values: object) -> str:
    """A page. Only its own script may run in it: the page names the script's hash.

    Args:
        template: of ``templates/page``. values: strings among them are text, ``Markup`` is markup.
    """
    style, script = _source("style.css"), _source("script.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found = (
        _environment()
        .get_template(f"page/{template}")
        .render(**values, style=Markup(style), script=Markup(script), script_hash=f"sha256-{digest}")
    )
    return found.encode("utf-8", "backslashreplace").decode()  # half a pair of surrogates, which no file can hold


def fragment(template: str, **values: object) -> Markup:
    """A part of a page, from a template of ``templates/page``; strings among the values are text."""
    return Markup(_environment().get_template(f"page/{template}").render(**values))


@cache
def _source(name: str) -> str:
    return (files("peft_graft") / "templates" / "page" / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("peft_graft", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalised"] = lambda text: text[:1].upper() + text[1:]
    return environment
