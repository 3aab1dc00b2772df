"""Pictures as SVG inside a page: drawn by matplotlib, coloured by the page, so that they read in light and in dark."""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours as they are drawn -> the page's.
_COLOURS = {
    "#010203": "--ink",
    "#010204": "--muted",
    "#010205": "--line",
    "#010206": "--accent",
    "#010207": "--second",
    "#010208": "--third",
    "#010209": "--fourth",
}
INK, MUTED, LINE, *SERIES = _COLOURS
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it is read aloud, found and coloured
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; the page's own font stands in the page
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "text.parse_math": False,  # names are text
}
#: Rows of a heat map whose values are written into it.
_MOST_WRITTEN = 26
Value = float | None
_P = ParamSpec("_P")


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows, and its numbers as a table (none where ``rows`` is empty)."""

    title: str
    svg: Markup
    caption: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


def _drawing(draw: Callable[_P, Picture]) -> Callable[_P, Picture]:
    """A function that draws, under our settings from its first line to its last."""

    @wraps(draw)
    def drawn(*args: _P.args, **options: _P.kwargs) -> Picture:
        import matplotlib

        with matplotlib.rc_context(_SETTINGS):
            return draw(*args, **options)

    return drawn


@_drawing
def layer_map(layers: Sequence[Sequence[int]], teacher_layers: int, title: str) -> Picture:
    """The teacher's layers on the left, the student's on the right, lines where a layer comes from."""
    from matplotlib.collections import LineCollection

    most = max(teacher_layers, len(layers), 1)
    figure, axes = _figure(3.8, 0.5 + 0.19 * most, (0, 0, 0, 0))
    heights = [[_height(row, count, most) for row in range(count)] for count in (teacher_layers, len(layers))]
    used = {source for sources in layers for source in sources}
    lines = [
        [(0.19, heights[0][source]), (0.81, heights[1][layer])]
        for layer, sources in enumerate(layers)
        for source in sources
    ]
    axes.add_collection(LineCollection(lines, colors=SERIES[0], linewidths=1.3, alpha=0.75))
    for side, (x, column) in enumerate(zip((0.12, 0.88), heights, strict=True)):
        for row, y in enumerate(column):
            idle = side == 0 and row not in used
            style: dict[str, Any] = {"color": MUTED if idle else INK, "alpha": 0.55 if idle else 1.0, "fontsize": 8}
            axes.text(x, y, str(row), ha="center", va="center", **style)
    axes.text(0.12, most - 0.1, "teacher layer", ha="center", color=MUTED)
    axes.text(0.88, most - 0.1, "student layer", ha="center", color=MUTED)
    axes.set(xlim=(0, 1), ylim=(-0.7, most + 0.7))
    axes.axis("off")
    said = "; ".join(
        f"student layer {layer} from {' + '.join(map(str, sources)) or 'none'}" for layer, sources in enumerate(layers)
    )
    unused = teacher_layers - len(used)
    caption = "Which teacher layers each student layer comes from" + f"; {unused} are left out" * bool(unused) + "."
    return Picture(title, _svg(figure, title, said), caption)


def _height(row: int, count: int, most: int) -> float:
    """Layers spread over the whole height, the first on top."""
    return (most - 1) * (1 - row / (count - 1)) if count > 1 else (most - 1) / 2


@_drawing
def heat_map(
    values: Mapping[tuple[str, str], Value], title: str, caption: str, *, rows_are: str, percent: bool = False
) -> Picture:
    """Values by (row, column), darker for more; rows and columns in the order in which they come."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    rows, columns = (list(dict.fromkeys(key[part] for key in values)) for part in (0, 1))
    left, top = (0.35 + 0.075 * max(map(len, names)) for names in (rows, columns))
    width = max(2.2, 0.62 * len(columns))
    figure, axes = _figure(left + width + 0.45 * top, 0.8 * top + 0.22 * len(rows), (left, 0.8 * top, 0.45 * top, 0.05))
    known = {place: value for place, value in values.items() if value is not None}
    most = max(known.values(), default=1.0) or 1.0
    places = {key: (columns.index(key[1]), rows.index(key[0])) for key in known}
    strengths = [0.06 + 0.74 * max(0.0, value) / most for value in known.values()]
    cells = [Rectangle((x - 0.47, y - 0.45), 0.94, 0.9) for x, y in places.values()]
    colours = [to_rgba(SERIES[0], strength) for strength in strengths]
    axes.add_collection(PatchCollection(cells, facecolors=colours, linewidths=0))
    if len(rows) <= _MOST_WRITTEN:
        for place, value in known.items():
            axes.text(*places[place], _value(value, percent=percent), ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xticks(range(len(columns)), columns, rotation=38, ha="left", rotation_mode="anchor")
    every = max(1, len(rows) // 16)
    axes.set_yticks(range(0, len(rows), every), rows[::every])
    if len(rows) > 4:  # beside fewer there is no room for it
        axes.set_ylabel(rows_are)
    axes.xaxis.tick_top()
    _bare(axes)
    table = [[row, *(_value(values.get((row, column)), percent=percent) for column in columns)] for row in rows]
    return Picture(title, _svg(figure, title, caption), caption, [rows_are, *columns], table)


@_drawing
def curves(series: Mapping[str, Sequence[tuple[float, float]]], title: str, caption: str, *, x: str, y: str) -> Picture:
    """Lines over steps, the first one strong; the numbers as a table with a column for each."""
    figure, axes = _figure(6.4, 3.0, (0.6, 0.1, 0.1, 0.5))
    for number, (name, points) in enumerate(series.items()):
        colour, width = SERIES[number % len(SERIES)], 2.2 if number == 0 else 1.4
        dashes = "-" if number == 0 else "--"
        axes.plot(
            *zip(*points, strict=True), dashes, color=colour, linewidth=width, marker="o", markersize=3.5, label=name
        )
    axes.set(xlabel=x, ylabel=y)
    axes.grid(visible=True, axis="y", linewidth=0.7)
    axes.tick_params(length=0)
    axes.legend(frameon=False, fontsize=8.5, loc="best")
    steps = sorted({step for points in series.values() for step, _ in points})
    known = [dict(points) for points in series.values()]
    table = [[f"{step:g}", *(_value(points.get(step)) for points in known)] for step in steps]
    return Picture(title, _svg(figure, title, caption), caption, [x, *series], table)


@_drawing
def bars(
    values: Mapping[str, Mapping[str, tuple[float, float | None]]], title: str, caption: str, *, y: str
) -> Picture:
    """Groups of bars: group -> series -> (value, spread)."""
    names = list(dict.fromkeys(name for group in values.values() for name in group))
    size = max(3.2, 0.24 * len(names) * len(values) + 0.3 * len(values))
    legend = 0.6 + 0.075 * max(map(len, names), default=0)
    figure, axes = _figure(0.6 + size + legend, 2.9, (0.6, 0.1, legend, 0.35))
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        found = [(at, group[name]) for at, group in enumerate(values.values()) if name in group]
        places = [at + (number - (len(names) - 1) / 2) * width for at, _ in found]
        axes.bar(
            places, [value for _, (value, _) in found], width * 0.88, color=SERIES[number % len(SERIES)], label=name,
            alpha=max(0.3, 1 - 0.4 * (number // len(SERIES))),
            yerr=[spread or 0 for _, (_, spread) in found], error_kw={"ecolor": MUTED, "elinewidth": 1},
        )  # fmt: skip
    axes.set_xticks(range(len(values)), list(values))
    axes.set_ylabel(y)
    axes.grid(visible=True, axis="y", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return Picture(title, _svg(figure, title, caption), caption)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, margins: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    """A figure with its axes; sizes in inches, margins left, top, right and bottom."""
    from matplotlib.figure import Figure

    left, top, right, bottom = margins
    figure = Figure(figsize=(width, height))
    inner = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(inner)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    return figure, axes


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _value(value: Value, *, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:.0%}" if percent else f"{value:g}" if value == int(value) else f"{value:.2f}"


def _svg(figure: Figure, title: str, about: str) -> Markup:
    """The picture with the page's colours, its title and what it says, and names that no other picture has."""
    import matplotlib

    drawn = io.StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks; the page's fonts write them
        figure.savefig(drawn, format="svg", metadata=nothing)
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for drawn_as, colour in _COLOURS.items():
        text = text.replace(drawn_as, f"var({colour})")
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px)[^;\"]*", r"font: \2 inherit", text)
    own = f"p{zlib.crc32(title.encode('utf-8', 'replace'))}"
    text = re.sub(r'(\bid="|"#|\(#)', rf"\g<1>{own}-", text)
    width, height = (72 * size for size in figure.get_size_inches())
    start = f'<svg role="img" aria-labelledby="{own}-title {own}-about" viewBox="0 0 {width:g} {height:g}">'
    named = f'<title id="{own}-title">{escape(title)}</title><desc id="{own}-about">{escape(about)}</desc>'
    return Markup(start + named + text[text.index(">") + 1 :])
