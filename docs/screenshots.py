"""Pictures of reports for the documentation, on a wide screen and on a phone, by the Chromium that is installed.

python docs/screenshots.py NAME=GRAFT_FOLDER ...   # docs/pictures/report-NAME-wide.png and -phone.png
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from peft_graft.page.graft import graft_page
from peft_graft.report import read_report

PICTURES = Path(__file__).parent / "pictures"
#: Name -> width, height and colours.
SCREENS = {"wide": (1240, 1000, "light"), "phone": (390, 1000, "dark")}


def main(grafts: list[str]) -> None:
    """Draw the reports of grafts, given as NAME=FOLDER."""
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as driver, tempfile.TemporaryDirectory() as folder:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, _, graft in (each.partition("=") for each in grafts):
            file = Path(folder) / f"{name}.html"
            file.write_text(graft_page(read_report(Path(graft), graft), name), encoding="utf-8")
            for screen, (width, height, colours) in SCREENS.items():
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
                page.goto(file.as_uri())
                page.screenshot(path=PICTURES / f"report-{name}-{screen}.png")
                page.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
