"""Figures as pages write them."""

from __future__ import annotations


def fact(label: str, value: str, about: str) -> dict[str, str]:
    """One of the facts of a page's first screen, for its template."""
    return {"label": label, "value": value, "about": about}


def number(value: float | None) -> str:
    """To three places."""
    return "–" if value is None else f"{value:.3f}"


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """``0.87 (95 % 0.82–0.99)``."""
    return f"{value:.2f}" + (f" (95 % {interval[0]:.2f}–{interval[1]:.2f})" if interval else "")


def millions(count: int) -> str:
    """``22.6 M``, ``1.5 B``."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def change(ratio: float) -> str:
    """``25% fewer``, ``2.0× as many``."""
    if abs(ratio - 1) < 0.005:
        return "the same size"
    return f"{1 - ratio:.0%} fewer" if ratio < 1 else f"{ratio:.1f}× as many" if ratio >= 2 else f"{ratio - 1:.0%} more"


def duration(seconds: float) -> str:
    """In seconds, minutes or hours."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def size(count: int) -> str:
    """Of so many bytes."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
