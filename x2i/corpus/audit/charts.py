"""The report's drawings, as inline SVG: the bands of the funnel, and histograms.

Colours are classes, so that the page's style sheet decides them (light and dark). Text passes through
`Markup.format`, which escapes it.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from x2i.corpus.audit.scores import Histogram, nice_step
from x2i.corpus.audit.thresholds import Threshold

#: A histogram's box, and the plot within it, in SVG units (about a pixel on a phone).
WIDTH, HEIGHT = 360, 156
LEFT, RIGHT, TOP, BOTTOM = 12, 348, 30, 128


#: Width of the whole stream in the funnel's drawing (of 100), and the least share of it that can be seen.
STREAM, LEAST = 84, 0.006

SIGNS = {">": ">", ">=": "≥", "<": "<", "<=": "≤"}


def number(value: float | int | None) -> str:
    """A number for people: thousands apart, two to four digits that count."""
    if value is None:
        return "–"
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 1e5:
            return f"{value / unit:.3g}{name}" if size / unit < 999.5 else f"{value / unit:,.0f}{name}"
    if float(value).is_integer() or size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-")
    return f"{value:.3g}" if size < 100 else f"{value:.1f}"


def difference(value: float, threshold: float) -> str:
    """How far a value lies from a threshold, with its sign."""
    away = value - threshold
    return f"{'+' if away >= 0 else '−'}{number(abs(away))}"


def band(rows: int, fell: int, of: int, stage: str) -> Markup:
    """One step of the funnel: a stream of `rows` (of `of` that came in), from which `fell` turn off to the right.

    The drawing is stretched to its cell, so that the bands of all steps join whatever the height of their labels.
    """
    before, after = rows / max(of, 1), (rows - fell) / max(of, 1)
    b, a = STREAM * max(before, LEAST), STREAM * max(after, LEAST if after else 0)
    half = min(23.0, max(2.0, 150 * (before - after)))
    top, bottom, bend = 50 - half, 50 + half, b + 8
    off = (
        f"M{a:.2f},0H{b:.2f}C{b:.2f},{0.7 * top:.2f} {b + 2:.2f},{top:.2f} {bend:.2f},{top:.2f}H100V{bottom:.2f}H{bend:.2f}"
        f"C{a + 2:.2f},{bottom:.2f} {a:.2f},{0.7 * bottom:.2f} {a:.2f},0Z"
    )
    return Markup(
        '<span class="band"><svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        '<path class="off {}" d="{}"/><path class="stream" d="M0,0H{:.2f}V100H0Z"/></svg></span>'
    ).format(f"stage-{stage}", off if before > after else "", a)


def histogram(h: Histogram, thresholds: Sequence[Threshold], name: str) -> Markup:
    """Bars of kept rows with fallen ones on top, thresholds as lines; the side that fails is shaded."""
    tallest = max(k + f for k, f in zip(h.kept, h.fell, strict=True))
    parts = [_failing(h, t) for t in thresholds]
    parts += [_bar(h, i, tallest) for i in range(len(h.kept)) if h.kept[i] + h.fell[i]]
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM))
    parts += _ticks(h)
    parts += [_mark(h, t) for t in thresholds]
    marks = "".join(f", threshold {SIGNS[t.sign]} {number(t.value)}" for t in thresholds)
    label = (
        f"Histogram of {name}: {sum(h.kept):,} rows kept and {sum(h.fell):,} fallen, from {number(h.minimum)} to "
        f"{number(h.maximum)}, median {number(h.median)}{marks}"
    )
    return Markup('<svg class="histogram" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )


def _x(h: Histogram, value: float) -> float:
    share = (value - h.low) / (h.high - h.low)
    return LEFT + min(1.0, max(0.0, share)) * (RIGHT - LEFT)


def _bar(h: Histogram, index: int, tallest: int) -> Markup:
    low, high = h.edges(index)
    kept, fell = h.kept[index], h.fell[index]
    scale = (BOTTOM - TOP) / tallest
    # whatever is there can be seen: near a threshold one row matters
    up = max(2.0, kept * scale) if kept else 0.0
    more = max(2.0, fell * scale) if fell else 0.0
    x, width = _x(h, low) + 0.5, _x(h, high) - _x(h, low) - 1
    first = "" if index or not h.low_open else f"{number(h.minimum)} … "
    last = "" if index < len(h.kept) - 1 or not h.high_open else f" … {number(h.maximum)}"
    title = f"{first}{number(low)} to {number(high)}{last}: {kept:,} kept, {fell:,} fell"
    return Markup(
        '<g><title>{}</title><rect class="hit" x="{:.2f}" y="{}" width="{:.2f}" height="{}"/>'
        '<rect class="kept" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>'
        '<rect class="fell" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/></g>'
    ).format(title, x, TOP, width, BOTTOM - TOP, x, BOTTOM - up, width, up, x, BOTTOM - up - more, width, more)


def _ticks(h: Histogram) -> list[Markup]:
    step = nice_step(h.high - h.low, 4)
    first, out = round(h.low / step), []
    for i in range(8):
        value = (first + i) * step
        if h.low - step * 1e-6 <= value <= h.high + step * 1e-6:
            x = _x(h, value)
            anchor = "start" if x < LEFT + 12 else "end" if x > RIGHT - 12 else "middle"
            value = 0.0 if abs(value) < step * 1e-6 else value
            out.append(
                Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
                    x, BOTTOM + 17, anchor, number(value)
                )
            )
    return out


def _failing(h: Histogram, t: Threshold) -> Markup:
    x = _x(h, t.value)
    start, end = (LEFT, x) if t.sign.startswith(">") else (x, RIGHT)
    return Markup('<rect class="failing" x="{:.2f}" y="{}" width="{:.2f}" height="{}"/>').format(
        start, TOP - 6, end - start, BOTTOM - TOP + 6
    )


def _mark(h: Histogram, t: Threshold) -> Markup:
    x = _x(h, t.value)
    text = f"{SIGNS[t.sign]} {number(t.value)}"
    if t.value > h.high:
        text = f"{text} →"
    elif t.value < h.low:
        text = f"← {text}"
    anchor = "start" if x < LEFT + 40 else "end" if x > RIGHT - 40 else "middle"
    return Markup(
        '<line class="threshold" x1="{:.2f}" x2="{:.2f}" y1="{}" y2="{}"/>'
        '<text class="threshold" x="{:.2f}" y="{}" text-anchor="{}">{}</text>'
    ).format(x, x, TOP - 8, BOTTOM, x, TOP - 13, anchor, text)
