"""The report: what a reviewer needs to judge a result, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import files
from hpc_neuro.evaluate import confidence, places, run_sections
from hpc_neuro.evaluate.confidence import ConfidenceBin
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.pictures import CAPTION
from hpc_neuro.evaluate.places import HitCount
from hpc_neuro.evaluate.summary import Results, compute_difference, compute_mean
from hpc_neuro.metrics.metric import Metric, tolerance_key
from hpc_neuro.metrics.statistics import Interval
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.provenance import RunRecord

_ARROWS = {"higher": " ↑", "lower": " ↓", "": ""}
_FEW_NEURONS = 6
"""Neurons from which a difference between two methods can reach p = 0.05 (metrics.statistics.sign_flip_test)."""
_MAX_COLUMNS = 5
"""Names beside one another in a table; more stand below one another."""

_METHODS_NOTE = (
    "For the methods section of a paper, written from the records of the runs. Add what they do not record, such as "
    "the microscope."
)
_ADVICE_MASK = (
    "What to do next: for results now, use `hpc-neuro trace`, which needs no model. For a better model, look at the "
    "validation Dice under Learning curves. If it still rises at the last step, train longer: raise `optim.steps` of "
    "`train`. If it does not, label more neurons that look like the worst ones under Pictures."
)
_ADVICE_FALSE_CABLE = (
    "What to do next: the model's mask is the better one, so change the tracing. It finds false cable: run `infer` "
    "with a larger `trace.min_branch` or `trace.min_cable`, which keeps the probabilities, and evaluate again."
)
_ADVICE_MISSED_CABLE = (
    "What to do next: the model's mask is the better one, so change the tracing. It misses cable: run `infer` with a "
    "lower `threshold` or a larger `trace.gap`, and evaluate again."
)


def render_report(
    results: Results,
    cfg: EvaluateConfig,
    *,
    pictures: Sequence[tuple[str, Path]],
    training: Sequence[dict[str, Any]] | None,
    runs: Sequence[RunRecord],
    notices: Sequence[str],
    reliability: Mapping[str, Sequence[ConfidenceBin]],
    hits: Mapping[str, HitCount],
    methods: str,
) -> str:
    """The page as text.

    pictures: (volume, JPEG) in the order shown. training: the rows of a training run. runs: those behind the result,
    this one last. notices: sentences above all numbers. reliability: of the model's confidence. hits: of the places to
    proofread. methods: a paragraph for a paper.
    """
    neurons = files.format_count(len(results.ids), "neuron")
    # The order is that of a reader's questions; a section without content is left out.
    sections = [
        ("Result", _render_result(results, cfg, notices)),
        ("Differences", _render_differences(results, cfg)),
        ("Neurons", _render_neurons(results, cfg)),
        ("Pictures", _render_pictures(results, cfg, pictures)),
        ("Confidence", _note_first_seed(results) + confidence.render_section(reliability, cfg) if reliability else ""),
        (
            "Places to proofread",
            _note_first_seed(results) + places.render_section(hits, cfg.tolerance_vox) if hits else "",
        ),
        ("Learning curves", html.row(run_sections.draw_curves(training)) if training else ""),
        ("Methods", html.paragraph(_METHODS_NOTE, "small") + html.paragraph(methods)),
        ("Definitions", _render_definitions(results, cfg)),
        ("Provenance", run_sections.render_provenance(runs)),
    ]

    # The version that computed the numbers identifies the page.
    code = str((runs[-1].record or {}).get("code", ""))
    subtitle = f"{neurons} of the {cfg.split} split · hpc_neuro {code}"

    return html.render_page(
        "Neuron segmentation and tracing", subtitle, [(title, body) for title, body in sections if body]
    )


def _render_result(results: Results, cfg: EvaluateConfig, notices: Sequence[str]) -> str:
    """Notices, what to do when the baseline is better, and the main table with gold."""
    # A table of all metrics would hide the ten that people compare.
    metrics = [m for m in cfg.list_metrics() if m.main]
    grid = [_list_result_cells(results, metric, cfg) for metric in metrics]

    # Say what the small type is, or why there is none.
    n = len(results.ids)
    text = "One neuron: no interval can be given. The best value of each metric is bold."
    if n > 1:
        text = (
            f"Means over {n} neurons; in small type the 95 % bootstrap interval over neurons ({cfg.draws:,} draws). "
            "The best mean of each metric is bold."
        )
    if 1 < n < _FEW_NEURONS:
        text += f" Intervals over fewer than {_FEW_NEURONS} neurons are too narrow."

    # Warnings stand above the numbers, because they decide what the numbers mean.
    names = [*map(_name_method, results.methods), "Gold"]
    warnings = [html.paragraph(sentence, "notice") for sentence in (*notices, *advise(results, cfg))]
    return "".join([*warnings, html.paragraph(text, "small"), _render_grid(metrics, "Method", names, grid)])


def _list_result_cells(results: Results, metric: Metric, cfg: EvaluateConfig) -> list[Cell]:
    """One metric: its mean under each method, and of gold."""
    # Gold is no competitor: the best is the best of the methods.
    means = [compute_mean(results, method, metric.key, cfg) for method in results.methods]
    marks = metric.mark_best([interval.mean for interval in means])
    cells = [_interval_cell(interval, metric.digits, best) for interval, best in zip(means, marks, strict=True)]

    gold = None
    if metric.describes_tree:
        gold = sum(results.gold[i][metric.key] for i in results.ids) / len(results.ids)

    return [*cells, _gold_cell(gold, metric.digits)]


def _render_grid(metrics: Sequence[Metric], first: str, names: Sequence[str], grid: Sequence[Sequence[Cell]]) -> str:
    """A table of `grid[metric][name]`.

    Metrics run down the page, which a few columns of names fit; of many names there is one per row, to be sorted.
    """
    if len(names) > _MAX_COLUMNS:
        rows = [[Cell(name), *column] for name, column in zip(names, zip(*grid, strict=True), strict=True)]
        return html.table(_list_columns(first, metrics), rows)

    # Numbers of different metrics cannot be sorted by one another.
    columns = [Column("Metric", numeric=False), *(Column(name) for name in names)]
    rows = [[Cell(_title_with_arrow(m), hint=m.definition), *cells] for m, cells in zip(metrics, grid, strict=True)]

    return html.table(columns, rows, sortable=False)


def advise(results: Results, cfg: EvaluateConfig) -> list[str]:
    """What to do next where Otsu's threshold has a better F1 or Dice than the model; nothing where it has neither."""
    if "otsu" not in results.methods:
        return []

    # F1 judges the tree and Dice the mask: which of them is worse decides what to change.
    metrics = {m.key: m for m in cfg.list_metrics()}
    means = {
        key: [sum(results.list_values(m, key)) / len(results.ids) for m in ("model", "otsu")]
        for key in dict.fromkeys((cfg.rank_key, "dice"))
    }
    better = [
        f"{metrics[key].heading} {otsu:.3f} against {model:.3f}" for key, (model, otsu) in means.items() if otsu > model
    ]
    if not better:
        return []

    # A worse mask is the likelier cause of a worse tree, so it comes first.
    model_dice, otsu_dice = means["dice"]
    evidence = (
        "" if len(results.ids) > 1 else " One neuron is little evidence: hold out more (`split.test` of `prepare`)."
    )
    advice = _ADVICE_MASK if otsu_dice > model_dice else _advise_on_tracing(results, cfg)

    return [f"Otsu's threshold is better than the model: {' and '.join(better)}.{evidence} {advice}"]


def _advise_on_tracing(results: Results, cfg: EvaluateConfig) -> str:
    """The setting of the tracer to change where the model's mask is the better one and its tree is not."""
    precision, recall = (
        sum(results.list_values("model", tolerance_key(name, cfg.tolerance_vox))) / len(results.ids)
        for name in ("precision", "recall")
    )
    return _ADVICE_FALSE_CABLE if precision < recall else _ADVICE_MISSED_CABLE


def _render_differences(results: Results, cfg: EvaluateConfig) -> str:
    """The model against each other method, neuron by neuron; empty with one neuron or one method."""
    if len(results.ids) < 2 or len(results.methods) < 2:
        return ""

    # The table first, then the neurons behind its means, then the means with their intervals.
    note = (
        "In the first charts a thin line is a neuron, and the bar is the mean. Arrows show which direction is better."
    )
    figures = [*_draw_pairs(results, cfg), *_draw_differences(results, cfg)]

    return _render_difference_table(results, cfg) + html.paragraph(note, "small") + html.row(figures)


def _draw_pairs(results: Results, cfg: EvaluateConfig) -> list[str]:
    """Charts of the most telling metrics neuron by neuron."""
    metrics = {m.key: m for m in cfg.list_metrics()}
    names = [_name_method(method) for method in results.methods]
    figures = []
    for key in (key for key in ("dice", cfg.f1_key, "hd95_um", "esa") if key in metrics):
        values = zip(*(results.list_values(method, key) for method in results.methods), strict=True)
        figures.append(charts.draw_pairs(_title_with_arrow(metrics[key]), names, list(values), ""))

    return figures


def _draw_differences(results: Results, cfg: EvaluateConfig) -> list[str]:
    """Charts of the mean difference from each other method, for each main metric."""
    figures = []
    for metric in cfg.list_metrics():
        if not metric.main or metric.describes_tree:
            continue

        # The model is the first method, and the others are what it is compared with.
        rows = []
        for method in results.methods[1:]:
            interval = compute_difference(results, "model", method, metric.key, cfg)
            rows.append((_name_method(method), interval.mean, interval.low, interval.high))

        # Where lower is better, a better model lies left of zero.
        side = "right" if metric.direction == "higher" else "left"
        title = f"{metric.heading}: model minus each other method"
        figures.append(
            charts.draw_differences(title, rows, f"mean and 95 % interval; {side} of zero the model is better")
        )

    return figures


def _render_difference_table(results: Results, cfg: EvaluateConfig) -> str:
    metrics = [m for m in cfg.list_metrics() if m.main]
    others = results.methods[1:]
    grid = []
    for metric in metrics:
        differences = [compute_difference(results, "model", method, metric.key, cfg) for method in others]
        grid.append([_interval_cell(d, metric.digits, signed=True) for d in differences])

    note = (
        "Means of the differences, neuron by neuron, with their 95 % interval. An interval that contains zero shows no "
        "difference."
    )
    names = [f"Model \N{MINUS SIGN} {_name_method(method)}" for method in others]

    return html.paragraph(note, "small") + _render_grid(metrics, "Difference", names, grid)


def _render_neurons(results: Results, cfg: EvaluateConfig) -> str:
    """The main metrics of every neuron and method; all metrics and the facts of the volumes on a click."""
    metrics = cfg.list_metrics()
    main = [m for m in metrics if m.main]
    columns = [Column("Neuron", numeric=False), *_list_columns("Method", main)]
    names = [*map(_name_method, results.methods), "Gold"]

    # Ten columns fit the page; the other metrics of each neuron are a click away.
    rows, details = [], []
    for volume in results.rank_worst_first(cfg):
        cells = {m.key: _list_neuron_cells(results, volume, m) for m in metrics}
        for i, name in enumerate(names):
            rows.append([Cell(volume), Cell(name), *(cells[m.key][i] for m in main)])
        details.append(
            html.details(f"{volume}: all metrics", _render_grid(metrics, "Method", names, [*cells.values()]))
        )

    note = f"Click a heading to sort. The neurons with the lowest {cfg.rank_name} of the model come first."
    volumes = html.details("The volumes", _render_volumes(results))

    return html.paragraph(note, "small") + html.table(columns, rows) + volumes + "".join(details)


def _list_neuron_cells(results: Results, volume: str, metric: Metric) -> list[Cell]:
    """One metric of one neuron: under each method, and of gold."""
    # Seeds are averaged first, as in the means.
    values = [results.average_seeds(method, volume)[metric.key] for method in results.methods]
    pairs = zip(values, metric.mark_best(values), strict=True)
    cells = [Cell(html.format_number(value, metric.digits), value, best) for value, best in pairs]
    return [*cells, _gold_cell(results.gold[volume].get(metric.key), metric.digits)]


def _render_volumes(results: Results) -> str:
    names = list(results.volume_facts[results.ids[0]])
    columns = [Column(name, numeric=False) for name in ("Neuron", *names)]
    rows = [[Cell(i), *(Cell(str(v)) for v in results.volume_facts[i].values())] for i in results.ids]
    return html.table(columns, rows)


def _render_pictures(results: Results, cfg: EvaluateConfig, pictures: Sequence[tuple[str, Path]]) -> str:
    if not pictures:
        return ""
    order = (
        html.paragraph(f"The neurons with the lowest {cfg.rank_name} of the model come first.", "small")
        if len(results.ids) > 1
        else ""
    )
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


def _list_columns(first: str, metrics: Sequence[Metric]) -> list[Column]:
    return [Column(first, numeric=False), *(Column(_title_with_arrow(m), m.definition) for m in metrics)]


def _interval_cell(interval: Interval, digits: int, best: bool = False, signed: bool = False) -> Cell:
    text = html.format_number(interval.mean, digits, signed)

    # One neuron has no interval.
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
