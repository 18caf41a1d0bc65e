"""The report: what a reviewer needs to judge a result, on one page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.evaluate import learning_curves, reliability
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.metric_rows import GOLD_KEYS, Metric, rows
from hpc_neuro.evaluate.pictures import CAPTION
from hpc_neuro.evaluate.summary import Results, difference, interval
from hpc_neuro.metrics.bootstrap import Interval
from hpc_neuro.metrics.calibration import Bin
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.provenance import RunRecord

_SHOWN_PAIRS = ("dice", "f1", "hd95_um", "esa")  # metrics drawn neuron by neuron


def build(
    results: Results,
    cfg: EvaluateConfig,
    pictures: Sequence[tuple[str, Path]],
    training: Sequence[dict[str, Any]] | None,
    links: list[RunRecord],
    notices: Sequence[str],
    code: str,
    reliable: Mapping[str, Sequence[Bin]],
) -> str:
    """The page as text. `pictures` are (volume, JPEG) in the order shown; `training` the rows of a training run;
    `notices` what stands above all numbers; `reliable` what is known of the model's confidence."""
    n = len(results.ids)
    sections = [("Result", _result(results, cfg, notices))]
    if n > 1 and len(results.methods) > 1:
        sections.append(("Differences", _differences(results, cfg)))
    sections.append(("Neurons", _neurons(results, cfg)))
    seeds = len(results.seeds["model"])
    of = html.paragraph(f"Of the first of {seeds} trained models; the scores are means over all.") if seeds > 1 else ""
    if pictures:
        shown = "".join(html.picture(p.read_bytes(), f"{name}. {CAPTION}") for name, p in pictures)
        worst = "The worst neurons first, by the model's F1." if n > 1 else ""
        sections.append(("Pictures", of + (html.paragraph(worst) if worst else "") + shown))
    if reliable:
        sections.append(("Confidence", of + reliability.section(reliable, cfg)))
    if training:
        sections.append(("Learning curves", html.row(learning_curves.draw(training))))
    sections.append(("Definitions", _definitions(results, cfg)))
    sections.append(("Provenance", _provenance(links)))
    neurons = f"{n} neuron{'s' if n > 1 else ''} of the {cfg.split} split"
    return html.render_page("Neuron segmentation and tracing", f"{neurons} · hpc_neuro {code}", sections)


def _result(results: Results, cfg: EvaluateConfig, notices: Sequence[str]) -> str:
    metrics = [r for r in rows(cfg) if r.main]
    table = [[Cell(_name(m))] for m in results.methods]
    gold = [Cell("Gold")]
    for r in metrics:
        found = [interval(results, m, r.key, cfg) for m in results.methods]
        best = r.best([f.mean for f in found])
        for cells, f in zip(table, found, strict=True):
            cells.append(_interval_cell(f, r.digits, f.mean == best))
        own = sum(results.gold[i][r.key] for i in results.ids) / len(results.ids) if r.key in GOLD_KEYS else None
        gold.append(Cell("" if own is None else html.format_number(own, r.digits), own))
    table.append(gold)
    text = [html.paragraph(notice, "notice") for notice in notices]
    if len(results.ids) > 1:
        text.append(
            html.paragraph(
                f"Means over {len(results.ids)} neurons; in small type the 95 % bootstrap interval over neurons "
                f"({cfg.draws:,} draws). The best mean of a column is bold.",
                "small",
            )
        )
    else:
        text.append(html.paragraph("One neuron: no interval can be given. The best of a column is bold.", "small"))
    return "".join(text) + html.table(_columns("Method", metrics), table)


def _differences(results: Results, cfg: EvaluateConfig) -> str:
    by_key = {r.key: r for r in rows(cfg)}
    shown = [next(r for k, r in by_key.items() if k == name or k.startswith(name + "_")) for name in _SHOWN_PAIRS]
    figures = [
        charts.draw_pairs(
            _titled(r),
            [_name(m) for m in results.methods],
            list(zip(*(results.column(m, r.key) for m in results.methods), strict=True)),
            "",
        )
        for r in shown
    ]
    for r in (r for r in by_key.values() if r.main and r.better):
        found = [(_name(m), difference(results, "model", m, r.key, cfg)) for m in results.methods[1:]]
        side = "right" if r.better == "high" else "left"
        figures.append(
            charts.draw_differences(
                f"{r.title}: model less each other, mean and 95 % interval",
                [(name, f.mean, f.low, f.high) for name, f in found],
                f"{side} of zero the model is better",
            )
        )
    note = "In the first charts, one thin line per neuron; the bar is the mean. Arrows say which way is better."
    return _difference_table(results, cfg) + html.paragraph(note, "small") + html.row(figures)


def _difference_table(results: Results, cfg: EvaluateConfig) -> str:
    metrics = [r for r in rows(cfg) if r.main]
    table = [
        [
            Cell(_name(m)),
            *(_interval_cell(difference(results, "model", m, r.key, cfg), r.digits, sign=True) for r in metrics),
        ]
        for m in results.methods[1:]
    ]
    note = "Means of the differences neuron by neuron, with their 95 % interval: one that holds zero shows nothing."
    return html.paragraph(note, "small") + html.table(_columns("Model \N{MINUS SIGN}", metrics), table)


def _columns(first: str, metrics: Sequence[Metric]) -> list[Column]:
    return [Column(first, numeric=False), *(Column(_titled(r), r.definition) for r in metrics)]


def _neurons(results: Results, cfg: EvaluateConfig) -> str:
    metrics = sorted(rows(cfg), key=lambda r: not r.main)
    columns = [Column("Neuron", numeric=False), Column("Method", numeric=False)]
    columns += [Column(_titled(r), r.definition) for r in metrics]
    table = []
    for volume in results.worst_first(cfg):
        best = {r.key: r.best([results.of(m, volume)[r.key] for m in results.methods]) for r in metrics}
        for m in results.methods:
            scores = results.of(m, volume)
            cells = [Cell(volume), Cell(_name(m))]
            cells += [
                Cell(html.format_number(scores[r.key], r.digits), scores[r.key], best=scores[r.key] == best[r.key])
                for r in metrics
            ]
            table.append(cells)
        own = results.gold[volume]
        cells = [Cell(volume), Cell("Gold")]
        cells += [
            Cell(html.format_number(own.get(r.key), r.digits) if r.key in own else "", own.get(r.key)) for r in metrics
        ]
        table.append(cells)
    facts = [[Cell(i), *(Cell(str(v)) for v in results.facts[i].values())] for i in results.ids]
    names = list(results.facts[results.ids[0]])
    volumes = html.table([Column("Neuron", numeric=False), *(Column(n, numeric=False) for n in names)], facts)
    note = "A click on a heading sorts; at first the worst neurons, by the model's F1, stand at the top."
    return html.paragraph(note, "small") + html.table(columns, table) + html.details("The volumes", volumes)


def _definitions(results: Results, cfg: EvaluateConfig) -> str:
    terms = [(_titled(r), r.definition) for r in rows(cfg)]
    if "otsu" in results.methods:
        terms.append(
            (
                "Otsu",
                "Baseline without training: voxels of the raw image above Otsu's threshold (1979) of the whole "
                "volume's histogram; the mask is traced by the same tracer, along the image where it breaks, with the "
                "same settings from the same root unless something else is said above the numbers.",
            )
        )
    terms.append(
        (
            "Empty masks and trees",
            "Both empty agree (scores 1, distances 0). One empty is a miss: scores 0, distances the diagonal of the "
            "volume, and 1 in its own column. No volume leaves a mean.",
        )
    )
    terms.append(
        (
            "95 % interval",
            f"Percentile bootstrap: {cfg.draws:,} times as many neurons are drawn with replacement (seed {cfg.seed}); "
            "differences are taken neuron by neuron first.",
        )
    )
    return html.definitions(terms)


def _provenance(links: list[RunRecord]) -> str:
    columns = [Column(c, numeric=False) for c in ("Stage", "Folder", "Code", "Finished", "Host", "Inputs (SHA-256)")]
    table = []
    for link in links:
        if link.record is None:
            table.append([Cell(link.name), Cell(str(link.path)), Cell("no record here"), *(Cell("") for _ in range(3))])
            continue
        r = link.record
        inputs = ", ".join(f"{k} {str(v)[:12]}" for k, v in r.get("inputs", {}).items())
        cells = [link.name, str(link.path), str(r.get("code", "")), str(r.get("end") or "not finished")]
        table.append([Cell(c) for c in (*cells, str(r.get("host", "")), inputs)])
    records = "".join(
        html.details(f"{link.name}: full record", html.code(json.dumps(link.record, indent=1)))
        for link in links
        if link.record
    )
    return html.table(columns, table, sortable=False) + records


def _interval_cell(found: Interval, digits: int, best: bool = False, sign: bool = False) -> Cell:
    text = html.format_number(found.mean, digits)
    if sign and round(found.mean, digits) > 0:
        text = "+" + text
    note = ""
    if found.low is not None and found.high is not None:
        note = f"{html.format_number(found.low, digits)} … {html.format_number(found.high, digits)}"
    return Cell(text, found.mean, best, note)


def _titled(metric: Metric) -> str:
    return metric.title + {"high": " ↑", "low": " ↓", "": ""}[metric.better]


def _name(method: str) -> str:
    return {"model": "Model", "otsu": "Otsu"}.get(method, method)
