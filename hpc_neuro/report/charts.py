"""Small vector charts that follow the page's light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 22, 30, 40
_COLOURS = 6  # classes s0 .. s5 of the page's style
_ROW, _LETTER, _LONGEST = 26, 6.2, 34  # height of a row; width of a letter; letters of a name that are shown
_MOST_POINTS = 400  # per line; more are thinned, by the middle of each stretch


@dataclass(frozen=True)
class Series:
    """One line or one group of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def draw_lines(title: str, series: Sequence[Series], x_label: str, y_label: str, log_y: bool = False) -> str:
    """A line chart as SVG text; points that are not finite (or not positive on a log axis) are left out."""
    kept = [Series(s.name, *_usable(s, log_y)) for s in series]
    kept = [s for s in kept if len(s.x)]
    if not kept:
        return _frame(title, "", "", "", "nothing was recorded")
    x_axis = _Axis.over([v for s in kept for v in s.x], _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.over([v for s in kept for v in s.y], _HEIGHT - _BOTTOM, _TOP, log_y)
    body = [_grid(x_axis, y_axis)]
    for i, s in enumerate(kept):
        points = [(x_axis.at(x), y_axis.at(y)) for x, y in zip(s.x, s.y, strict=True)]
        kind = f"s{i % _COLOURS}"
        if len(points) < 40:
            body += [f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline class="line {kind}" points="{path}"/>')
    return _frame(title, "".join(body), x_label, y_label, "") + _legend([s.name for s in kept])


def draw_differences(title: str, rows: Sequence[tuple[str, float, float | None, float | None]], x_label: str) -> str:
    """Means with intervals about zero, one row each: (name, mean, low, high); without an interval, the mean alone."""
    names = [r[0] for r in rows]
    ends = [v for _, mean, low, high in rows for v in (mean, low, high) if v is not None]
    axis = _Axis.over([*ends, 0.0], _beside(names), _WIDTH - _RIGHT)
    height, body = _rows(names, axis)
    zero = axis.at(0.0)
    body.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
    for i, (_, mean, low, high) in enumerate(rows):
        y = _row(i)
        if low is not None and high is not None:
            body.append(f'<line class="bar s0" x1="{axis.at(low):.1f}" x2="{axis.at(high):.1f}" y1="{y}" y2="{y}"/>')
        body.append(f'<circle class="dot s0" cx="{axis.at(mean):.1f}" cy="{y}" r="4"/>')
    return _frame(title, "".join(body), x_label, "", "", height)


def draw_pairs(title: str, names: Sequence[str], values: Sequence[Sequence[float]], x_label: str) -> str:
    """One row per method, one thin line per neuron from row to row: `values[n][m]` is neuron n under `names[m]`; a bar
    across each row is its mean."""
    axis = _Axis.over([v for row in values for v in row], _beside(names), _WIDTH - _RIGHT)
    height, body = _rows(names, axis)
    for row in values:
        path = " ".join(f"{axis.at(v):.1f},{_row(i)}" for i, v in enumerate(row))
        body.append(f'<polyline class="thin" points="{path}"/>')
    for i in range(len(names)):
        column = [row[i] for row in values]
        kind, y = f"s{i % _COLOURS}", _row(i)
        body += [f'<circle class="dot {kind}" cx="{axis.at(v):.1f}" cy="{y}" r="3"/>' for v in column]
        mean = axis.at(sum(column) / len(column))
        body.append(f'<line class="bar {kind}" x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 9}" y2="{y + 9}"/>')
    return _frame(title, "".join(body), x_label, "", "", height)


def _rows(names: Sequence[str], axis: _Axis) -> tuple[int, list[str]]:
    """The height of a chart of named rows, its grid and its names."""
    height = _TOP + _BOTTOM + _ROW * len(names)
    body = [
        f'<line class="grid" x1="{axis.at(t):.1f}" x2="{axis.at(t):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        + _text("tick", axis.at(t), height - _BOTTOM + 16, _number(t))
        for t in axis.ticks
    ]
    for i, name in enumerate(names):
        shown = name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}…{name[-_LONGEST // 2 + 1 :]}"
        body.append(_text("tick", axis.start - 10, _row(i) + 4, shown, "end"))
    return height, body


def _row(i: int) -> int:
    """The middle of row `i`."""
    return _TOP + _ROW * i + 15


def _beside(names: Sequence[str]) -> int:
    """Where the axis begins, so that the names fit beside it."""
    return max(_LEFT, 18 + round(_LETTER * min(_LONGEST, max(map(len, names)))))


@dataclass(frozen=True)
class _Axis:
    """From data to pixels, with ticks at round numbers."""

    low: float
    high: float
    start: float
    stop: float
    log: bool
    ticks: list[float]

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, log: bool = False) -> _Axis:
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            last = max(last, first + 1)
            every = max(1, math.ceil((last - first) / 5))
            return cls(first, last, start, stop, True, [10.0**k for k in range(first, last + 1, every)])
        if low == high:
            low, high = low - (abs(low) or 1.0) * 0.1, high + (abs(high) or 1.0) * 0.1
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(first * step, last * step, start, stop, False, [k * step for k in range(first, last + 1)])

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.stop - self.start)


def _usable(series: Series, log: bool) -> tuple[list[float], list[float]]:
    pairs_ = [
        (float(x), float(y))
        for x, y in zip(series.x, series.y, strict=True)
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log)
    ]
    every = max(1, math.ceil(len(pairs_) / _MOST_POINTS))
    pairs_ = [sorted(part, key=lambda p: p[1])[len(part) // 2] for part in _parts(pairs_, every)]
    return [x for x, _ in pairs_], [y for _, y in pairs_]


def _parts(items: list[tuple[float, float]], size: int) -> list[list[tuple[float, float]]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _grid(x_axis: _Axis, y_axis: _Axis) -> str:
    rows = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y_axis.at(t):.1f}" y2="{y_axis.at(t):.1f}"/>'
        + _text("tick", _LEFT - 6, y_axis.at(t) + 4, _number(t), "end")
        for t in y_axis.ticks
    ]
    columns = [_text("tick", x_axis.at(t), _HEIGHT - _BOTTOM + 16, _number(t)) for t in x_axis.ticks]
    return "".join(rows + columns)


def _frame(title: str, body: str, x_label: str, y_label: str, note: str, height: int = _HEIGHT) -> str:
    middle = (_TOP + height - _BOTTOM) / 2
    turned = f'<g transform="translate(13 {middle}) rotate(-90)">{_text("axis", 0, 0, y_label)}</g>'
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{_text('title', 8, 16, title, 'start')}{body}{turned}"
        f"{_text('axis', (_LEFT + _WIDTH - _RIGHT) / 2, height - 4, x_label)}"
        f"{_text('axis', _WIDTH / 2, middle, note)}</svg>"
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>' if text else ""


def _legend(names: Sequence[str]) -> str:
    items = "".join(f'<span><i class="key k{i % _COLOURS}"></i>{escape(n)}</span>' for i, n in enumerate(names))
    return f'<div class="legend">{items}</div>'


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.6g}"
