"""The report of a study: trials, which values mattered, the best, and the comparison of settings."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from hpc_neuro.core import files
from hpc_neuro.metrics.metric import Metric
from hpc_neuro.metrics.statistics import Interval, correct_for_many, count_neurons_needed, sign_flip_test
from hpc_neuro.report import charts, html, sweep_charts
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.sweep_charts import ParallelAxis
from hpc_neuro.search.comparison import Comparison, Setting
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import LogDimension, format_value, is_numeric, list_values
from hpc_neuro.search.trial import ENDED_STATES, Trial

_IMPORTANCE_NOTE = (
    "Share of the difference between good and other finished trials that each value explains by itself "
    "(PED-ANOVA, Watanabe et al. 2023). Stopped trials do not count."
)
_VALUES_NOTE = (
    "One line per trial: the better its result, the stronger the line. The best one is bold. Lines of stopped and "
    "failed trials are thin and end early."
)
_OTSU_WARNING = (
    "Otsu's threshold is better than every setting by {}. What to do next: train longer (`optim.steps`), or on more "
    "neurons; for results now, use `hpc-neuro trace`, which needs no model."
)
_EFFECT = 0.01
"""Difference whose power is stated."""
_MAX_SHADE = 0.98
"""Shade of the best lines but one; 1 is the best trial's alone."""


def build_page(
    cfg: SearchConfig,
    trials: Sequence[Trial],
    best: Trial | None,
    importances: Mapping[str, float],
    comparison: Comparison | None,
    code: str,
) -> str:
    """The page as text; self-contained. code: version of the package."""
    sections = [("Result", _render_result(cfg, trials, best))]

    # Only a recipe with evaluate has scored neurons.
    if comparison is not None:
        sections.append(("Comparison", _render_comparison(cfg, comparison)))
        if len(comparison.scores) > 1:
            sections.append(("Differences", _render_differences(cfg, comparison)))
        sections.append(("Held-out neurons", _render_neurons(cfg, comparison)))

    sections.append(("Values", _render_values(cfg, trials, best)))
    if importances:
        chart = sweep_charts.draw_shares("Importance for the objective", importances)
        sections.append(("Importance", html.paragraph(_IMPORTANCE_NOTE, "small") + chart))

    sections.append(("Trials", _render_trials(cfg, trials, best)))

    subtitle = f"{files.format_count(len(trials), 'trial')} · hpc_neuro {code}"
    return html.render_page(f"Search {cfg.out.resolve().name}", subtitle, sections)


def format_trials_csv(cfg: SearchConfig, trials: Sequence[Trial]) -> str:
    """One line per trial."""
    names = list(cfg.space)

    with io.StringIO(newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["trial", "state", cfg.objective.key, *names, "step", "attempts", "seconds", "jobs", "note"])

        for t in trials:
            values = [format_value(t.values[name]) if name in t.values else "" for name in names]
            jobs = " ".join(attempt.job or "" for attempt in t.attempts)
            objective = "" if t.value is None else repr(t.value)
            writer.writerow(
                [t.number, t.state, objective, *values, t.step, len(t.attempts), round(t.seconds, 1), jobs, t.note]
            )

        return out.getvalue()


# --------------------------------------------------------------------------------------------------------- trials


def _render_result(cfg: SearchConfig, trials: Sequence[Trial], best: Trial | None) -> str:
    # States without trials are left out.
    counts = {state: sum(t.state == state for t in trials) for state in ENDED_STATES}
    not_ended = len(trials) - sum(counts.values())
    parts = [f"{count} {state}" for state, count in counts.items() if count]
    parts += [f"{not_ended} not ended yet"] if not_ended else []
    restarts = sum(max(0, len(t.attempts) - 1) for t in trials)
    total = files.format_count(len(trials), "trial")
    summary = f"{total}: {', '.join(parts)}; {files.format_count(restarts, 'restart')}."
    if best is None:
        return html.paragraph(summary) + html.paragraph("No trial has finished.", "notice")

    values = ", ".join(f"{name} = {_format_short(value)}" for name, value in best.values.items())
    lines = [
        summary,
        f"Best: trial {best.number}, {cfg.objective.key} {best.value:.4g}, with {values}.",
        "To train it again, use best.yaml beside this page: `hpc-neuro train best.yaml`",
    ]
    curve = charts.draw_lines(
        "Best value after each finished trial", [_best_so_far(cfg, trials)], "finished trials", cfg.objective.key
    )
    return "".join(map(html.paragraph, lines)) + html.row([curve, ""])


def _format_short(value: object) -> str:
    """A value for people; best.yaml and trials.csv have all digits."""
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _best_so_far(cfg: SearchConfig, trials: Sequence[Trial]) -> charts.Series:
    better = max if cfg.objective.goal == "maximize" else min
    ended = sorted((t for t in trials if t.value is not None), key=lambda t: t.attempts[-1].ended or 0.0)
    # Each value is the better of the last one and the new one.
    values: list[float] = []
    for t in ended:
        values.append(better([*values[-1:], float(t.value or 0.0)]))
    return charts.Series(cfg.objective.key, [float(i + 1) for i in range(len(values))], values)


def _render_values(cfg: SearchConfig, trials: Sequence[Trial], best: Trial | None) -> str:
    """Parallel coordinates of the values of all trials."""
    axes: list[ParallelAxis] = []
    columns: list[list[float | None]] = []

    for name, dimension in cfg.space.items():
        # Where a dimension does not apply, the line passes below its axis.
        is_conditional = bool(dimension.when)
        if is_numeric(dimension):
            axes.append(ParallelAxis(name, log=isinstance(dimension, LogDimension), absent=is_conditional))
            columns.append([None if name not in t.values else float(t.values[name]) for t in trials])
        else:
            labels = [format_value(value) for value in list_values(dimension) or []]
            axes.append(ParallelAxis(name, labels=labels, absent=is_conditional))
            columns.append(
                [None if name not in t.values else labels.index(format_value(t.values[name])) for t in trials]
            )

    axes.append(ParallelAxis(cfg.objective.key))
    columns.append([t.value for t in trials])
    rows = [list(row) for row in zip(*columns, strict=True)]
    shades = _rank_shades(cfg, trials, best)
    chart = sweep_charts.draw_parallel_coordinates("Values and what they led to", axes, rows, shades)
    return html.paragraph(_VALUES_NOTE, "small") + chart


def _rank_shades(cfg: SearchConfig, trials: Sequence[Trial], best: Trial | None) -> list[float | None]:
    """Shade of each trial's line by its rank: 0 for the worst, 1 for the best, None without a value."""
    is_minimized = cfg.objective.goal == "minimize"
    # Ranks rather than values: one outlier would leave all others alike.
    values = sorted((float(t.value) for t in trials if t.value is not None), reverse=is_minimized)
    shades: list[float | None] = []

    for t in trials:
        if t is best:
            shades.append(1.0)
        elif t.value is None:
            shades.append(None)
        else:
            shades.append(min(values.index(t.value) / max(1, len(values) - 1), _MAX_SHADE))

    return shades


def _render_trials(cfg: SearchConfig, trials: Sequence[Trial], best: Trial | None) -> str:
    """A table with a row per trial."""
    columns = [
        Column("Trial"),
        Column("State", numeric=False),
        Column(cfg.objective.key),
        *(Column(name, numeric=is_numeric(dimension)) for name, dimension in cfg.space.items()),
        Column("Steps"),
        Column("Attempts"),
        Column("Time [s]", "all attempts, the wait in the queue included"),
        Column("Note", numeric=False),
    ]
    # Cells carry their numbers, by which a click on a heading sorts.
    rows = []

    for t in trials:
        objective = "" if t.value is None else f"{t.value:.4g}"
        rows.append(
            [
                Cell(str(t.number), t.number),
                Cell(t.state),
                Cell(objective, t.value, best=t is best),
                *(_value_cell(t, name) for name in cfg.space),
                *(Cell(str(count), count) for count in (t.step, len(t.attempts), round(t.seconds))),
                Cell(t.note),
            ]
        )

    return html.table(columns, rows)


def _value_cell(t: Trial, name: str) -> Cell:
    """The value of one dimension; empty where it does not apply."""
    if name not in t.values:
        return Cell("")
    value = t.values[name]
    # True is an int in Python, and here a word.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return Cell(_format_short(value), float(value) if is_number else None)


# ------------------------------------------------------------------------------------------ comparison of settings


def _render_comparison(cfg: SearchConfig, comparison: Comparison) -> str:
    """The mean scores of every setting with their intervals, as a table and as charts."""
    metrics = comparison.list_columns()
    columns = [*_setting_columns(comparison), *(Column(_metric_title(m)) for m in metrics), Column("Seeds")]
    means = {m.key: {s: comparison.compute_interval(s, m.key, cfg.draws) for s in comparison.scores} for m in metrics}
    otsu = {m.key: _baseline_mean(comparison, m) for m in metrics} if comparison.baseline else {}

    # Otsu's threshold competes: a study whose settings all lose to it must show that.
    settings = list(comparison.scores)
    best = {
        m.key: m.mark_best([*(means[m.key][setting].mean for setting in settings), *([otsu[m.key]] if otsu else [])])
        for m in metrics
    }

    rows = []
    for number, setting in enumerate(settings):
        cells = [_mean_cell(m, means[m.key][setting], best[m.key][number]) for m in metrics]
        seeds = len(comparison.scores[setting])
        rows.append([*_setting_cells(comparison, setting), *cells, Cell(str(seeds), seeds)])

    if otsu:
        blanks = [Cell("") for _ in _setting_columns(comparison)[1:]]
        cells = [_number_cell(otsu[m.key], m, best=best[m.key][-1]) for m in metrics]
        rows.append([Cell("Otsu"), *blanks, *cells, Cell("")])

    losses = [m.heading for m in metrics if otsu and best[m.key][-1] and not any(best[m.key][:-1])]
    warning = html.paragraph(_OTSU_WARNING.format(" and ".join(losses)), "notice") if losses else ""
    note = html.paragraph(_describe_means(cfg, comparison), "small")
    figures = [_draw_metric(comparison, m, means[m.key]) for m in metrics]
    is_wide = sweep_charts.is_wide_factorial(comparison.list_parts(0), comparison.list_parts(1))
    return warning + note + html.table(columns, rows) + ("".join(figures) if is_wide else html.row(figures))


def _describe_means(cfg: SearchConfig, comparison: Comparison) -> str:
    """What the table of means shows."""
    # Failed trials leave settings with fewer seeds.
    counts = sorted({len(seeds) for seeds in comparison.scores.values()})
    fewest = "" if len(counts) == 1 else f"{counts[0]} to "
    neurons = len(comparison.neurons)
    note = f"Means over {files.format_count(neurons, 'held-out neuron')} and "
    note += f"{fewest}{files.format_count(counts[-1], 'seed')}; "
    if neurons > 1:
        note += f"in small type the 95 % bootstrap interval over neurons and seeds ({cfg.draws:,} draws). "
    else:
        note += "one neuron gives no interval. "

    return note + "The best mean of a column is bold."


def _mean_cell(metric: Metric, interval: Interval, best: bool) -> Cell:
    """A mean, and below it its interval."""
    # Digits as the metric has them.
    note = "" if interval.low is None else _format_range(interval.low, interval.high, metric)
    return Cell(html.format_number(interval.mean, metric.digits), interval.mean, best, note)


def _number_cell(value: float, metric: Metric, note: str = "", best: bool = False) -> Cell:
    return Cell(html.format_number(value, metric.digits), value, best, note)


def _format_range(low: float | None, high: float | None, metric: Metric) -> str:
    return f"{html.format_number(low, metric.digits)} … {html.format_number(high, metric.digits)}"


def _render_differences(cfg: SearchConfig, comparison: Comparison) -> str:
    """Every setting against the first one, paired by neuron and seed."""
    metrics = comparison.list_columns()
    # The first setting of the space is the reference.
    base, *others = comparison.scores
    base_name = ", ".join(part for part in base if part)
    neurons = len(comparison.neurons)
    note = (
        f"Score of a setting minus that of {base_name}, on the same neuron with the same seed; in small type the 95 % "
        f"bootstrap interval over neurons and seeds ({cfg.draws:,} draws). An interval that contains 0 shows no "
        f"difference; the others are bold. By chance alone about one setting in twenty is bold. p: sign-flip test "
        f"over the {neurons} neurons, seeds averaged, after Holm's correction for {len(others)} settings; before it, p "
        f"is at least {2 / 2**neurons:.2g}. n: neurons needed to detect a difference of {_EFFECT} with a "
        "power of 80 %."
    )
    columns = [*_setting_columns(comparison), *(Column(_metric_title(m)) for m in metrics)]
    rows = []

    chances = {m.key: _describe_chances(comparison, others, base, m) for m in metrics}
    for setting in others:
        intervals = [comparison.compute_difference(setting, base, m.key, cfg.draws) for m in metrics]
        cells = [
            _difference_cell(m, interval, chances[m.key].get(setting, ""))
            for m, interval in zip(metrics, intervals, strict=True)
        ]
        rows.append([*_setting_cells(comparison, setting), *cells])

    return html.paragraph(note, "small") + html.table(columns, rows)


def _describe_chances(
    comparison: Comparison, others: Sequence[Setting], base: Setting, metric: Metric
) -> dict[Setting, str]:
    """Corrected p and the neurons needed, for every setting that has a seed in common with `base`."""
    pairs = [(setting, comparison.list_differences(setting, base, metric.key)) for setting in others]
    differences = {setting: rows for setting, rows in pairs if rows is not None}
    p_values = correct_for_many([sign_flip_test(rows) for rows in differences.values()])

    texts = {}
    for (setting, rows), p in zip(differences.items(), p_values, strict=True):
        needed = count_neurons_needed(rows, _EFFECT)
        texts[setting] = f"p {p:.2g}" + (f", n {needed:,}" if needed else "")
    return texts


def _difference_cell(metric: Metric, interval: Interval | None, chance: str) -> Cell:
    """A difference, bold where its interval does not hold 0; empty without a common seed."""
    if interval is None:
        return Cell("")

    text = html.format_number(interval.mean, metric.digits, signed=True)
    # One neuron with one seed has no interval.
    if interval.low is None or interval.high is None:
        return Cell(text, interval.mean)

    low, high = (html.format_number(end, metric.digits, signed=True) for end in (interval.low, interval.high))
    note = f"{low} … {high}; {chance}"
    return Cell(text, interval.mean, interval.low * interval.high > 0, note)


def _render_neurons(cfg: SearchConfig, comparison: Comparison) -> str:
    """The scores of every neuron and setting, mean and range over seeds."""
    metrics = comparison.list_columns()
    # One row for each neuron under each setting, so that a hard neuron shows.
    columns = [Column("Neuron", numeric=False), *_setting_columns(comparison)]
    columns += [Column(_metric_title(m), "mean over seeds; below it the lowest and highest seed") for m in metrics]
    rows = []

    for index, neuron in enumerate(comparison.neurons):
        for setting in comparison.scores:
            cells = [Cell(neuron), *_setting_cells(comparison, setting)]
            for m in metrics:
                values = comparison.collect_values(setting, m.key)[:, index]
                note = _format_range(values.min(), values.max(), m) if len(values) > 1 else ""
                cells.append(_number_cell(float(values.mean()), m, note))
            rows.append(cells)

    return html.table(columns, rows)


def _setting_columns(comparison: Comparison) -> list[Column]:
    """Columns of the parts of a setting."""
    return [Column(name, numeric=False) for name in comparison.dimensions if name]


def _setting_cells(comparison: Comparison, setting: Setting) -> list[Cell]:
    """Cells of the parts of a setting."""
    return [Cell(part) for part, name in zip(setting, comparison.dimensions, strict=True) if name]


def _draw_metric(comparison: Comparison, metric: Metric, means: Mapping[Setting, Interval]) -> str:
    # The same intervals as in the table.
    bars = {setting: (interval.mean, interval.low, interval.high) for setting, interval in means.items()}
    level = ("Otsu", _baseline_mean(comparison, metric)) if comparison.baseline else None
    groups, colors = comparison.list_parts(0), comparison.list_parts(1)
    return sweep_charts.draw_factorial(_metric_title(metric), groups, colors, bars, level)


def _baseline_mean(comparison: Comparison, metric: Metric) -> float:
    return sum(scores[metric.key] for scores in comparison.baseline.values()) / len(comparison.baseline)


def _metric_title(metric: Metric) -> str:
    """Heading with an arrow to the better direction."""
    return f"{metric.heading} {'↑' if metric.direction == 'higher' else '↓'}"
