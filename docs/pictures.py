"""Draw the pictures of docs/concepts.md.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parent / "pictures"
INK, LINE, TEAL, SAND, ROSE = "#223", "#557", "#d6efe9", "#f7ecd0", "#f7dcdc"
Point = tuple[float, float]


class Picture:
    """An SVG picture that grows shape by shape; coordinates are of shapes' upper left corners."""

    def __init__(self, width: int, height: int, about: str) -> None:
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'role="img" fill="{INK}"><title>{escape(about)}</title>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
            '<marker id="tip" viewBox="0 0 8 8" refX="7.5" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{LINE}"/></marker>',
        ]

    def box(self, at: Point, size: Point, lines: Iterable[str], fill: str = TEAL) -> None:
        """A box with centred lines, the first of them bold."""
        (x, y), (width, height), words = at, size, list(lines)
        self.lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{LINE}"/>'
        )
        top = y + height / 2 - (len(words) - 1) * 9 + 5
        for number, line in enumerate(words):
            bold = number == 0 and len(words) > 1
            self.text((x + width / 2, top + 18 * number), line, size=14 if bold else 13, bold=bold, middle=True)

    def text(self, at: Point, words: str, *, size: int = 13, bold: bool = False, middle: bool = False) -> None:
        """A line of text on its base line."""
        look = (' font-weight="bold"' if bold else "") + (' text-anchor="middle"' if middle else "")
        self.lines.append(f'<text x="{at[0]}" y="{at[1]}" font-size="{size}"{look}>{escape(words)}</text>')

    def arrow(self, *points: Point, tip: bool = True) -> None:
        """A line through points, with a tip at the last."""
        path = "L".join(f"{x} {y}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.lines.append(f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.5"{end}/>')

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>", ""])


def move() -> Picture:
    """What goes in, what is compared, what comes out."""
    picture = Picture(820, 330, "The teacher answers unlabelled text; the graft on the student learns its answers")
    picture.box((20, 30), (190, 60), ["module", "LoRA, adapter, head ..."], SAND)
    picture.box((20, 90), (190, 60), ["old base", "frozen"])
    picture.text((115, 22), "teacher", bold=True, middle=True)
    picture.box((20, 235), (190, 60), ["text of the task", "without labels"], "#eee")
    picture.box((315, 60), (190, 62), ["what the teacher says", "classes, answers"], "#eee")
    picture.box((610, 30), (190, 60), ["graft", "starts moved or fresh"], SAND)
    picture.box((610, 90), (190, 60), ["new base", "frozen"])
    picture.text((705, 22), "student", bold=True, middle=True)
    picture.arrow((115, 235), (115, 156))
    picture.arrow((210, 91), (309, 91))
    picture.arrow((505, 91), (604, 91))
    picture.text((554, 82), "learned", middle=True)
    picture.arrow((210, 265), (705, 265), (705, 156))
    picture.text((430, 258), "the same text", middle=True)
    picture.box((315, 160), (190, 62), ["verdict", "do the two agree?"], ROSE)
    picture.arrow((400, 122), (400, 154))
    picture.arrow((604, 140), (560, 191), (511, 191))
    picture.text((430, 310), "Text that the verdict uses is kept from everything before it.", middle=True)
    return picture


def split() -> Picture:
    """The parts of a text."""
    picture = Picture(820, 150, "A text is split into what judges, what chooses, and what is learned")
    picture.box((20, 20), (110, 62), ["judges", "a tenth"], ROSE)
    picture.box((140, 20), (110, 62), ["chooses", "a tenth"], SAND)
    picture.box((260, 20), (540, 62), ["aligns, fits, polishes", "the rest"])
    picture.text((20, 112), "The verdict.")
    picture.text((140, 112), "Which start, rate")
    picture.text((140, 130), "and step to keep.")
    picture.text((260, 112), "What the graft learns from. Texts that are nearly alike always go to the same part.")
    return picture


def tokens() -> Picture:
    """The tokens of two tokenizers, paired by the characters that they cover."""
    picture = Picture(820, 215, "Tokens of two tokenizers pair by the characters that they cover")
    old = [("Lis", 3), ("bon", 3), (" harbour", 8), (" is", 3), (" gr", 3), ("een", 3), (".", 1)]
    new = [("Lisbon", 6), (" har", 4), ("bour", 4), (" is", 3), (" green", 6), (".", 1)]
    step, left = 29, 100
    picture.text((20, 60), "old base", bold=True)
    picture.text((20, 165), "new base", bold=True)
    ends = []
    for top, pieces in ((35, old), (140, new)):
        place, found = 0, [0]
        for piece, length in pieces:
            width = length * step
            picture.box((left + place * step + 2, top), (width - 4, 40), [piece.replace(" ", "␣")], "#eef2fb")
            place += length
            found.append(place)
        ends.append(found)
    shared = sorted(set(ends[0]) & set(ends[1]))
    for start, end in pairwise(shared):
        alone = all(sum(start < place <= end for place in found) == 1 for found in ends)
        x, width = left + start * step + 2, (end - start) * step - 4
        picture.lines.append(
            f'<rect x="{x}" y="82" width="{width}" height="51" rx="4" fill="{TEAL if alone else SAND}"/>'
        )
        if width > 60:
            picture.text((x + width / 2, 112), "one to one" if alone else "means pair", size=12, middle=True)
    picture.text(
        (left, 203), "Blocks are the smallest pieces of text that begin and end at the same character for both."
    )
    return picture


def layers() -> Picture:
    """Which layers of the teacher a layer of the student is made of."""
    picture = Picture(820, 270, "Layer maps: skip takes the first layer of each window, avg the mean of the window")
    for left, name, taken in ((20, "skip", (0, 2, 4)), (430, "avg", range(6))):
        picture.text((left, 25), f"--layers {name}", bold=True)
        for number in range(6):
            y = 215 - 36 * number
            picture.box((left, y), (130, 30), [f"layer {number}"], SAND if number in taken else "#eee")
            if number in taken:
                to = 197 - 72 * (number // 2) + 15
                picture.arrow((left + 130, y + 15), (left + 234, to))
        for number in range(3):
            picture.box((left + 240, 197 - 72 * number), (130, 30), [f"layer {number}"])
        picture.text((left + 65, 262), "old base", middle=True)
        picture.text((left + 305, 262), "new base", middle=True)
    return picture


def levels() -> Picture:
    """The words of the verdict on the scale of agreement."""
    picture = Picture(820, 120, "Levels of the verdict by agreement with the teacher")
    bounds = [(0.0, "no better", ROSE), (0.15, "weak", SAND), (0.5, "useful", "#eaf3d8"), (0.8, "strong", TEAL)]
    left, width = 30, 740
    for (start, name, fill), end in zip(bounds, [0.15, 0.5, 0.8, 0.995], strict=True):
        picture.box((left + start * width, 25), ((end - start) * width, 44), [name], fill)
        picture.text((left + start * width, 92), f"{start:g}", middle=True)
    picture.box((left + 0.995 * width, 25), (12, 44), [""], "#9cd6c8")
    picture.text((left + 0.995 * width, 92), "0.995", middle=True)
    picture.text((left + 0.995 * width - 18, 17), "exact")
    return picture


PICTURES = {made.__name__: made for made in (move, split, tokens, layers, levels)}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, made in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(str(made()), encoding="utf-8")
