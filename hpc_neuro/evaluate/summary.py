"""From scores to tables: means, intervals, differences; JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_neuro.core.files import format_count
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.metrics.metric import Metric
from hpc_neuro.metrics.statistics import Interval, mean_interval, paired_difference

Scores = dict[str, float]


@dataclass(frozen=True)
class Results:
    """Scores of every volume, method and seed."""

    ids: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: Mapping[str, Sequence[Mapping[str, Scores]]]
    """Method -> for each seed {id: scores}."""
    gold: Mapping[str, Scores]
    """Id -> the metrics that describe the gold tree alone."""
    volume_facts: Mapping[str, Mapping[str, object]]
    """Id -> what the report's table of volumes shows."""

    def average_seeds(self, method: str, volume: str) -> Scores:
        """Scores of a volume, averaged over seeds."""
        # Every seed has the same keys.
        scores = [seed[volume] for seed in self.seeds[method]]
        return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}

    def list_values(self, method: str, key: str) -> list[float]:
        """One metric of all volumes in the order of `ids`."""
        return [self.average_seeds(method, i)[key] for i in self.ids]

    def rank_worst_first(self, cfg: EvaluateConfig) -> list[str]:
        """Volumes by the model's F1, or Dice where no tree is scored, lowest first."""
        # `sorted` is stable: equal neurons keep the order of the store.
        scores = dict(zip(self.ids, self.list_values("model", cfg.rank_key), strict=True))
        return sorted(self.ids, key=lambda i: scores[i])


def compute_mean(results: Results, method: str, key: str, cfg: EvaluateConfig) -> Interval:
    """Mean over volumes with its bootstrap interval."""
    return mean_interval(results.list_values(method, key), cfg.draws)


def compute_difference(results: Results, first: str, second: str, key: str, cfg: EvaluateConfig) -> Interval:
    """Mean of the first method minus the second over volumes with its bootstrap interval."""
    return paired_difference(results.list_values(first, key), results.list_values(second, key), cfg.draws)


def build_json(results: Results, cfg: EvaluateConfig) -> dict[str, object]:
    """metrics.json: `volumes` and `mean` as other programs read them; the rest under keys of its own."""
    # Seeds are averaged neuron by neuron first, so that a neuron weighs the same whatever the number of seeds.
    keys = [m.key for m in cfg.list_metrics()]
    volumes = {i: {method: results.average_seeds(method, i) for method in results.methods} for i in results.ids}
    means = {
        method: {key: sum(results.list_values(method, key)) / len(results.ids) for key in keys}
        for method in results.methods
    }

    # Intervals and differences are over neurons.
    intervals = {
        method: {key: _list_bounds(compute_mean(results, method, key, cfg)) for key in keys}
        for method in results.methods
    }
    differences = {
        f"model - {method}": {
            key: _build_interval_json(compute_difference(results, "model", method, key, cfg)) for key in keys
        }
        for method in results.methods[1:]
    }

    # The single seeds are given only where there is more than one.
    seeds = {method: [dict(s) for s in results.seeds[method]] for method in results.methods}

    return {
        "volumes": volumes,
        "mean": means,
        "gold": {i: dict(results.gold[i]) for i in results.ids},
        "interval_95": intervals,
        "difference": differences,
        "seeds": {method: scores for method, scores in seeds.items() if len(scores) > 1},
        "worst_first": results.rank_worst_first(cfg),
        "definitions": {m.key: m.definition for m in cfg.list_metrics()},
    }


def format_csv(results: Results, cfg: EvaluateConfig) -> str:
    """One line per volume, method and seed; gold has lines too, with the metrics that describe one tree."""
    keys = [m.key for m in cfg.list_metrics()]
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, ["volume", "method", "seed", *keys], lineterminator="\n")
        writer.writeheader()
        for volume in results.ids:
            # Every seed has a line, so that other programs can take the means their own way.
            for method in results.methods:
                for number, scores in enumerate(results.seeds[method]):
                    writer.writerow({"volume": volume, "method": method, "seed": number, **scores[volume]})
            writer.writerow({"volume": volume, "method": "gold", "seed": 0, **results.gold[volume]})
        return text.getvalue()


def format_latex(results: Results, cfg: EvaluateConfig) -> str:
    """The main table: methods down, metrics across, mean and 95 % interval; the best mean is bold. Needs booktabs."""
    # Lengths and counts have no best value, and gold no row.
    metrics = [m for m in cfg.list_metrics() if m.main and m.direction]
    head = " & ".join(["Method", *(f"{_escape_latex(m.heading)} ${_arrow(m)}$" for m in metrics)])

    # In braces, because LaTeX reads a bracket after the end of a row as an option of that row.
    cells = {method: [f"{{{_escape_latex(method)}}}"] for method in results.methods}
    for metric in metrics:
        means = {method: compute_mean(results, method, metric.key, cfg) for method in results.methods}
        marks = metric.mark_best([interval.mean for interval in means.values()])
        for (method, interval), is_best in zip(means.items(), marks, strict=True):
            cells[method].append(_format_latex_cell(interval, metric.digits, is_best))

    # The comment travels with the table into the paper's source.
    n = len(results.ids)
    lines = [
        f"% {format_count(n, 'neuron')}; in brackets the 95 % bootstrap interval over neurons",
        rf"\begin{{tabular}}{{l{'c' * len(metrics)}}}",
        r"\toprule",
        head + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in cells.values()),
        r"\bottomrule",
        r"\end{tabular}",
    ]

    return "\n".join(lines) + "\n"


def _format_latex_cell(interval: Interval, digits: int, is_best: bool) -> str:
    text = f"{interval.mean:.{digits}f}"
    if is_best:
        text = rf"\textbf{{{text}}}"
    if interval.low is not None and interval.high is not None:
        text += rf" {{\tiny [{interval.low:.{digits}f}, {interval.high:.{digits}f}]}}"

    return text


def _list_bounds(interval: Interval) -> list[float] | None:
    return None if interval.low is None or interval.high is None else [interval.low, interval.high]


def _build_interval_json(interval: Interval) -> dict[str, object]:
    return {"mean": interval.mean, "interval_95": _list_bounds(interval), "n": interval.n}


def _arrow(metric: Metric) -> str:
    return r"\uparrow" if metric.direction == "higher" else r"\downarrow"


_LATEX = {c: "\\" + c for c in "_&%$#{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "µ": r"\textmu{}",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
