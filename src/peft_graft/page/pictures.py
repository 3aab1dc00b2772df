"""Pictures inside a page, coloured by the page, so that they read in light and in dark.

Maps of layers and heat maps, which every graft has, come from templates; what has axes is drawn by matplotlib.
"""

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

from peft_graft.page.render import fragment

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
#: Heights of a map of layers, in units of its drawing: of a layer, and of what is written above.
_LAYER, _ABOVE = 14, 24
Value = float | None
_P = ParamSpec("_P")


@dataclass(frozen=True)
class Picture:
    """A picture, what it shows, and its numbers as a table (none where ``rows`` is empty)."""

    title: str
    drawn: Markup
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


def layer_map(layers: Sequence[Sequence[int]], teacher_layers: int, title: str) -> Picture:
    """The teacher's layers on the left, the student's on the right, lines where a layer comes from."""
    most = max(teacher_layers, len(layers), 1)
    heights = [[_height(row, count, most) for row in range(count)] for count in (teacher_layers, len(layers))]
    used = {source for sources in layers for source in sources}
    labels = [
        (x, y, row, side == 0 and row not in used)
        for side, (x, column) in enumerate(zip((33, 241), heights, strict=True))
        for row, y in enumerate(column)
    ]
    lines = [(heights[0][source], heights[1][layer]) for layer, sources in enumerate(layers) for source in sources]
    said = "; ".join(
        f"student layer {layer} from {' + '.join(map(str, sources)) or 'none'}" for layer, sources in enumerate(layers)
    )
    drawn = fragment(
        "layer_map.svg.jinja", title=title, about=said, own=_own_name(title), height=_ABOVE + _LAYER * most,
        lines=lines, labels=labels,
    )  # fmt: skip
    unused = teacher_layers - len(used)
    caption = (
        "Which teacher layers each student layer comes from"
        + f"; {unused} {'is' if unused == 1 else 'are'} left out" * bool(unused)
        + "."
    )
    return Picture(title, drawn, caption)


def _height(row: int, count: int, most: int) -> float:
    """Layers spread over the whole height, the first on top."""
    return _ABOVE + _LAYER * (0.5 + ((most - 1) * row / (count - 1) if count > 1 else (most - 1) / 2))


def heat_map(
    values: Mapping[tuple[str, str], Value], title: str, caption: str, *, rows_are: str, percent: bool = False
) -> Picture:
    """A table of values by (row, column), darker for more; rows and columns in the order in which they come."""
    rows, columns = (list(dict.fromkeys(key[part] for key in values)) for part in (0, 1))
    most = max((value for value in values.values() if value is not None), default=1.0) or 1.0

    def cell(value: Value) -> tuple[str, float | None]:
        return _value(value, percent=percent), None if value is None else 6 + 74 * max(0.0, value) / most

    cells = [(row, [cell(values.get((row, column))) for column in columns]) for row in rows]
    return Picture(
        title, fragment("heat_map.html.jinja", title=title, rows_are=rows_are, columns=columns, rows=cells), caption
    )


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
    own = _own_name(title)
    text = re.sub(r'(\bid="|"#|\(#)', rf"\g<1>{own}-", text)
    width, height = (72 * size for size in figure.get_size_inches())
    start = f'<svg role="img" aria-labelledby="{own}-title {own}-about" viewBox="0 0 {width:g} {height:g}">'
    named = f'<title id="{own}-title">{escape(title)}</title><desc id="{own}-about">{escape(about)}</desc>'
    return Markup(start + named + text[text.index(">") + 1 :])


def _own_name(title: str) -> str:
    """A name that no other picture of the page has."""
    return f"p{zlib.crc32(title.encode('utf-8', 'replace'))}"
