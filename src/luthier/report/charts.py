"""Charts as inline SVG. Colours come from the page's style sheet, so a chart follows light and dark; sizes
are chosen for a column of about 400 px, so that letters stay readable on a phone.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

WIDTH = 400
_LETTER = 6.3  # mean width of a letter at the chart's font size, in viewBox units
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One curve; `tone` picks its colour: 'main', 'second'."""

    name: str
    points: list[Point]
    tone: Literal["main", "second"] = "main"


@dataclass(frozen=True)
class Mark:
    """One point with an interval. `front` marks it as not beaten by any other; `series` picks a colour."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    front: bool = False
    hint: str = ""


class Axis:
    """A scale from data to pixels with round ticks."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.06
    ):
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        low, high = min(finite), max(finite)
        self.log = log
        a, b = (math.log10(low), math.log10(high)) if log else (low, high)
        room = (b - a) * pad if b > a else (0.3 if log else abs(a) * 0.1 or 1.0)
        self.a, self.b, self.start, self.end = a - room, b + room, start, end

    def clamp(self, low: float | None = None, high: float | None = None) -> "Axis":
        """Keep the padded range inside bounds that the number cannot pass (a share, a loss)."""
        if low is not None:
            self.a = max(self.a, low)
        if high is not None:
            self.b = min(self.b, high)
        return self

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.a) / (self.b - self.a) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        if self.log:
            return _log_ticks(self.a, self.b, most)
        return _round_ticks(self.a, self.b, most)


def _round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten inside the range."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for f in factors]
        found = [t for t in found if low <= math.log10(t) <= high]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def curves(
    series: list[Series],
    *,
    title: str,
    format_y: Callable[[float], str],
    share: bool = False,
    log: bool = False,
) -> Markup:
    """Curves over training steps. Noisy ones are drawn pale, with their running mean on top."""
    height, left, right, top, bottom = 220, 52, 14, 14, 34
    points = [p for s in series for p in s.points]
    x = Axis([p[0] for p in points], left, WIDTH - right, pad=0.0)
    y = Axis([p[1] for p in points], height - bottom, top, log=log)
    y.clamp(0.0 if min(p[1] for p in points) >= 0 and not log else None, 1.0 if share else None)
    parts = [_grid_y(y, left, WIDTH - right, format_y), _grid_x(x, height - bottom, _whole)]
    parts.append(_text(WIDTH - right, height - 4, "step", "end"))
    for s in series:
        smooth = _running_mean(s.points)
        if smooth:
            parts.append(f'<path class="line {s.tone} raw" d="{_path(s.points, x, y)}"/>')
        parts.append(f'<path class="line {s.tone}" d="{_path(smooth or s.points, x, y)}"/>')
        parts.append(_end_dots(smooth or s.points, x, y, s.tone))
    hover = [
        {"name": s.name, "points": [[_r(x(a)), _r(y(b)), a, format_y(b)] for a, b in s.points]}
        for s in series
    ]
    return _svg(height, title, parts, hover)


def interval_track(
    rows: list[tuple[str, float, float | None, float | None, str]],
    *,
    title: str,
    share: bool,
    format_x: Callable[[float], str],
    width: int = WIDTH,
) -> Markup:
    """A dot and its interval per row, on one scale; each row is (label, value, low, high, tone)."""
    label = min(150, max(_LETTER * len(row[0]) for row in rows) + 14)
    step, top, bottom = 26, 6, 26
    height = top + step * len(rows) + bottom
    values = [v for row in rows for v in row[1:4] if isinstance(v, int | float)]
    x = Axis([0.0, 1.0] if share else values, label, width - 18, pad=0.0 if share else 0.08)
    if not share and min(values) >= 0:
        x.clamp(0.0)
    parts = [_grid_x(x, height - bottom, format_x, top, width)]
    for i, (name, value, low, high, tone) in enumerate(rows):
        at = top + step * (i + 0.5)
        parts.append(_text(label - 10, at + 4, _fit(name, label - 10), "end", "label"))
        if low is not None and high is not None:
            parts.append(f'<path class="whisker {tone}" d="M{_r(x(low))} {_r(at)}H{_r(x(high))}"/>')
        hint = f"{name}: {format_x(value)}"
        if low is not None and high is not None:
            hint += f" (95% interval {format_x(low)} to {format_x(high)})"
        parts.append(_dot(x(value), at, tone, hint))
    return _svg(height, title, parts, width=width)


def pareto(
    marks: list[Mark],
    *,
    title: str,
    x_title: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    lower_is_better: bool,
    share: bool,
) -> Markup:
    """Quality against cost; the staircase joins the rows that no other beats in both. Better is upwards."""
    height, left, right, top, bottom = 300, 52, 16, 16, 46
    xs = [m.x for m in marks]
    log = min(xs) > 0 and max(xs) / min(xs) > 12
    x = Axis(xs, left, WIDTH - right, log=log, pad=0.14)
    ys = [v for m in marks for v in (m.y, m.low, m.high) if v is not None]
    y = Axis(ys, height - bottom, top, pad=0.12)
    if not log:
        x.clamp(0.0)
    y.clamp(0.0 if min(m.y for m in marks) >= 0 else None, 1.0 if share else None)
    if lower_is_better:
        y.start, y.end = y.end, y.start
    parts = [_grid_y(y, left, WIDTH - right, format_y), _grid_x(x, height - bottom, format_x)]
    parts.append(_text((left + WIDTH - right) / 2, height - 8, x_title, "middle"))
    front = sorted((m for m in marks if m.front), key=lambda m: m.x)
    if front:
        d = f"M{_r(x(front[0].x))} {_r(y(front[0].y))}"
        d += "".join(f"H{_r(x(m.x))}V{_r(y(m.y))}" for m in front[1:])
        parts.append(f'<path class="front" d="{d}H{WIDTH - right}"/>')
    taken = _segments([(x(m.x), y(m.y)) for m in front], WIDTH - right)
    taken += [(x(m.x) - 6, y(m.y) - 6, x(m.x) + 6, y(m.y) + 6) for m in marks]
    for m in marks:
        tone = "main" if m.front else "second"
        if m.low is not None and m.high is not None:
            parts.append(
                f'<path class="whisker thin {tone}" d="M{_r(x(m.x))} {_r(y(m.low))}V{_r(y(m.high))}"/>'
            )
        parts.append(_dot(x(m.x), y(m.y), tone, m.hint or m.label))
    for m in sorted(marks, key=lambda m: not m.front):
        parts.append(_place_label(m, x(m.x), y(m.y), taken, (left, top, WIDTH - 2, height - bottom)))
    return _svg(height, title, parts)


def heat_map(
    cells: Mapping[tuple[str, int], float],
    *,
    title: str,
    write: Callable[[float], str],
    log: bool = False,
) -> Markup:
    """Values by kind (down) and number of block (across); stronger is more, framed in red is not finite.

    Values stand in their cells where all have room, and in each cell's own title.
    """
    rows = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(min(block for _, block in cells), max(block for _, block in cells) + 1)
    left, top, right, high = min(150.0, max(_LETTER * len(row) for row in rows) + 12), 4, 6, 19
    width = min(44.0, (WIDTH - left - right) / len(blocks))
    finite = [v for v in cells.values() if math.isfinite(v)]
    shade, longest = _shading(finite, log), max(len(write(v)) for v in cells.values())
    parts = []
    for i, row in enumerate(rows):
        at = top + high * i
        parts.append(_text(left - 8, at + high / 2 + 3.5, _fit(row, left - 8), "end", "label"))
        for k, block in enumerate(blocks):
            value = cells.get((row, block))
            hint = f"block {block}, {row}: {'left as it was' if value is None else write(value)}"
            parts.append(_cell(left + width * k, at, width, high, value, shade, hint))
            if value is not None and 0.92 * _LETTER * longest + 2 <= width:
                parts.append(
                    _text(left + width * (k + 0.5), at + high / 2 + 3.5, write(value), "middle", "value")
                )
    bottom = top + high * len(rows)
    parts.append(_block_numbers(blocks, left, width, bottom))
    parts.append(_shade_legend(finite, write, shade, left, bottom + 34))
    return _svg(bottom + 50, title, parts)


def _shading(values: Sequence[float], log: bool) -> Callable[[float], float]:
    """From a value to its share of the way from the least (0) to the most (1).

    Args:
        log: in ratios, where values lie far apart; 0 then is a step below the least of the others.
    """
    positive = [v for v in values if v > 0]
    log = log and max(positive, default=1.0) > 12 * min(positive, default=1.0)
    low, high = (
        (min(values, default=0.0), max(values, default=0.0)) if not log else (min(positive), max(positive))
    )
    start = 0.12 if log and min(values) <= 0 else 0.0

    def share(value: float) -> float:
        if high <= low:
            return 1.0
        if log:
            return start + (1 - start) * math.log(value / low) / math.log(high / low) if value > 0 else 0.0
        return (value - low) / (high - low)

    return share


def _cell(
    x: float,
    y: float,
    width: float,
    height: float,
    value: float | None,
    shade: Callable[[float], float],
    hint: str,
) -> str:
    gap = min(1.5, 0.15 * width)
    if value is None:
        look = 'class="cell empty"'
    elif not math.isfinite(value):
        look = 'class="cell bad"'
    else:
        look = f'class="cell" fill-opacity="{0.1 + 0.9 * shade(value):.2f}"'
    place = f'x="{_r(x)}" y="{_r(y)}" width="{width - gap:.2f}" height="{_r(height - 1.5)}"'
    return f"<rect {look} {place}><title>{escape(hint)}</title></rect>"


def _block_numbers(blocks: range, left: float, width: float, bottom: float) -> str:
    """Every number that has room, below its column."""
    room = _LETTER * len(str(blocks[-1])) + 8
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, len(blocks)) if s * width >= room or s == len(blocks))
    found = [
        _text(left + width * (k + 0.5), bottom + 13, str(block), "middle")
        for k, block in enumerate(blocks)
        if block % step == 0
    ]
    return _text(left - 8, bottom + 13, "block", "end") + "".join(found)


def _shade_legend(
    values: list[float], write: Callable[[float], str], shade: Callable[[float], float], left: float, y: float
) -> str:
    """What a shade stands for: each value where few have room, else the least to the most in steps."""
    known = {write(v): v for v in sorted(values)}
    parts, x = [], left
    rooms = [18 + _LETTER * len(text) + 12 for text in known]
    if len(known) <= 6 and left + sum(rooms) - 12 <= WIDTH:
        for (text, value), room in zip(known.items(), rooms, strict=True):
            parts += [_cell(x, y, 15, 12, value, shade, text), _text(x + 18, y + 9.5, text, "start")]
            x += room
        return "".join(parts)
    low, high = next(iter(known)), list(known)[-1]
    parts.append(_text(x, y + 9.5, low, "start"))
    x += _LETTER * len(low) + 6
    for i in range(7):
        parts.append(_cell(x + 15 * i, y, 16.5, 12, i / 6, lambda share: share, ""))
    return "".join([*parts, _text(x + 15 * 7 + 6, y + 9.5, high, "start")])


Box = tuple[float, float, float, float]


def _place_label(mark: Mark, x: float, y: float, taken: list[Box], bounds: Box) -> str:
    """The label where it meets no point and no other label; the least bad place where there is none."""
    text = _fit(mark.label, 150)
    width = _LETTER * len(text)
    places: list[tuple[float, float, str]] = [
        (x + 9, y + 4, "start"), (x - 9, y + 4, "end"), (x, y - 10, "middle"), (x, y + 18, "middle"),
        (x + 9, y - 8, "start"), (x - 9, y - 8, "end"), (x + 9, y + 16, "start"), (x - 9, y + 16, "end"),
        (x + 9, y - 20, "start"), (x - 9, y - 20, "end"), (x + 9, y + 28, "start"), (x - 9, y + 28, "end"),
    ]  # fmt: skip

    def box(place: tuple[float, float, str]) -> Box:
        start = place[0] - {"start": 0, "middle": width / 2, "end": width}[place[2]]
        return (start, place[1] - 10, start + width, place[1] + 3)

    def cost(place: tuple[float, float, str]) -> float:
        b = box(place)
        clash = sum(_overlap(b, other) for other in taken)
        outside = sum(
            max(0.0, d) for d in (bounds[0] - b[0], bounds[1] - b[1], b[2] - bounds[2], b[3] - bounds[3])
        )
        return clash + 100 * outside

    best = min(places, key=cost)
    taken.append(box(best))
    return _text(best[0], best[1], text, best[2], "label strong" if mark.front else "label")


def _segments(front: list[Point], right: float) -> list[Box]:
    """The thin boxes that the staircase fills."""
    found: list[Box] = []
    for (x0, y0), (x1, y1) in pairwise(front):
        found += [(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))]
    return found + [(x, y - 1, right, y + 1) for x, y in front[-1:]]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _running_mean(points: list[Point]) -> list[Point]:
    """A centred mean over about a twentieth of the curve; [] where there are too few points to smooth."""
    if len(points) < 40:
        return []
    half = max(2, len(points) // 40)
    found = []
    for i, (x, _) in enumerate(points):
        window = points[max(0, i - half) : i + half + 1]
        found.append((x, sum(p[1] for p in window) / len(window)))
    return found


def _svg(
    height: float, title: str, parts: list[str], hover: list[dict] | None = None, width: int = WIDTH
) -> Markup:
    data = f' data-hover="{escape(json.dumps(hover))}"' if hover else ""
    return Markup(
        f'<svg viewBox="0 0 {width} {_r(height)}" role="img" aria-label="{escape(title)}"{data}>'
        f"{''.join(parts)}</svg>"
    )


def _grid_y(axis: Axis, left: float, right: float, write: Callable[[float], str]) -> str:
    return "".join(
        f'<path class="grid" d="M{_r(left)} {_r(axis(t))}H{_r(right)}"/>'
        + _text(left - 7, axis(t) + 4, _bare(write(t)), "end")
        for t in axis.ticks()
    )


def _grid_x(
    axis: Axis, bottom: float, write: Callable[[float], str], top: float | None = None, width: int = WIDTH
) -> str:
    """Tick labels along the bottom, those left out that would touch; grid lines too where `top` is given."""
    parts, free = [], -math.inf
    for t in axis.ticks(6 if width >= WIDTH else 4):
        at, text = axis(t), _bare(write(t))
        half = _LETTER * len(text) / 2
        if top is not None:
            parts.append(f'<path class="grid" d="M{_r(at)} {_r(top)}V{_r(bottom)}"/>')
        if at - half < free or at + half > width:
            continue
        free = at + half + 10
        parts.append(_text(at, bottom + 16, text, "middle"))
    line = f'<path class="axis" d="M{_r(axis.start)} {_r(bottom)}H{_r(axis.end)}"/>'
    return "".join(parts) + line


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text x="{_r(x)}" y="{_r(y)}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'


def _dot(x: float, y: float, tone: str, hint: str) -> str:
    return (
        f'<circle class="dot {tone}" cx="{_r(x)}" cy="{_r(y)}" r="4.5"><title>{escape(hint)}</title></circle>'
    )


def _end_dots(points: list[Point], x: Axis, y: Axis, tone: str) -> str:
    """A curve of few points shows each of them; a lone point would otherwise be invisible."""
    if len(points) > 30:
        return ""
    return "".join(f'<circle class="dot {tone}" cx="{_r(x(a))}" cy="{_r(y(b))}" r="2.4"/>' for a, b in points)


def _path(points: list[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_r(x(a))} {_r(y(b))}" for a, b in points)


def _fit(text: str, width: float) -> str:
    most = max(4, int(width / _LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def _bare(text: str) -> str:
    """A tick without the zeros that end its fraction: '2.00 GB' is '2 GB'."""
    return re.sub(r"(\.\d*?)0+(?!\d)", lambda m: m[1].rstrip("."), text)


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


def _r(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
