"""What the documentation is made of: pictures that a command draws, pages in the menu, a reference of all options."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import yaml

from peft_graft.config import AlignConfig, EvaluateConfig, GraftConfig, StudyConfig

DOCS = Path(__file__).parents[2] / "docs"


def loaded(name: str) -> ModuleType:
    """A script of docs as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_what_the_command_draws() -> None:
    pictures = loaded("pictures").PICTURES
    assert {path.stem for path in (DOCS / "pictures").glob("*.svg")} == set(pictures)
    for name, made in pictures.items():
        drawn = str(made())
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == drawn
        assert "<title>" in drawn


def test_the_reference_has_every_verb_and_every_choice() -> None:
    page = loaded("hooks").command_line()
    assert re.findall(r"^## (.+)$", page, re.M)[:2] == ["inspect", "transfer"]
    for config in (GraftConfig, AlignConfig, EvaluateConfig, StudyConfig):
        for name in config.model_fields:
            assert f"`--{name.rstrip('_').replace('_', '-')}`" in page, name
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}, "cells that break their table"


def test_every_page_has_a_place_in_the_menu() -> None:
    menu = yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = set(re.findall(r"[\w/-]+\.md", str(menu)))
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    there |= {str(path.relative_to(DOCS).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")}
    assert named - {"reference/cli.md", "changelog.md"} == there
