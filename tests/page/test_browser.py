"""Pages in a real browser: no error, no request, nothing wider than the screen, all of it seen, and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reports
from peft_graft.page.graft import graft_page
from peft_graft.page.shelf import shelf_page
from peft_graft.shelf import ShelfEntry, ShelfReport

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytest.importorskip("playwright", reason="playwright, of the extra dev, is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
LONG = "a-very-long-name-without-any-blank-" * 6


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {"tagger": reports.tagger(), "speaker": reports.speaker(LONG), "bare": reports.bare()}
    for name, report in made.items():
        (folder / f"{name}.html").write_text(graft_page(report, name), encoding="utf-8")
    entries = [
        ShelfEntry(name=LONG + name, module=LONG, teacher=LONG, state="written", verdict=report.verdict, seconds=9.0)
        for name, report in made.items()
    ]
    failed = ShelfEntry(name=LONG, module=LONG, state="failed", error=LONG)
    shelf = shelf_page(ShelfReport.of(LONG, [*entries, failed]), "shelf")
    (folder / "shelf.html").write_text(shelf, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in (*made, "shelf")}


@pytest.mark.parametrize("name", ["tagger", "speaker", "bare", "shelf"])
def test_pages_are_seen_whole_on_a_phone_and_on_a_screen(browser, pages, name: str) -> None:
    page = browser.new_page()
    errors, requests = [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for width, scheme in ((390, "light"), (1440, "dark")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(pages[name].as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for section in page.query_selector_all("section, .verdict, .facts > div, figure svg"):
            box = section.bounding_box()
            assert section.is_visible()
            assert box["x"] >= 0 < box["height"]
            assert box["x"] + box["width"] <= width
    assert errors == []
    assert all(address.startswith(("file:", "data:")) for address in requests), requests
    page.close()


def test_tables_are_sorted_and_pages_printed(browser, pages) -> None:
    page = browser.new_page()
    page.goto(pages["tagger"].as_uri())
    column = "section:has(h2:text('Agreement by class')) table.sortable"

    def labels() -> list[str]:
        return page.eval_on_selector_all(f"{column} tbody tr td:first-child", "cells => cells.map(c => c.textContent)")

    assert labels() == ["O", "B-PER", "B-LOC"]
    head = page.locator(f"{column} th", has_text="kept")
    head.locator("button").click()
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert labels()[0] == "B-LOC"
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
