"""Small vector charts (SVG) that follow the page's light or dark colors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 250
"""[pixel] Size of a line chart; charts of rows have the same width."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 22, 30, 40
"""[pixel] Margins around the data."""
_COLORS = 6
"""Number of line colors: the classes s0 to s5 of the page's style."""
_ROW_HEIGHT = 26
"""[pixel] Height of a named row."""
_LETTER_WIDTH = 6.2
"""[pixel] Mean width of a letter of a row's name."""
_MAX_LETTERS = 34
"""Longer names are cut in the middle."""
_MAX_POINTS = 400
"""Points per line; of more, the median of each stretch is drawn."""
_MAX_DOTS = 40
"""Lines with fewer points show each as a dot."""


@dataclass(frozen=True)
class Series:
    """One line or one group of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def draw_lines(title: str, series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False) -> str:
    """A line chart; points that are not finite (or zero on a log axis) are left out.

    Where a value is negative the axis is linear: a logarithm would hide the values that matter most.
    """
    # One chart has one axis, so one negative value decides for all its lines.
    log_y = log_y and not any(-math.inf < y < 0 for s in series for y in s.y)
    usable = [s for s in (_select_points(s, log_y) for s in series) if len(s.x)]
    if not usable:
        return _frame(title, "", "", "", "nothing was recorded")

    x_axis = _Axis.from_values([v for s in usable for v in s.x], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.from_values([v for s in usable for v in s.y], _HEIGHT - _BOTTOM, _TOP, log_y)

    # The grid is drawn first, so that it lies behind the lines.
    body = [_draw_grid(x_axis, y_axis)]
    for i, s in enumerate(usable):
        points = [(x_axis.to_pixel(x), y_axis.to_pixel(y)) for x, y in zip(s.x, s.y, strict=True)]
        color = f"s{i % _COLORS}"

        # Dots show how few points a short line has; on a long one they would merge.
        if len(points) < _MAX_DOTS:
            body += [f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline class="line {color}" points="{path}"/>')

    # A line that the axis names already needs no legend.
    names = [s.name for s in usable]
    legend = "" if names == [y_label] else _draw_legend(names)
    return _frame(title, "".join(body), x_label, y_label, "") + legend


def draw_differences(title: str, rows: Sequence[tuple[str, float, float | None, float | None]], x_label: str) -> str:
    """Means with intervals about zero, one row each: (name, mean, low, high); without an interval, the mean alone."""
    names = [r[0] for r in rows]
    ends = [v for _, mean, low, high in rows for v in (mean, low, high) if v is not None]

    # Zero is always in view: it is what the differences are read against.
    axis = _Axis.from_values([*ends, 0.0], _place_axis(names), _WIDTH - _RIGHT)
    height, body = _draw_rows(names, axis)

    zero = axis.to_pixel(0.0)
    body.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')

    # The bar is the interval, the dot the mean.
    for i, (_, mean, low, high) in enumerate(rows):
        y = _row_center(i)
        if low is not None and high is not None:
            x1, x2 = axis.to_pixel(low), axis.to_pixel(high)
            body.append(f'<line class="bar s0" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot s0" cx="{axis.to_pixel(mean):.1f}" cy="{y}" r="4"/>')

    return _frame(title, "".join(body), x_label, "", "", height)


def draw_pairs(title: str, names: Sequence[str], values: Sequence[Sequence[float]], x_label: str) -> str:
    """One row per method, one thin line per neuron from row to row; a bar across each row is its mean.

    `values[n][m]` is neuron n under the method `names[m]`.
    """
    axis = _Axis.from_values([v for neuron in values for v in neuron], _place_axis(names), _WIDTH - _RIGHT)
    height, body = _draw_rows(names, axis)

    # Thin lines join the same neuron under all methods, behind the dots.
    for neuron in values:
        path = " ".join(f"{axis.to_pixel(v):.1f},{_row_center(i)}" for i, v in enumerate(neuron))
        body.append(f'<polyline class="thin" points="{path}"/>')

    for i in range(len(names)):
        column = [neuron[i] for neuron in values]
        color, y = f"s{i % _COLORS}", _row_center(i)
        body += [f'<circle class="dot {color}" cx="{axis.to_pixel(v):.1f}" cy="{y}" r="3"/>' for v in column]
        mean = axis.to_pixel(sum(column) / len(column))
        body.append(f'<line class="bar {color}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 9}" y2="{y + 9}"/>')

    return _frame(title, "".join(body), x_label, "", "", height)


@dataclass(frozen=True)
class _Axis:
    """From data to pixels, with ticks at round numbers."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool
    ticks: list[float]

    @classmethod
    def from_values(cls, values: Sequence[float], start: float, stop: float, log: bool = False) -> _Axis:
        """An axis from pixel `start` to `stop` that begins and ends at round numbers around the values."""
        low, high = min(values), max(values)

        # Whole decades; the margin keeps an exact power of ten from adding one more.
        if log:
            first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            last = max(last, first + 1)
            every = max(1, math.ceil((last - first) / 5))
            return cls(first, last, start, stop, True, [10.0**k for k in range(first, last + 1, every)])

        # A single value gets a tenth of itself on either side.
        if low == high:
            low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1

        # About five steps of 1, 2, 2.5 or 5 times a power of ten.
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)

        return cls(first * step, last * step, start, stop, False, [k * step for k in range(first, last + 1)])

    def to_pixel(self, value: float) -> float:
        position = math.log10(value) if self.is_log else value
        return self.start + (position - self.low) / (self.high - self.low) * (self.stop - self.start)


def _select_points(series: Series, log: bool) -> Series:
    """The points that can be drawn, thinned to `_MAX_POINTS` by the median of each stretch."""
    # What has no place on the axis would break the line.
    points = [
        (float(x), float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]

    # The median of a stretch ignores single outliers and is a value that occurred.
    every = max(1, math.ceil(len(points) / _MAX_POINTS))
    stretches = [sorted(points[i : i + every], key=lambda p: p[1]) for i in range(0, len(points), every)]
    medians = [stretch[len(stretch) // 2] for stretch in stretches]

    return Series(series.name, [x for x, _ in medians], [y for _, y in medians])


def _draw_rows(names: Sequence[str], axis: _Axis) -> tuple[int, list[str]]:
    """The height of a chart of named rows; its grid and its names."""
    height = _TOP + _BOTTOM + _ROW_HEIGHT * len(names)
    # Vertical grid lines, since the values run along x.
    body = []
    for tick in axis.ticks:
        x = axis.to_pixel(tick)
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        body.append(_text("tick", x, height - _BOTTOM + 16, _format_tick(tick)))

    for i, name in enumerate(names):
        body.append(_text("tick", axis.start - 10, _row_center(i) + 4, _shorten(name), "end"))

    return height, body


def _row_center(i: int) -> int:
    """Vertical center of row `i`."""
    return _TOP + _ROW_HEIGHT * i + 15


def _place_axis(names: Sequence[str]) -> int:
    """Where the axis begins, so that the names fit beside it."""
    return max(_LEFT, 18 + round(_LETTER_WIDTH * min(_MAX_LETTERS, max(map(len, names)))))


def _shorten(name: str) -> str:
    """A name without its middle where it is too long for its row."""
    if len(name) <= _MAX_LETTERS:
        return name
    return f"{name[: _MAX_LETTERS // 2]}…{name[-_MAX_LETTERS // 2 + 1 :]}"


def _draw_grid(x_axis: _Axis, y_axis: _Axis) -> str:
    # Only horizontal lines: values are read from the y axis.
    parts = []
    for tick in y_axis.ticks:
        y = y_axis.to_pixel(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text("tick", _LEFT - 6, y + 4, _format_tick(tick), "end"))

    for tick in x_axis.ticks:
        parts.append(_text("tick", x_axis.to_pixel(tick), _HEIGHT - _BOTTOM + 16, _format_tick(tick)))

    return "".join(parts)


def _frame(title: str, body: str, x_label: str, y_label: str, note: str, height: int = _HEIGHT) -> str:
    """The chart around `body`: title and axis labels; `note` stands in the middle."""
    # The y label is rotated about its own center.
    middle = (_TOP + height - _BOTTOM) / 2
    rotated = f'<g transform="translate(12 {middle}) rotate(-90)">{_text("axis", 0, 0, y_label)}</g>'

    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{_text('title', 8, 16, title, 'start')}{body}{rotated}"
        f"{_text('axis', (_LEFT + _WIDTH - _RIGHT) / 2, height - 4, x_label)}"
        f"{_text('axis', _WIDTH / 2, middle, note)}</svg>"
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _draw_legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="key k{i % _COLORS}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return f'<div class="legend">{items}</div>'


def _format_tick(value: float) -> str:
    if value == 0:
        return "0"

    # Long numbers would run into the axis label.
    if abs(value) >= 1e5 or abs(value) < 1e-4:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"

    return f"{value:.6g}"
