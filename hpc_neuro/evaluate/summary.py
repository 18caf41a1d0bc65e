"""From scores to tables: means, intervals, differences; JSON, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.metric_rows import Metric, rows
from hpc_neuro.metrics.bootstrap import Interval, mean_interval, paired_difference
from hpc_neuro.metrics.metric import tolerance_key

Scores = dict[str, float]


@dataclass(frozen=True)
class Results:
    """Scores of every volume, method and seed."""

    ids: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: Mapping[str, Sequence[Mapping[str, Scores]]]  # method -> per seed {id: scores}
    gold: Mapping[str, Scores]
    facts: Mapping[str, Mapping[str, object]]  # id -> what the table says about a volume

    def of(self, method: str, volume: str) -> Scores:
        """Scores of a volume, averaged over seeds."""
        each = [seed[volume] for seed in self.seeds[method]]
        return {k: sum(s[k] for s in each) / len(each) for k in each[0]}

    def column(self, method: str, metric: str) -> list[float]:
        """One metric of all volumes in the order of `ids`."""
        return [self.of(method, i)[metric] for i in self.ids]

    def worst_first(self, cfg: EvaluateConfig) -> list[str]:
        """Volumes by the model's F1, lowest first."""
        f1 = dict(zip(self.ids, self.column("model", tolerance_key("f1", cfg.tolerance_vox, "vox")), strict=True))
        return sorted(self.ids, key=lambda i: f1[i])


def interval(results: Results, method: str, metric: str, cfg: EvaluateConfig) -> Interval:
    """Mean over volumes with its bootstrap interval."""
    return mean_interval(results.column(method, metric), cfg.draws, cfg.seed)


def difference(results: Results, ours: str, theirs: str, metric: str, cfg: EvaluateConfig) -> Interval:
    """Mean of ours minus theirs over volumes with its bootstrap interval."""
    return paired_difference(results.column(ours, metric), results.column(theirs, metric), cfg.draws, cfg.seed)


def as_json(results: Results, cfg: EvaluateConfig) -> dict[str, object]:
    """metrics.json: `volumes` and `mean` as other programs read them; the rest under keys of its own."""
    metrics = rows(cfg)
    return {
        "volumes": {i: {m: results.of(m, i) for m in results.methods} for i in results.ids},
        "mean": {
            m: {r.key: sum(results.column(m, r.key)) / len(results.ids) for r in metrics} for m in results.methods
        },
        "gold": {i: dict(results.gold[i]) for i in results.ids},
        "interval_95": {
            m: {r.key: _bounds(interval(results, m, r.key, cfg)) for r in metrics} for m in results.methods
        },
        "difference": {
            f"model - {m}": {r.key: _full(difference(results, "model", m, r.key, cfg)) for r in metrics}
            for m in results.methods[1:]
        },
        "seeds": {m: [dict(s) for s in results.seeds[m]] for m in results.methods if len(results.seeds[m]) > 1},
        "worst_first": results.worst_first(cfg),
        "definitions": {r.key: r.definition for r in metrics},
    }


def as_csv(results: Results, cfg: EvaluateConfig) -> str:
    """One line per volume, method and seed; gold has lines too, with what a tree has by itself."""
    metrics = [r.key for r in rows(cfg)]
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, ["volume", "method", "seed", *metrics], lineterminator="\n")
        writer.writeheader()
        for volume in results.ids:
            for method in results.methods:
                for number, scores in enumerate(results.seeds[method]):
                    writer.writerow({"volume": volume, "method": method, "seed": number, **scores[volume]})
            writer.writerow({"volume": volume, "method": "gold", "seed": 0, **results.gold[volume]})
        return text.getvalue()


def as_latex(results: Results, cfg: EvaluateConfig) -> str:
    """The main table: methods down, metrics across, mean and 95 % interval; the best mean is bold. Needs booktabs."""
    metrics = [r for r in rows(cfg) if r.main and r.better]
    head = " & ".join(["Method", *(f"{_tex(r.title)} ${_arrow(r)}$" for r in metrics)])
    cells = {m: [f"{{{_tex(m)}}}"] for m in results.methods}  # in braces: a row end reads brackets that follow it
    for r in metrics:
        found = {m: interval(results, m, r.key, cfg) for m in results.methods}
        best = r.best([f.mean for f in found.values()])
        for m, f in found.items():
            text = f"{f.mean:.{r.digits}f}"
            text = rf"\textbf{{{text}}}" if f.mean == best else text
            if f.low is not None and f.high is not None:
                text += rf" {{\tiny [{f.low:.{r.digits}f}, {f.high:.{r.digits}f}]}}"
            cells[m].append(text)
    lines = [" & ".join(row) + r" \\" for row in cells.values()]
    n = len(results.ids)
    return "\n".join(
        [
            f"% {n} neuron{'s' if n > 1 else ''}; in brackets the 95 % bootstrap interval over neurons",
            rf"\begin{{tabular}}{{l{'c' * len(metrics)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _bounds(found: Interval) -> list[float] | None:
    return None if found.low is None or found.high is None else [found.low, found.high]


def _full(found: Interval) -> dict[str, object]:
    return {"mean": found.mean, "interval_95": _bounds(found), "n": found.n}


def _arrow(metric: Metric) -> str:
    return r"\uparrow" if metric.better == "high" else r"\downarrow"


_TEX = {c: "\\" + c for c in "_&%$#{}"} | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}"}
_TEX |= {"^": r"\textasciicircum{}", "µ": r"\textmu{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(c, c) for c in text)
