"""Charts of many runs: parallel coordinates, shares, and a factorial comparison; colours as of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _TOP, _BOTTOM = 1040, 46, 34
_COLOURS = 6  # classes s0 .. s5 of the page's style


@dataclass(frozen=True)
class Axis:
    """One vertical axis: `labels` for values that have no order of size, else a scale of numbers."""

    title: str
    labels: Sequence[str] = ()
    log: bool = False
    absent: bool = False
    """Whether a run without a value here passes below the scale; else its line ends before."""


def parallel(
    title: str, axes: Sequence[Axis], rows: Sequence[Sequence[float | None]], shade: Sequence[float | None]
) -> str:
    """One line per run across the axes, from value to value. `axes[i].labels` are addressed by their index.

    shade: 0 to 1 per run, 1 drawn strongest and last; None: a thin quiet line.
    """
    height = 330
    xs = [70 + (_WIDTH - 170) * i / max(1, len(axes) - 1) for i in range(len(axes))]
    scales = [_scale(axis, [r[i] for r in rows], height) for i, axis in enumerate(axes)]
    body = []
    for index in sorted(range(len(rows)), key=lambda i: -1.0 if shade[i] is None else float(shade[i] or 0.0)):
        strength = shade[index]
        style = (
            'class="thin"'
            if strength is None
            else f'class="line {"s1" if strength == 1 else "s0"}" '
            f'style="opacity:{0.25 + 0.75 * strength**3:.2f};stroke-width:{3 if strength == 1 else 1.4}"'
        )
        places = [
            height - _BOTTOM if v is None and axis.absent else scale.at(v)
            for axis, scale, v in zip(axes, scales, rows[index], strict=True)
        ]
        for part in _unbroken(list(zip(xs, places, strict=True))):
            body.append(f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in part)}"/>')
    for i, (x, axis, scale) in enumerate(zip(xs, axes, scales, strict=True)):
        body.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        body.append(_text("axis", x, _TOP - 10 if i % 2 == 0 else height - 10, axis.title))
        body += [_text("tick over", x + 6, y + 4, label, "start") for y, label in scale.ticks]
        if axis.absent:
            body.append(_text("tick over", x + 6, height - _BOTTOM + 4, "none", "start"))
    return _frame(title, "".join(body), height)


def shares(title: str, values: Mapping[str, float]) -> str:
    """Horizontal bars of shares that add up to 1."""
    height = _TOP + 16 + 26 * len(values)
    left, right = 260, _WIDTH - 80
    most = max(values.values(), default=1.0) or 1.0
    body = []
    for i, (name, value) in enumerate(values.items()):
        y, end = _TOP + 26 * i + 6, left + (right - left) * value / most
        body.append(_text("tick", left - 10, y + 4, name, "end"))
        body.append(f'<line class="bar s0" style="stroke-width:14" x1="{left}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        body.append(_text("tick", end + 8, y + 4, f"{value:.0%}", "start"))
    return _frame(title, "".join(body), height)


Bar = tuple[float, float | None, float | None]
"""Mean, and the interval's ends when there is one."""


def factorial(
    title: str,
    groups: Sequence[str],
    colours: Sequence[str],
    cells: Mapping[tuple[str, str], Bar],
    line: tuple[str, float] | None = None,
) -> str:
    """Means with intervals: a group of dots for each of `groups`, one dot per colour; cells by (group, colour).

    line: a level to compare with, and its name.
    """
    height, left, right, bottom = 280, 64, _WIDTH - 20, 40
    ends = [v for bar in cells.values() for v in bar if v is not None] + ([line[1]] if line else [])
    scale = _numbers(ends, False, height - bottom, _TOP)
    body = [
        f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text("tick", left - 6, y + 4, label, "end")
        for y, label in scale.ticks
    ]
    if line is not None:
        y = scale.at(line[1]) or 0.0
        body.append(f'<line class="zero" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(_text("tick", right, y - 4, line[0], "end"))
    wide = (right - left) / max(1, len(groups))
    for g, group in enumerate(groups):
        middle = left + wide * (g + 0.5)
        body.append(_text("axis", middle, height - bottom + 20, group))
        for c, colour in enumerate(colours):
            if (bar := cells.get((group, colour))) is None:
                continue
            x = middle + min(34.0, 0.8 * wide / len(colours)) * (c - (len(colours) - 1) / 2)
            mean, low, high = (scale.at(v) for v in bar)
            kind = f"s{c % _COLOURS}"
            if low is not None and high is not None:
                body.append(f'<line class="bar {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
            body.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{mean:.1f}" r="5"/>')
    items = "".join(
        f'<span><i class="key k{i % _COLOURS}"></i>{escape(name)}</span>' for i, name in enumerate(colours) if name
    )
    return _frame(title, "".join(body), height) + f'<div class="legend">{items}</div>'


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    bottom: float
    top: float
    log: bool
    ticks: list[tuple[float, str]]

    def at(self, value: float | None) -> float | None:
        """Pixels from above; None stays None."""
        if value is None or (self.log and value <= 0) or not math.isfinite(value):
            return None
        place = math.log10(value) if self.log else value
        span = self.high - self.low
        return self.bottom + ((place - self.low) / span if span else 0.5) * (self.top - self.bottom)


def _scale(axis: Axis, values: Sequence[float | None], height: int) -> _Scale:
    bottom, top = height - _BOTTOM - (24 if axis.absent else 12), _TOP + 12
    if axis.labels:
        scale = _Scale(0, len(axis.labels) - 1, bottom, top, False, [])
        return _Scale(
            0, len(axis.labels) - 1, bottom, top, False, [(scale.at(i) or 0.0, n) for i, n in enumerate(axis.labels)]
        )
    return _numbers([v for v in values if v is not None], axis.log, bottom, top)


def _numbers(values: Sequence[float], log: bool, bottom: float, top: float) -> _Scale:
    """A scale over all values with round ticks; its ends are round, too, or, of a logarithm, the extreme values."""
    used = [math.log10(v) if log else v for v in values if math.isfinite(v) and (v > 0 or not log)] or [0.0]
    low, high = min(used), max(used)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05
    if log:
        marks = _log_marks(10**low, 10**high)
    else:
        rough = (high - low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        marks = [k * step for k in range(first, last + 1)]
        low, high = marks[0], marks[-1]
    bare = _Scale(low, high, bottom, top, log, [])
    return _Scale(low, high, bottom, top, log, [(bare.at(v) or 0.0, f"{v:.3g}") for v in marks])


def _log_marks(low: float, high: float) -> list[float]:
    """At most seven round values between two, as many as can be; the two themselves where fewer than two are round."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        marks = [m * 10.0**k for k in decades for m in digits if low * (1 - 1e-9) <= m * 10.0**k <= high * (1 + 1e-9)]
        if len(marks) <= 7:
            return marks if len(marks) > 1 else [low, high]
    return marks[:: -(-len(marks) // 7)]


def _unbroken(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches of a line between missing values."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            parts.append([])
        else:
            parts[-1].append((x, y))
    return [p for p in parts if len(p) > 1]


def _frame(title: str, body: str, height: int) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"{_text('title', 10, 16, title, 'start')}{body}</svg>"
    )


def _text(kind: str, x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
