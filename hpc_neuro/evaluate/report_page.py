"""The report: what a reviewer needs to judge a result, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.evaluate import confidence, learning_curves
from hpc_neuro.evaluate.confidence import ConfidenceBin
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.pictures import CAPTION
from hpc_neuro.evaluate.summary import Results, compute_difference, compute_mean
from hpc_neuro.metrics.bootstrap import Interval
from hpc_neuro.metrics.metric import Metric
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.provenance import RunRecord

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}


def render_report(
    results: Results,
    cfg: EvaluateConfig,
    *,
    pictures: Sequence[tuple[str, Path]],
    training: Sequence[dict[str, Any]] | None,
    runs: Sequence[RunRecord],
    notices: Sequence[str],
    reliability: Mapping[str, Sequence[ConfidenceBin]],
) -> str:
    """The page as text.

    pictures: (volume, JPEG) in the order shown. training: the rows of a training run. runs: those behind the result,
    this one last. notices: sentences above all numbers. reliability: of the model's confidence.
    """
    neurons = files.format_count(len(results.ids), "neuron")
    sections = [
        ("Result", _render_result(results, cfg, notices)),
        ("Differences", _render_differences(results, cfg)),
        ("Neurons", _render_neurons(results, cfg)),
        ("Pictures", _render_pictures(results, pictures)),
        ("Confidence", _note_first_seed(results) + confidence.render_section(reliability, cfg) if reliability else ""),
        ("Learning curves", html.row(learning_curves.draw_curves(training)) if training else ""),
        ("Definitions", _render_definitions(results, cfg)),
        ("Provenance", _render_provenance(runs)),
    ]
    code = str((runs[-1].record or {}).get("code", ""))
    subtitle = f"{neurons} of the {cfg.split} split · hpc_neuro {code}"
    return html.render_page(
        "Neuron segmentation and tracing", subtitle, [(title, body) for title, body in sections if body]
    )


def _render_result(results: Results, cfg: EvaluateConfig, notices: Sequence[str]) -> str:
    """The main table: methods down, metrics across, gold last."""
    metrics = [m for m in cfg.list_metrics() if m.main]
    rows = {method: [Cell(_name_method(method))] for method in results.methods}
    gold = [Cell("Gold")]
    for metric in metrics:
        means = {method: compute_mean(results, method, metric.key, cfg) for method in results.methods}
        best = metric.find_best([i.mean for i in means.values()])
        for method, interval in means.items():
            rows[method].append(_interval_cell(interval, metric.digits, best=interval.mean == best))

        gold_mean = None
        if metric.describes_tree:
            gold_mean = sum(results.gold[i][metric.key] for i in results.ids) / len(results.ids)
        gold.append(_gold_cell(gold_mean, metric.digits))

    text = "One neuron: no interval can be given. The best of a column is bold."
    if len(results.ids) > 1:
        text = (
            f"Means over {len(results.ids)} neurons; in small type the 95 % bootstrap interval over neurons "
            f"({cfg.draws:,} draws). The best mean of a column is bold."
        )
    above = [*(html.paragraph(notice, "notice") for notice in notices), html.paragraph(text, "small")]
    return "".join(above) + html.table(_list_columns("Method", metrics), [*rows.values(), gold])


def _render_differences(results: Results, cfg: EvaluateConfig) -> str:
    """The model against each other method, neuron by neuron; empty with one neuron or one method."""
    if len(results.ids) < 2 or len(results.methods) < 2:
        return ""
    note = "In the first charts, one thin line per neuron; the bar is the mean. Arrows say which way is better."
    figures = [*_draw_pairs(results, cfg), *_draw_differences(results, cfg)]
    return _render_difference_table(results, cfg) + html.paragraph(note, "small") + html.row(figures)


def _draw_pairs(results: Results, cfg: EvaluateConfig) -> list[str]:
    """Charts of the most telling metrics neuron by neuron."""
    metrics = {m.key: m for m in cfg.list_metrics()}
    names = [_name_method(method) for method in results.methods]
    figures = []
    for key in ("dice", cfg.f1_key, "hd95_um", "esa"):
        values = zip(*(results.list_values(method, key) for method in results.methods), strict=True)
        figures.append(charts.draw_pairs(_title_with_arrow(metrics[key]), names, list(values), ""))
    return figures


def _draw_differences(results: Results, cfg: EvaluateConfig) -> list[str]:
    """Charts of the mean difference from each other method, for each main metric."""
    figures = []
    for metric in cfg.list_metrics():
        if not metric.main or metric.describes_tree:
            continue

        rows = []
        for method in results.methods[1:]:
            interval = compute_difference(results, "model", method, metric.key, cfg)
            rows.append((_name_method(method), interval.mean, interval.low, interval.high))
        side = "right" if metric.direction == "higher" else "left"
        title = f"{metric.heading}: model less each other, mean and 95 % interval"
        figures.append(charts.draw_differences(title, rows, f"{side} of zero the model is better"))
    return figures


def _render_difference_table(results: Results, cfg: EvaluateConfig) -> str:
    metrics = [m for m in cfg.list_metrics() if m.main]
    rows = []
    for method in results.methods[1:]:
        differences = [compute_difference(results, "model", method, m.key, cfg) for m in metrics]
        cells = [_interval_cell(d, m.digits, signed=True) for d, m in zip(differences, metrics, strict=True)]
        rows.append([Cell(_name_method(method)), *cells])
    note = (
        "Means of the differences neuron by neuron, with their 95 % interval: an interval that holds zero shows no "
        "difference."
    )
    return html.paragraph(note, "small") + html.table(_list_columns("Model \N{MINUS SIGN}", metrics), rows)


def _render_neurons(results: Results, cfg: EvaluateConfig) -> str:
    """All metrics of every neuron and method, and the table of volumes."""
    metrics = sorted(cfg.list_metrics(), key=lambda m: not m.main)
    columns = [Column("Neuron", numeric=False), *_list_columns("Method", metrics)]
    rows = []
    for volume in results.rank_worst_first(cfg):
        rows += _list_neuron_rows(results, volume, metrics)

    note = "A click on a heading sorts; at first the worst neurons, by the model's F1, stand at the top."
    volumes = html.details("The volumes", _render_volumes(results))
    return html.paragraph(note, "small") + html.table(columns, rows) + volumes


def _list_neuron_rows(results: Results, volume: str, metrics: Sequence[Metric]) -> list[list[Cell]]:
    """One row per method and one for gold."""
    scores = {method: results.average_seeds(method, volume) for method in results.methods}
    best = {m.key: m.find_best([s[m.key] for s in scores.values()]) for m in metrics}
    rows = []
    for method, values in scores.items():
        cells = [
            Cell(html.format_number(values[m.key], m.digits), values[m.key], best=values[m.key] == best[m.key])
            for m in metrics
        ]
        rows.append([Cell(volume), Cell(_name_method(method)), *cells])

    gold = results.gold[volume]
    rows.append([Cell(volume), Cell("Gold"), *(_gold_cell(gold.get(m.key), m.digits) for m in metrics)])
    return rows


def _render_volumes(results: Results) -> str:
    names = list(results.volume_facts[results.ids[0]])
    columns = [Column(name, numeric=False) for name in ("Neuron", *names)]
    rows = [[Cell(i), *(Cell(str(v)) for v in results.volume_facts[i].values())] for i in results.ids]
    return html.table(columns, rows)


def _render_pictures(results: Results, pictures: Sequence[tuple[str, Path]]) -> str:
    if not pictures:
        return ""
    order = html.paragraph("The worst neurons first, by the model's F1.") if len(results.ids) > 1 else ""
    images = "".join(html.picture(path.read_bytes(), f"{name}. {CAPTION}") for name, path in pictures)
    return _note_first_seed(results) + order + images


def _note_first_seed(results: Results) -> str:
    """Of which model pictures and confidence are, when there are several seeds."""
    seeds = len(results.seeds["model"])
    if seeds < 2:
        return ""
    return html.paragraph(f"Of the first of {seeds} trained models; the scores are means over all.")


def _render_definitions(results: Results, cfg: EvaluateConfig) -> str:
    terms = [(_title_with_arrow(m), m.definition) for m in cfg.list_metrics()]
    if "otsu" in results.methods:
        otsu = (
            "Baseline without training: voxels of the raw image above Otsu's threshold (1979) of the whole volume's "
            "histogram; the mask is traced by the same tracer, along the image where it breaks, with the same settings "
            "from the same root unless a sentence above the numbers says otherwise."
        )
        terms.append(("Otsu", otsu))

    empty = (
        "Two empty masks or trees agree (scores 1, distances 0). One empty mask or tree is a miss: scores 0, distances "
        "the diagonal of the volume, and 1 in its own column. No volume leaves a mean."
    )
    interval = (
        f"Percentile bootstrap: the neurons are drawn {cfg.draws:,} times with replacement (seed 0); differences are "
        "taken neuron by neuron first."
    )
    return html.definitions([*terms, ("Empty masks and trees", empty), ("95 % interval", interval)])


def _render_provenance(runs: Sequence[RunRecord]) -> str:
    """The runs behind the result, and their full records."""
    titles = ("Stage", "Folder", "Code", "Finished", "Host", "Inputs (SHA-256)")
    rows = []
    records = []
    for run in runs:
        if run.record is None:
            rows.append([run.verb, str(run.folder), "no record here", "", "", ""])
            continue
        inputs = ", ".join(f"{k} {str(v)[:12]}" for k, v in run.record.get("inputs", {}).items())
        facts = (run.record.get("code", ""), run.record.get("end") or "not finished", run.record.get("host", ""))
        rows.append([run.verb, str(run.folder), *map(str, facts), inputs])
        records.append(html.details(f"{run.verb}: full record", html.code(json.dumps(run.record, indent=1))))

    columns = [Column(title, numeric=False) for title in titles]
    cells = [[Cell(text) for text in row] for row in rows]
    return html.table(columns, cells, sortable=False) + "".join(records)


def _list_columns(first: str, metrics: Sequence[Metric]) -> list[Column]:
    return [Column(first, numeric=False), *(Column(_title_with_arrow(m), m.definition) for m in metrics)]


def _interval_cell(interval: Interval, digits: int, best: bool = False, signed: bool = False) -> Cell:
    text = html.format_number(interval.mean, digits)
    if signed and round(interval.mean, digits) > 0:
        text = "+" + text
    note = ""
    if interval.low is not None and interval.high is not None:
        note = f"{html.format_number(interval.low, digits)} … {html.format_number(interval.high, digits)}"
    return Cell(text, interval.mean, best, note)


def _gold_cell(value: float | None, digits: int) -> Cell:
    """A number of the gold tree; empty where gold has none."""
    return Cell("" if value is None else html.format_number(value, digits), value)


def _title_with_arrow(metric: Metric) -> str:
    return metric.heading + _ARROWS[metric.direction]


def _name_method(method: str) -> str:
    return {"model": "Model", "otsu": "Otsu"}.get(method, method)
