"""Sections of the report about the runs behind a result: methods, learning curves, provenance."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core import files, metric_rows, yaml_text
from hpc_neuro.core.schema import InputError
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.summary import Results
from hpc_neuro.report import charts, html
from hpc_neuro.report.html import Cell, Column
from hpc_neuro.report.provenance import RunRecord

_NOT_LOSSES = {
    *("step", "kind", "lr", "grad_norm", "crops_per_s", "tokens_per_s", "mfu", "data_wait_share"),
    *("memory_bytes", "eta_s"),
}
"""Numbers of a training step that are no terms of the loss."""
_VALIDATION = ("dice", "dice_best", "precision", "recall")
_NAMES = {"lr": "learning rate", "dice_best": "dice at the best threshold"}
"""Names in legends of what metrics.jsonl names shortly."""
_TRACE_PHRASES = {
    "min_branch": "side branches shorter than {:g} voxels were left out",
    "min_cable": "trees without a given root need at least {:g} voxels of cable",
    "gap": "gaps of up to {:g} voxels were bridged",
}
"""How the methods name the tracer's main settings."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of `folder`/metrics.jsonl. Raises InputError for a missing file or a broken line other than the last."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        raise InputError(f"{path} does not exist; give the `out` of a `train` run as `train`, or leave it out")

    # The last lines of a run that is at work, or was killed, may be incomplete.
    lines = metric_rows.read_lines(path)
    if number := metric_rows.find_damaged_line(lines):
        raise InputError(f"line {number} of {path} is no row of metrics; remove that line, or leave `train` out")
    return metric_rows.list_rows(lines)


def draw_curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Charts: the loss and its terms, those of the distillation, validation, learning rate."""
    # The terms depend on the losses of the run, so they are taken from the rows.
    train = [r for r in rows if r.get("kind") == "train"]
    validation = [r for r in rows if r.get("kind") == "val"]
    terms = list(dict.fromkeys(k for r in train for k, v in r.items() if k not in _NOT_LOSSES and _is_number(v)))
    distillation = [t for t in terms if t.startswith("distill_")]
    others = [t for t in terms if t not in distillation]

    # Terms of the distillation have a scale of their own.
    figures = []
    for title, keys in (("Training loss and its terms", others), ("Terms of the distillation", distillation)):
        if keys:
            curves = [_build_series(train, k) for k in keys]
            figures.append(charts.draw_lines(title, curves, "step", "loss", log_y=True))

    scores = [_build_series(validation, k) for k in _VALIDATION]
    figures.append(charts.draw_lines("Validation on fixed crops", scores, "step", "share"))
    figures.append(charts.draw_lines("Learning rate", [_build_series(train, "lr")], "step", "learning rate"))

    return figures


def _build_series(rows: Sequence[dict[str, Any]], key: str) -> charts.Series:
    # A term may be missing from some steps, or null.
    points = [(r["step"], r[key]) for r in rows if _is_number(r.get(key))]
    return charts.Series(_NAMES.get(key, key.replace("_", " ")), [x for x, _ in points], [y for _, y in points])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def describe_methods(
    results: Results,
    cfg: EvaluateConfig,
    runs: Sequence[RunRecord],
    thresholds: Sequence[float],
    training_volumes: int,
) -> str:
    """A paragraph for the methods section of a paper: data, model, training, prediction, tracing, scores.

    thresholds: the probabilities from which the model's voxels are foreground. training_volumes: how many volumes of
    the store the model was trained or validated on; 0 where that is not known. A run without a record, and a setting
    that its record lacks, is left out.
    """
    # Of several runs of one verb the last is nearest to the result.
    records = {run.verb: run.record for run in runs if run.record}
    sentences = [
        _describe_training(records.get("train"), training_volumes),
        _describe_prediction(records.get("infer"), thresholds),
        _describe_tracing(records.get("infer")),
        _describe_data(results, cfg),
        _describe_scores(results, cfg),
    ]

    # The version makes the numbers reproducible.
    if code := records.get("evaluate", {}).get("code"):
        sentences.append(f"Software: hpc_neuro {code}.")

    return " ".join(sentence for sentence in sentences if sentence)


def _describe_data(results: Results, cfg: EvaluateConfig) -> str:
    # Volumes of one data set share their voxel size as a rule; others are listed.
    sizes = dict.fromkeys(str(facts["Voxel size [µm]"]) for facts in results.volume_facts.values())
    steps = "; ".join(sizes)
    scored = f"Scores are of {files.format_count(len(results.ids), 'neuron')} of the {cfg.split} split"
    return f"{scored} (voxels of {steps} µm, z y x)."


def _describe_training(record: Mapping[str, Any] | None, volumes: int) -> str:
    """Architecture, initialization, optimization and losses of the student."""
    config = (record or {}).get("config", {})
    if not config:
        return ""

    # What the network is and where its weights come from.
    patch, crop = _look_up(config, "student.patch"), _look_up(config, "crop.size")
    text = f"A 3D vision transformer (size {_look_up(config, 'student.size')}, patches of {_join(patch)} voxels)"
    if (teacher := _look_up(config, "teacher.model")) is not None:
        text += f", initialized from the 2D teacher {teacher} by the transfer rule {_look_up(config, 'transfer.rule')},"

    # How it was trained.
    batch = files.format_count(_look_up(config, "optim.batch") or 0, "crop")
    text += (
        f" was trained for {_look_up(config, 'optim.steps')} steps of {batch} of {_join(crop)} voxels (AdamW, peak "
        f"learning rate {_look_up(config, 'optim.lr')}, seed {config.get('seed')})"
    )

    if volumes:
        text += f" on {files.format_count(volumes, 'neuron')} (validation included)"

    # What it was trained for.
    losses = [str(loss.get("kind")).replace("_", " ") for loss in config.get("losses") or []]
    if losses:
        text += f" with the loss {' + '.join(losses)}"
    if weight := _look_up(config, "distill.weight"):
        text += f" and feature distillation from the teacher (weight {weight:g})"

    return text + "."


def _describe_prediction(record: Mapping[str, Any] | None, thresholds: Sequence[float]) -> str:
    config = (record or {}).get("config", {})
    text = []
    if (overlap := config.get("overlap")) is not None:
        text.append(f"predicted in windows that overlap by {overlap:.0%}")
    if flips := config.get("flips"):
        text.append(f"averaged over {len(flips) + 1} orientations")
    sentences = [f"Volumes were {_join_words(text)}."] if text else []

    if thresholds:
        # Every volume may have a threshold of its own.
        values = " to ".join(f"{value:g}" for value in dict.fromkeys((min(thresholds), max(thresholds))))
        sentences.append(f"Voxels with a probability of at least {values} are foreground.")
    return " ".join(sentences)


def _describe_tracing(record: Mapping[str, Any] | None) -> str:
    # The settings that people ask for; all others are under Provenance.
    trace = _look_up((record or {}).get("config", {}), "trace") or {}
    phrases = [text.format(trace[key]) for key, text in _TRACE_PHRASES.items() if _is_number(trace.get(key))]
    return f"Trees were traced from the probability: {_join_words(phrases)}." if phrases else ""


def _describe_scores(results: Results, cfg: EvaluateConfig) -> str:
    text = "Dice, precision and recall are of labelled voxels."
    if cfg.trees:
        text = (
            f"Cable counts as correct within {cfg.tolerance_vox:g} voxels of the other tree. ESA is computed as in "
            "Vaa3D's neuron_distance, HD95 as in MONAI, and clDice as in Shit et al. (2021)."
        )

    # What was averaged, and over what.
    seeds = len(results.seeds["model"])
    if seeds > 1:
        text += f" Scores of {seeds} trained models were averaged neuron by neuron."
    if len(results.ids) > 1:
        text += f" Intervals are 95 % percentile bootstrap intervals over neurons ({cfg.draws:,} draws)."
    if "otsu" in results.methods:
        text += f" The baseline is Otsu's threshold of the raw image{', traced by the same tracer' * cfg.trees}."

    return text


def _look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where a part of it is missing."""
    # Records of older versions lack newer settings.
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _join(numbers: Sequence[float] | None) -> str:
    return " x ".join(f"{n:g}" for n in numbers or ())


def _join_words(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def render_provenance(runs: Sequence[RunRecord]) -> str:
    """A table of the runs behind the result, and what each recorded."""
    columns = [Column("Stage", numeric=False), Column("Folder", numeric=False, wrap=True)]
    columns += [Column(title, numeric=False) for title in ("Code", "Finished", "Host")]

    # A run whose folder is gone still stands in the chain.
    rows, records = [], []
    for run in runs:
        if run.record is None:
            rows.append([run.verb, str(run.folder), "no record here", "", ""])
            continue
        facts = (run.record.get("code", ""), run.record.get("end") or "not finished", run.record.get("host", ""))
        rows.append([run.verb, str(run.folder), *map(str, facts)])
        records.append(html.details(f"{run.verb}: command, inputs and settings", _render_record(run.record)))

    cells = [[Cell(text) for text in row] for row in rows]

    return html.table(columns, cells, sortable=False) + "".join(records)


def _render_record(record: Mapping[str, Any]) -> str:
    """The record of one run for people; the file run.json has it for programs."""
    terms = [
        ("Command", shlex.join(map(str, record.get("command", ())))),
        ("Started", ", ".join(map(str, record.get("starts", ())))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())),
        ("Inputs (SHA-256)", ", ".join(f"{name} {str(sha)[:12]}" for name, sha in record.get("inputs", {}).items())),
        ("Result", ", ".join(_describe_result(record.get("summary", {})))),
    ]

    # YAML is the language in which people write configs.
    settings = yaml_text.dump(record.get("config", {}), default_flow_style=None, width=100)

    return html.definitions([(term, text) for term, text in terms if text]) + html.code(settings)


def _describe_result(summary: Mapping[str, Any]) -> list[str]:
    """`best val dice 0.81` for each plain value of a run's summary; tables are elsewhere on the page."""
    phrases = []
    for key, value in summary.items():
        if isinstance(value, (str, int, float)):
            # Counts keep all digits, measurements six.
            text = f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if _is_number(value) else str(value)
            phrases.append(f"{key.replace('_', ' ')} {text}")

    return phrases
