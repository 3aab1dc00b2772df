"""Numbers, times and lists as a terminal shows them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """A time that a reader can plan with: ``8 s``, ``3 min``, ``2 h 10 min``."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def memory(mib: float) -> str:
    """An amount of memory: ``350 MiB``, ``4.1 GiB``."""
    return f"{mib:,.0f} MiB" if mib < 2_000 else f"{mib / 1024:,.1f} GiB"


def figure(value: float | None, interval: tuple[float, float] | None = None) -> str:
    """A figure with its 95 % interval."""
    return "undefined" if value is None else f"{value:.2f}{spread(interval)}"


def spread(interval: tuple[float, float] | None) -> str:
    """A 95 % interval, or nothing."""
    return "" if interval is None else f" [95 % {interval[0]:.2f}–{interval[1]:.2f}]"


def pairing(share: float, of: str, digits: float | None) -> str:
    """How many of some tokens pair, and of those with digits, where there are any."""
    return f"{share:.0%} of {of} pair" + ("" if digits is None else f", {digits:.0%} of those with digits")


def ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def layers_as_text(mapping: list[list[int]] | dict[str, list[list[int]]]) -> str:
    """Teacher layers of each student layer: ``0 → 0, 2 → 1``."""
    if isinstance(mapping, dict):
        return "; ".join(f"{stack}: {layers_as_text(layers)}" for stack, layers in mapping.items())
    return ", ".join(f"{'+'.join(map(str, sources))} → {layer}" for layer, sources in enumerate(mapping))
