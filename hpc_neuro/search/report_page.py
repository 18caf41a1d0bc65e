"""The report of a study: trials, what mattered, the best, and the comparison of settings."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from hpc_neuro.metrics.bootstrap import Interval
from hpc_neuro.report import charts, html, sweep_charts
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.sweep_charts import Axis
from hpc_neuro.search.comparison import Comparison, Setting
from hpc_neuro.search.config import SearchConfig, TableMetric
from hpc_neuro.search.space import Integer, Log, Range, options, text
from hpc_neuro.search.trial import Trial


def build(
    cfg: SearchConfig,
    trials: Sequence[Trial],
    winner: Trial | None,
    weights: Mapping[str, float],
    found: Comparison | None,
    code: str,
) -> str:
    """The page as text; self-contained."""
    sections = [("Result", _result(cfg, trials, winner))]
    if found is not None:
        sections.append(("Comparison", _comparison(cfg, found)))
        if len(found.scores) > 1:
            sections.append(("Differences", _differences(cfg, found)))
        sections.append(("Held-out neurons", _neurons(cfg, found)))
    sections.append(("Values", _parallel(cfg, trials, winner)))
    if weights:
        note = (
            "Share of the difference between good and other finished trials that each value explains by itself "
            "(PED-ANOVA, Watanabe et al. 2023). Stopped trials do not count."
        )
        sections.append(
            ("Importance", html.paragraph(note, "small") + sweep_charts.shares("Importance for the objective", weights))
        )
    sections.append(("Trials", _table(cfg, trials, winner)))
    return html.render_page(f"Search {cfg.out.resolve().name}", f"{len(trials)} trials · hpc_neuro {code}", sections)


def as_csv(cfg: SearchConfig, trials: Sequence[Trial]) -> str:
    """One line per trial."""
    names = list(cfg.space)
    with io.StringIO(newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["trial", "state", cfg.objective.key, *names, "step", "attempts", "seconds", "jobs", "note"])
        for t in trials:
            values = [text(t.values[n]) if n in t.values else "" for n in names]
            jobs = " ".join(a.job or "" for a in t.attempts)
            value = "" if t.value is None else repr(t.value)
            writer.writerow(
                [t.number, t.state, value, *values, t.step, len(t.attempts), round(t.seconds, 1), jobs, t.note]
            )
        return out.getvalue()


def _result(cfg: SearchConfig, trials: Sequence[Trial], winner: Trial | None) -> str:
    counts = {s: sum(t.state == s for t in trials) for s in ("done", "pruned", "failed")}
    open_ = len(trials) - sum(counts.values())
    words = [f"{n} {s}" for s, n in counts.items() if n] + ([f"{open_} not ended yet"] if open_ else [])
    again = sum(max(0, len(t.attempts) - 1) for t in trials)
    lines = [f"{len(trials)} trials: {', '.join(words)}; {again} restarts."]
    if winner is None:
        return html.paragraph(lines[0]) + html.paragraph("No trial has finished.", "notice")
    values = ", ".join(f"{k} = {_short(v)}" for k, v in winner.values.items())
    lines.append(f"Best: trial {winner.number}, {cfg.objective.key} {winner.value:.4g}, with {values}.")
    lines.append("best.yaml, beside this page, trains it again: hpc-neuro train best.yaml")
    best = _best_so_far(cfg, trials)
    curve = charts.draw_lines("Best value after each finished trial", [best], "finished trials", cfg.objective.key)
    return "".join(html.paragraph(line) for line in lines) + html.row([curve, ""])


def _short(value: object) -> str:
    """A value for people; best.yaml and trials.csv have all digits."""
    return f"{value:.4g}" if isinstance(value, float) else text(value)


def _best_so_far(cfg: SearchConfig, trials: Sequence[Trial]) -> charts.Series:
    better = max if cfg.objective.goal == "maximize" else min
    ended = sorted((t for t in trials if t.value is not None), key=lambda t: t.attempts[-1].ended or 0.0)
    values: list[float] = []
    for t in ended:
        values.append(better([*values[-1:], float(t.value or 0.0)]))
    return charts.Series(cfg.objective.key, [float(i + 1) for i in range(len(values))], values)


def _parallel(cfg: SearchConfig, trials: Sequence[Trial], winner: Trial | None) -> str:
    axes, columns = [], []
    for name, dimension in cfg.space.items():
        if isinstance(dimension, (Range, Log, Integer)):
            axes.append(Axis(name, log=isinstance(dimension, Log), absent=bool(dimension.when)))
            columns.append([None if name not in t.values else float(t.values[name]) for t in trials])
        else:
            labels = [text(v) for v in options(dimension) or []]
            axes.append(Axis(name, labels=labels, absent=bool(dimension.when)))
            columns.append([None if name not in t.values else labels.index(text(t.values[name])) for t in trials])
    axes.append(Axis(cfg.objective.key))
    columns.append([t.value for t in trials])
    done = sorted((float(t.value) for t in trials if t.value is not None), reverse=cfg.objective.goal == "minimize")
    shade: list[float | None] = []
    for t in trials:
        rank = None if t.value is None else done.index(t.value) / max(1, len(done) - 1)
        shade.append(1.0 if t is winner else None if rank is None else min(rank, 0.98))
    note = (
        "One line per trial, the better the stronger and the best in bold; stopped and failed ones are thin, end early."
    )
    rows = [list(row) for row in zip(*columns, strict=True)]
    return html.paragraph(note, "small") + sweep_charts.parallel("Values and what they led to", axes, rows, shade)


def _table(cfg: SearchConfig, trials: Sequence[Trial], winner: Trial | None) -> str:
    columns = [Column("Trial"), Column("State", numeric=False), Column(cfg.objective.key)]
    columns += [Column(n, numeric=isinstance(d, (Range, Log, Integer))) for n, d in cfg.space.items()]
    columns += [Column("Steps"), Column("Attempts"), Column("Time [s]", "all attempts, the wait in the queue included")]
    columns.append(Column("Note", numeric=False))
    rows = []
    for t in trials:
        value = "" if t.value is None else f"{t.value:.4g}"
        cells = [Cell(str(t.number), t.number), Cell(t.state), Cell(value, t.value, best=t is winner)]
        for name in cfg.space:
            held = t.values.get(name)
            number = float(held) if isinstance(held, (int, float)) and not isinstance(held, bool) else None
            shown = "" if name not in t.values else _short(held)
            cells.append(Cell(shown, number))
        seconds = round(t.seconds)
        cells += [Cell(str(t.step), t.step), Cell(str(len(t.attempts)), len(t.attempts)), Cell(str(seconds), seconds)]
        rows.append([*cells, Cell(t.note)])
    return html.table(columns, rows)


def _comparison(cfg: SearchConfig, found: Comparison) -> str:
    seeds = sorted({len(s) for s in found.scores.values()})
    repeats = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    n = len(found.neurons)
    note = f"Means over {n} held-out neuron{'s' if n > 1 else ''} and {repeats} seed{'s' if seeds != [1] else ''}; "
    if n > 1:
        note += f"in small type the 95 % bootstrap interval over both ({cfg.draws:,} draws). "
    else:
        note += "of one neuron no interval can be given. "
    note += "The best mean of a column is bold."
    columns = [*_heads(found), *(Column(_titled(m)) for m in cfg.table), Column("Seeds")]
    means = {m.key: {s: found.interval(s, m.key, cfg.draws) for s in found.scores} for m in cfg.table}
    rows = []
    for setting, per_seed in found.scores.items():
        cells = _parts(found, setting)
        for m in cfg.table:
            at = means[m.key][setting]
            every = {i.mean for i in means[m.key].values()}
            best = None if len(every) < 2 else (max if m.goal == "maximize" else min)(every)
            small = (
                ""
                if at.low is None
                else f"{html.format_number(at.low, m.digits)} … {html.format_number(at.high, m.digits)}"
            )
            cells.append(Cell(html.format_number(at.mean, m.digits), at.mean, at.mean == best, small))
        rows.append([*cells, Cell(str(len(per_seed)), len(per_seed))])
    if found.baseline:
        rows.append(
            [
                Cell("Otsu"),
                *(Cell("") for _ in _heads(found)[1:]),
                *(Cell(html.format_number(_baseline(found, m), m.digits), _baseline(found, m)) for m in cfg.table),
                Cell(""),
            ]
        )
    figures = "".join(_figure(found, m, {s: means[m.key][s] for s in found.scores}) for m in cfg.table)
    return html.paragraph(note, "small") + html.table(columns, rows) + figures


def _differences(cfg: SearchConfig, found: Comparison) -> str:
    """Every setting against the first one, paired by neuron and seed."""
    base, *others = found.scores
    name = ", ".join(part for part in base if part)
    note = (
        f"What a setting scores above {name} on the same neuron with the same seed, and in small type the 95 % "
        f"bootstrap interval over both ({cfg.draws:,} draws). An interval that holds 0 shows no difference (others are "
        f"bold); of {len(others)} settings about one in twenty leaves it out by chance."
    )
    columns = [*_heads(found), *(Column(_titled(m)) for m in cfg.table)]
    rows = []
    for setting in others:
        cells = _parts(found, setting)
        for m in cfg.table:
            at = found.difference(setting, base, m.key, cfg.draws)
            if at is None:
                cells.append(Cell(""))
                continue
            small = "" if at.low is None else f"{at.low:+.{m.digits}f} … {at.high:+.{m.digits}f}"
            clear = at.low is not None and at.high is not None and at.low * at.high > 0
            cells.append(Cell(f"{at.mean:+.{m.digits}f}", at.mean, clear, small))
        rows.append(cells)
    return html.paragraph(note, "small") + html.table(columns, rows)


def _heads(found: Comparison) -> list[Column]:
    """Columns of what a setting is."""
    return [Column(name, numeric=False) for name in found.dimensions if name]


def _parts(found: Comparison, setting: Setting) -> list[Cell]:
    """The cells below them."""
    return [Cell(part) for part, name in zip(setting, found.dimensions, strict=True) if name]


def _figure(found: Comparison, metric: TableMetric, means: Mapping[Setting, Interval]) -> str:
    cells = {s: (i.mean, i.low, i.high) for s, i in means.items()}
    line = ("Otsu", _baseline(found, metric)) if found.baseline else None
    return sweep_charts.factorial(_titled(metric), found.part(0), found.part(1), cells, line)


def _neurons(cfg: SearchConfig, found: Comparison) -> str:
    columns = [Column("Neuron", numeric=False), *_heads(found)]
    columns += [Column(_titled(m), "mean over seeds; below it the lowest and highest seed") for m in cfg.table]
    rows = []
    for i, neuron in enumerate(found.neurons):
        for setting in found.scores:
            cells = [Cell(neuron), *_parts(found, setting)]
            for m in cfg.table:
                values = found.values(setting, m.key)[:, i]
                small = f"{html.format_number(values.min(), m.digits)} … {html.format_number(values.max(), m.digits)}"
                mean = float(values.mean())
                cells.append(Cell(html.format_number(mean, m.digits), mean, note=small if len(values) > 1 else ""))
            rows.append(cells)
    return html.table(columns, rows)


def _baseline(found: Comparison, metric: TableMetric) -> float:
    return sum(s[metric.key] for s in found.baseline.values()) / len(found.baseline)


def _titled(metric: TableMetric) -> str:
    return f"{metric.title} {'↑' if metric.goal == 'maximize' else '↓'}"
