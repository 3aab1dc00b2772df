"""The page of a shelf: every module with its verdict and its own page, and those that failed with their reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_graft_page import HOSTILE, Read

import reports
from peft_graft.errors import CheckpointError
from peft_graft.page.shelf import shelf_page
from peft_graft.shelf import SHELF, ShelfEntry, ShelfReport, read_shelf


def report() -> ShelfReport:
    entries = [
        ShelfEntry(
            name="json lora", module="/models/json-lora", teacher="/models/old-base", state="written", method="ridge",
            verdict=reports.tagger().verdict, first=True, seconds=130.0,
        ),
        ShelfEntry(
            name=f"b{HOSTILE.replace('/', '')}", module="me/b", teacher="me/base", state="kept", method="fresh",
            verdict=reports.bare().verdict, seconds=20.0,
        ),
        ShelfEntry(name="broken", module="/models/broken", state="failed", error=f"no module there {HOSTILE}"),
    ]  # fmt: skip
    return ShelfReport.of("/models/new-base", entries)


def test_every_module_is_there_with_its_verdict_and_its_page() -> None:
    found = Read(page := shelf_page(report(), "my-shelf"))
    for said in (
        "2 modules moved to new-base", "report of the shelf my-shelf", "2 of 3", "1 strong, 1 not measured",
        "0.87 (95 % 0.82–0.99)", "from json-lora", "old-base", "2 min 10 s", "(kept)", "no module there",
    ):  # fmt: skip
        assert said in found.text, said
    assert found.headings == ["Modules", "Modules that failed"]
    links = [about["href"] for element, about in found.elements if element == "a"]
    assert links[0] == "json%20lora/report.html"
    assert all(link.endswith("/report.html") and '"' not in link and "<" not in link for link in links)
    assert {element for element, _ in found.elements} <= {
        "html", "head", "meta", "title", "link", "style", "body", "main", "p", "h1", "h2", "div", "strong", "span",
        "section", "table", "thead", "tbody", "tr", "th", "td", "a", "script",
    }  # fmt: skip
    assert page.count("<script>") == 1, "no string is markup"
    assert "/models/" not in found.text, "no place of this machine"


def test_a_report_is_read_again_or_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{SHELF}: the file is not readable JSON"):
        read_shelf(tmp_path)
    (tmp_path / SHELF).write_text(report().model_dump_json())
    assert read_shelf(tmp_path) == report()
    assert shelf_page(read_shelf(tmp_path), "my-shelf") == shelf_page(report(), "my-shelf")
    (tmp_path / SHELF).write_text('{"student": 3}')
    with pytest.raises(CheckpointError, match="the report was written by another version"):
        read_shelf(tmp_path)
