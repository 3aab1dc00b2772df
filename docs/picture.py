"""Draw docs/packages.svg: the packages by layer, and their imports as the code has them.

python docs/picture.py
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "packages.svg"
PACKAGE = "peft_graft"
WIDTH, BOX, HEIGHT, GAP, WRAP = 1120, 250, 66, 30, 40


def layers() -> list[list[str]]:
    """The layers of import-linter's contract, from the top."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(found for found in settings["tool"]["importlinter"]["contracts"] if found["type"] == "layers")
    return [[name.strip() for name in layer.replace(":", "|").split("|")] for layer in contract["layers"]]


def imports(names: list[str]) -> dict[str, set[str]]:
    """Package -> packages that it imports, without those that are imported by another one of them."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    direct = {
        name: {
            other
            for other in names
            if other != name
            and graph.direct_import_exists(
                importer=f"{PACKAGE}.{name}", imported=f"{PACKAGE}.{other}", as_packages=True
            )
        }
        for name in names
    }

    def reached(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        below = direct[name] - seen
        return below.union(*(reached(other, seen | {name}) for other in below))

    return {
        name: {other for other in below if not any(other in reached(middle) for middle in below - {other})}
        for name, below in direct.items()
    }


def summary(name: str) -> str:
    """The first sentence of a package's or module's docstring."""
    path = ROOT / "src" / PACKAGE / name
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "")


def draw() -> str:
    """The picture as SVG."""
    rows = layers()
    at = {}
    for level, row in enumerate(rows):
        width = len(row) * BOX + (len(row) - 1) * GAP / 2
        for index, name in enumerate(row):
            at[name] = ((WIDTH - width) / 2 + index * (BOX + GAP / 2), 10 + level * (HEIGHT + GAP))
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {len(rows) * (HEIGHT + GAP)}" '
        'font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#557"/></marker>',
    ]
    level = {name: number for number, row in enumerate(rows) for name in row}
    for name, below in sorted(imports(list(at)).items()):
        for other in sorted(below):
            (x, y), (to_x, to_y) = at[name], at[other]
            x, y, to_x = x + BOX / 2, y + HEIGHT, to_x + BOX / 2
            # What passes other layers goes around them.
            below_by = level[other] - level[name]
            aside = 0 if below_by == 1 else min(75 + 75 * below_by, 640)
            aside = -aside if x + to_x < WIDTH or (x + to_x == WIDTH and level[name] % 2) else aside
            lines.append(
                f'<path d="M{x:.0f} {y:.0f}C{x + aside:.0f} {y + GAP:.0f} {to_x + aside:.0f} {to_y - GAP:.0f} '
                f'{to_x:.0f} {to_y:.0f}" fill="none" stroke="#557" marker-end="url(#tip)"/>'
            )
    for name, (x, y) in at.items():
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#eef2fb" stroke="#557"/>'
            f'<text x="{x + 10:.0f}" y="{y + 19:.0f}" font-size="14" font-weight="bold">{name}</text>'
        )
        for number, line in enumerate(textwrap.wrap(summary(name), WRAP, max_lines=3, placeholder=" ...")):
            words = escape(line, quote=False)
            lines.append(f'<text x="{x + 10:.0f}" y="{y + 33 + 12 * number:.0f}" font-size="11">{words}</text>')
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
