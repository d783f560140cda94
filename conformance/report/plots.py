"""Small plots as inline SVG, each with its numbers as text."""

import math

from ..oracle import WIDE_ULPS
from .escape import text

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 320, 96, 38, 8, 16, 8


def errors(counts):
    """Elements by error over bound, in tenths."""
    names = [f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(len(counts))]
    ticks = {i: f"{i / 10:g}" for i in range(0, len(counts) + 1, 2)}
    return _plot("Error as a share of its bound", counts, names, ticks)


def widths(counts):
    """Elements by floor(log2(1 + admissible ulps)); those that tell little are marked."""
    last = len(counts) - 1
    edges = [2**i - 1 for i in range(len(counts) + 1)]
    names = [f"{edges[i]:,} ulps and more" if i == last else f"{edges[i]:,} to {edges[i + 1]:,} ulps" for i in range(len(counts))]
    ticks = {i: f"{edges[i]:,}" for i in range(0, len(counts), 4)}
    wide = int(math.log2(1 + WIDE_ULPS))
    return _plot("Admissible ulps", counts, names, ticks, wide, f" From {edges[wide]} on, dashed, an element tells little.")


def shares(counts):
    """Counts by name, as a table with bars; the largest first."""
    total = sum(counts.values())
    rows = "".join(
        f"<tr><th scope='row'>{text(name)}</th><td>{count:,}</td>"
        f"<td class='share'><span style='--share:{count / total:.3f}'></span></td></tr>"
        for name, count in sorted(counts.items(), key=lambda item: -item[1])
    )
    return f"<table class='shares'><tbody>{rows}</tbody></table>"


def _plot(title, counts, names, ticks, wide=math.inf, note=""):
    """Bars of logarithmic height over named bins; ticks: {edge: text}; wide: the first bin drawn as one of little worth; note: on it."""
    total, most = sum(counts), max(counts)
    if not total:
        return ""
    step = (WIDTH - LEFT - RIGHT) / len(counts)
    scale = (HEIGHT - TOP - BOTTOM) / math.log1p(most)
    floor = HEIGHT - BOTTOM
    bars = "".join(
        f"<rect class='{'wide' if i >= wide else 'bar'}' x='{LEFT + i * step + 1:.1f}' width='{step - 2:.1f}'"
        f" y='{floor - math.log1p(n) * scale:.1f}' height='{math.log1p(n) * scale:.1f}'><title>{names[i]}: {n:,}</title></rect>"
        for i, n in enumerate(counts)
        if n
    )
    marks = "".join(
        f"<text x='{LEFT + edge * step:.1f}' y='{HEIGHT - 3}' text-anchor='middle'>{tick}</text>" for edge, tick in ticks.items()
    )
    told = "; ".join(f"{name}: {n / total:.1%}" for name, n in zip(names, counts, strict=True) if n)
    return (
        f"<figure><figcaption><b>{title}.</b> {total:,} elements, heights logarithmic.{note}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{title}. {told}'>{bars}"
        f"<path class='axis' d='M{LEFT} {floor}H{WIDTH - RIGHT}'/>{marks}"
        f"<text x='{LEFT - 4}' y='{TOP + 6}' text-anchor='end'>{_short(most)}</text>"
        f"<text x='{LEFT - 4}' y='{floor}' text-anchor='end'>0</text></svg></figure>"
    )


def _short(n):
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return str(n)
