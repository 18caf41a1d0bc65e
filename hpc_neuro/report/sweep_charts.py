"""Charts of many runs: parallel coordinates, shares, and a factorial comparison; colors as of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _TOP, _BOTTOM = 1040, 46, 34
"""[pixel] Width of a chart, and its margins above and below the data."""
_COLORS = 6
"""Number of colors: the classes s0 to s5 of the page's style."""
_MAX_LOG_TICKS = 7
"""Ticks of a logarithmic axis."""

_PARALLEL_HEIGHT = 330
_PARALLEL_LEFT, _PARALLEL_RIGHT = 70, 100
_FACTORIAL_HEIGHT = 280
_FACTORIAL_LEFT, _FACTORIAL_RIGHT, _FACTORIAL_BOTTOM = 64, 20, 40
_SHARES_LEFT, _SHARES_RIGHT = 260, 80
_SHARE_HEIGHT = 26
_DOT_SPACING = 34.0
_NARROW_GROUPS, _NARROW_DOTS = 3, 12
"""Most groups, and dots of all groups together, of a factorial chart of half the width."""

Point = tuple[float, float]
"""[pixel] (x, y) from the upper left corner."""


@dataclass(frozen=True)
class ParallelAxis:
    """One vertical axis: `labels` for values without an order of size, else a scale of numbers."""

    title: str
    labels: Sequence[str] = ()
    log: bool = False
    absent: bool = False
    """Whether a run without a value here passes below the scale; else its line is interrupted."""


def draw_parallel_coordinates(
    title: str, axes: Sequence[ParallelAxis], rows: Sequence[Sequence[float | None]], shades: Sequence[float | None]
) -> str:
    """One line per run across the axes, from value to value. Labels of an axis are addressed by their index.

    shades: 0 to 1 per run, 1 drawn strongest and last; None: a thin line.
    """
    # Axes at equal distances.
    width = _WIDTH - _PARALLEL_LEFT - _PARALLEL_RIGHT
    xs = [_PARALLEL_LEFT + width * i / max(1, len(axes) - 1) for i in range(len(axes))]
    scales = [_make_scale(axis, [row[i] for row in rows]) for i, axis in enumerate(axes)]

    body = []

    # Strong lines lie over thin ones.
    for index in sorted(range(len(rows)), key=lambda i: _drawing_order(shades[i])):
        ys = [_place_value(*column) for column in zip(axes, scales, rows[index], strict=True)]
        style = _line_style(shades[index])
        for part in _split_at_gaps(list(zip(xs, ys, strict=True))):
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in part)
            body.append(f'<polyline {style} points="{points}"/>')

    for index, (x, axis, scale) in enumerate(zip(xs, axes, scales, strict=True)):
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_PARALLEL_HEIGHT - _BOTTOM}"/>')
        # Titles alternate between above and below, so that long ones do not overlap.
        body.append(_text("axis", x, _TOP - 10 if index % 2 == 0 else _PARALLEL_HEIGHT - 10, axis.title))
        body += [_text("tick over", x + 6, y + 4, label, "start") for y, label in scale.ticks]
        if axis.absent:
            body.append(_text("tick over", x + 6, _PARALLEL_HEIGHT - _BOTTOM + 4, "none", "start"))

    return _frame(title, "".join(body), _PARALLEL_HEIGHT)


def _drawing_order(shade: float | None) -> float:
    """Thin lines come first, the strongest last."""
    return -1.0 if shade is None else shade


def _line_style(shade: float | None) -> str:
    """Attributes of a run's line."""
    if shade is None:
        return 'class="thin"'
    is_best = shade == 1
    color, width = ("s1", 3) if is_best else ("s0", 1.4)
    return f'class="line {color}" style="opacity:{0.25 + 0.75 * shade**3:.2f};stroke-width:{width}"'


def _place_value(axis: ParallelAxis, scale: _Scale, value: float | None) -> float | None:
    """[pixel] Height of a value on an axis; None interrupts the line."""
    if value is None and axis.absent:
        return _PARALLEL_HEIGHT - _BOTTOM
    return scale.to_pixel(value)


def draw_shares(title: str, shares: Mapping[str, float]) -> str:
    """Horizontal bars of shares that add up to 1."""
    left, right = _SHARES_LEFT, _WIDTH - _SHARES_RIGHT
    # The longest bar fills the width.
    largest = max(shares.values(), default=1.0) or 1.0
    body = []

    for index, (name, share) in enumerate(shares.items()):
        y, end = _TOP + _SHARE_HEIGHT * index + 6, left + (right - left) * share / largest
        body.append(_text("tick", left - 10, y + 4, name, "end"))
        body.append(f'<line class="bar s0" style="stroke-width:14" x1="{left}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        body.append(_text("tick", end + 8, y + 4, f"{share:.0%}", "start"))

    return _frame(title, "".join(body), _TOP + 16 + _SHARE_HEIGHT * len(shares))


MeanBar = tuple[float, float | None, float | None]
"""Mean, and the ends of its interval where there is one."""


def draw_factorial(
    title: str,
    groups: Sequence[str],
    colors: Sequence[str],
    bars: Mapping[tuple[str, str], MeanBar],
    level: tuple[str, float] | None = None,
) -> str:
    """Means with intervals: a group of dots for each of `groups`, one dot per color; bars by (group, color).

    level: name and value of a line to compare with.
    """
    width = _WIDTH if is_wide_factorial(groups, colors) else _WIDTH // 2
    left, right = _FACTORIAL_LEFT, width - _FACTORIAL_RIGHT
    bottom = _FACTORIAL_HEIGHT - _FACTORIAL_BOTTOM
    values = [value for bar in bars.values() for value in bar if value is not None]
    scale = _make_number_scale([*values, level[1]] if level else values, False, bottom, _TOP)

    body = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text("tick", left - 6, y + 4, label, "end")
        for y, label in scale.ticks
    ]
    if level is not None:
        y = scale.to_pixel(level[1]) or 0.0
        body.append(f'<line class="zero" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text("tick", right, y - 4, level[0], "end"))

    # Dots of a group stand side by side around its middle.
    group_width = (right - left) / max(1, len(groups))
    spacing = min(_DOT_SPACING, 0.8 * group_width / len(colors))

    for group_index, group in enumerate(groups):
        middle = left + group_width * (group_index + 0.5)
        body.append(_text("axis", middle, bottom + 20, group))
        for index, color in enumerate(colors):
            bar = bars.get((group, color))
            if bar is not None:
                x = middle + spacing * (index - (len(colors) - 1) / 2)
                body.append(_draw_bar(x, bar, scale, f"s{index % _COLORS}"))

    items = "".join(
        f'<span><i class="key k{index % _COLORS}"></i>{escape(name)}</span>'
        for index, name in enumerate(colors)
        if name
    )
    legend = f'<div class="legend">{items}</div>' if items else ""
    return _frame(title, "".join(body), _FACTORIAL_HEIGHT, width) + legend


def is_wide_factorial(groups: Sequence[str], colors: Sequence[str]) -> bool:
    """Whether a factorial chart takes the whole width of the page; two narrow ones fit side by side."""
    return len(groups) > _NARROW_GROUPS or len(groups) * len(colors) > _NARROW_DOTS


def _draw_bar(x: float, bar: MeanBar, scale: _Scale, color: str) -> str:
    """The dot of a mean, over the line of its interval."""
    mean, low, high = (scale.to_pixel(value) for value in bar)
    dot = f'<circle class="dot {color}" cx="{x:.1f}" cy="{mean:.1f}" r="5"/>'
    if low is None or high is None:
        return dot
    return f'<line class="bar {color}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>{dot}'


# ---------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scale:
    """A vertical scale from `low` at `bottom` to `high` at `top`; of a logarithm, low and high are exponents of 10."""

    low: float
    high: float
    bottom: float
    top: float
    log: bool
    ticks: Sequence[tuple[float, str]] = ()
    """(pixel, label)."""

    def to_pixel(self, value: float | None) -> float | None:
        """[pixel] From above; None for what has no place on the scale."""
        if value is None or (self.log and value <= 0) or not math.isfinite(value):
            return None
        place = math.log10(value) if self.log else value
        span = self.high - self.low
        return self.bottom + ((place - self.low) / span if span else 0.5) * (self.top - self.bottom)

    def with_ticks(self, labels: Mapping[float, str]) -> _Scale:
        """This scale with ticks at values."""
        ticks = [(self.to_pixel(value) or 0.0, label) for value, label in labels.items()]
        return _Scale(self.low, self.high, self.bottom, self.top, self.log, ticks)


def _make_scale(axis: ParallelAxis, values: Sequence[float | None]) -> _Scale:
    """The scale of an axis of parallel coordinates."""
    bottom, top = _PARALLEL_HEIGHT - _BOTTOM - (24 if axis.absent else 12), _TOP + 12
    if axis.labels:
        return _Scale(0, len(axis.labels) - 1, bottom, top, False).with_ticks(dict(enumerate(axis.labels)))
    return _make_number_scale([value for value in values if value is not None], axis.log, bottom, top)


def _make_number_scale(values: Sequence[float], log: bool, bottom: float, top: float) -> _Scale:
    """A scale over all values with round ticks; its ends are round, too, or, of a logarithm, the extreme values."""
    # A logarithm has no place for zero and below.
    usable = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    places = [math.log10(value) if log else value for value in usable] or [0.0]
    low, high = min(places), max(places)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05

    # Round numbers rarely meet the ends of a logarithmic scale, so its ends stay.
    if log:
        ticks = _choose_log_ticks(10**low, 10**high)
    else:
        ticks = _choose_ticks(low, high)
        low, high = ticks[0], ticks[-1]

    return _Scale(low, high, bottom, top, log).with_ticks({tick: f"{tick:.3g}" for tick in ticks})


def _choose_ticks(low: float, high: float) -> list[float]:
    """About six round values, the first not above `low` and the last not below `high`."""
    # The least of the round steps that gives at most five intervals.
    rough_step = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough_step))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough_step * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def _choose_log_ticks(low: float, high: float) -> list[float]:
    """At most seven round values between two, as many as can be; the two themselves where fewer than two are round."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    # Ever coarser digits, until they are few enough.
    ticks: list[float] = []

    for digits in ((1, 2, 5), (1, 3), (1,)):
        candidates = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in candidates if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= _MAX_LOG_TICKS:
            return ticks if len(ticks) > 1 else [low, high]

    return ticks[:: -(-len(ticks) // _MAX_LOG_TICKS)]


# ------------------------------------------------------------------------------------------------------------- SVG


def _split_at_gaps(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """The stretches of a line between missing values, of two points at least."""
    parts: list[list[Point]] = [[]]

    for x, y in points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))

    return [part for part in parts if len(part) > 1]


def _frame(title: str, body: str, height: int, width: int = _WIDTH) -> str:
    svg = (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"{_text('title', 10, 16, title, 'start')}{body}</svg>"
    )
    # A chart of the whole width shrinks on a small screen, so the style enlarges its letters there.
    return f'<div class="wide">{svg}</div>' if width == _WIDTH else svg


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
