"""The report of a study: what people read and what programs read, from records as a driver leaves them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from hpc_neuro import search
from hpc_neuro.core import run_folder, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.metrics.statistics import count_neurons_needed
from hpc_neuro.report import sweep_charts
from hpc_neuro.search import comparison, report_page, trial, verb
from hpc_neuro.search.config import SearchConfig
from hpc_neuro.search.space import list_grid_points
from hpc_neuro.search.study import Study
from hpc_neuro.search.trial import Attempt, Trial
from tests.helpers.browser import measure_excess

RULES = ("scratch", "average", "center", "tubular", "deformable_tubular")
MODES = ("none", "point", "straight", "deformable")


def write_factorial(out: Path) -> SearchConfig:
    """A finished study of 5 x 4 settings and 3 seeds over four neurons, with made-up scores; one trial has failed."""
    tree = {
        "out": out,
        "recipe": ["train", "infer", "evaluate"],
        "space": {
            "seed": {"choice": [0, 1, 2]},
            "transfer": {"bundle": {r: {"transfer.rule": r} for r in RULES}},
            "distillation": {"bundle": {m: {"distill.axes": m} for m in MODES}},
        },
        "sampler": {"kind": "grid"},
        "objective": {"key": "evaluate.dice"},
    }
    cfg = TypeAdapter(SearchConfig).validate_python(tree)
    draw = np.random.default_rng(0)
    for number, point in enumerate(list_grid_points(cfg.space)):
        folder = trial.trial_folder(out, number)
        level = 0.5 + 0.04 * RULES.index(point["transfer"]) + 0.02 * MODES.index(point["distillation"])
        scores = {}
        for neuron in ("OP_1", "OP_3", "OP_5", "OP_7"):
            d = float(level + draw.normal(0, 0.03))
            model = {"dice": d, "hd95_um": 3 - 2 * d, "esa": 2 - d, "f1_4vox": min(1.0, d + 0.2)}
            scores[neuron] = {"model": model, "otsu": {"dice": 0.55, "hd95_um": 2.1, "esa": 1.6, "f1_4vox": 0.7}}
        (folder / "evaluate").mkdir(parents=True)
        mean = {"model": {"dice": float(np.mean([s["model"]["dice"] for s in scores.values()]))}}
        (folder / "evaluate" / "metrics.json").write_text(json.dumps({"volumes": scores, "mean": mean}))
        (folder / "train.yaml").write_text(yaml.safe_dump({"out": str(folder), **point}))
        failed = number == 7
        ended = [Attempt(f"{1000 + number}", 0.0, 60.0 + number, "finished")]
        value = None if failed else mean["model"]["dice"]
        Trial(number, point, folder, "failed" if failed else "done", ended, {}, value, 1500, "<b>&" * failed).save()
    record(cfg)
    return cfg


def record(cfg: SearchConfig) -> None:
    """run.json, as the sweep writes it before its first trial."""
    with run_folder.start("search", cfg, cfg.out, {}):
        pass


@pytest.fixture(scope="module")
def factorial(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    cfg = write_factorial(tmp_path_factory.mktemp("study"))
    assert search.run(cfg) == 3, "one trial has failed"
    return cfg


def test_the_comparison_has_a_line_per_setting_seed_and_neuron_and_misses_only_what_failed(factorial):
    rows = list(csv.DictReader((factorial.out / "comparison.csv").open()))
    assert len(rows) == (60 - 1) * 4
    page = (factorial.out / "report.html").read_text()
    assert "Means over 4 held-out neurons and 2 to 3 seeds" in page
    assert "<b>&<b>" not in page, "a trial's note is text, not markup"
    assert page.count('class="chart"') == 4 + 2


def test_differences_are_paired_by_neuron_and_seed(factorial):
    settings = comparison.read_comparison(factorial, trial.load_trials(factorial.out))
    base, *_, last = settings.scores
    apart = [
        settings.scores[last][seed][neuron]["dice"] - settings.scores[base][seed][neuron]["dice"]
        for seed in settings.scores[last]
        for neuron in settings.neurons
    ]
    shown = settings.compute_difference(last, base, "dice", 1000)
    assert shown.mean == pytest.approx(np.mean(apart))
    page = (factorial.out / "report.html").read_text()
    assert f"{shown.mean:+.3f}" in page
    # Four neurons cannot show a difference among nineteen settings.
    rows = settings.list_differences(last, base, "dice")
    needed = count_neurons_needed(rows, 0.01)
    assert f"; p 1, n {needed:,}" in page
    assert "before it, p is at least 0.12" in page
    # what seeds and neurons have in common drops out, however far apart they are
    rng = np.random.default_rng(0)
    far = {str(s): {n: {"dice": float(rng.normal(0, 10))} for n in "abc"} for s in range(3)}
    near = {s: {n: {"dice": v["dice"] + 0.5} for n, v in row.items()} for s, row in far.items()}
    pair = comparison.Comparison(("a", ""), ("a", "b", "c"), {("x", ""): far, ("y", ""): near}, {})
    exact = pair.compute_difference(("y", ""), ("x", ""), "dice", 100)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((0.5, 0.5, 0.5))
    other = {("x", ""): {"0": far["0"]}, ("y", ""): {"1": far["1"]}}
    assert (
        comparison.Comparison(("a", ""), ("a", "b", "c"), other, {}).compute_difference(("y", ""), ("x", ""), "dice", 9)
        is None
    )


def test_the_page_warns_where_otsu_beats_every_setting(factorial):
    settings = comparison.read_comparison(factorial, trial.load_trials(factorial.out))
    assert "better than every setting" not in report_page._render_comparison(factorial, settings)

    perfect = {neuron: {"dice": 1.0, "hd95_um": 9.0, "esa": 9.0, "f1_4vox": 1.0} for neuron in settings.neurons}
    page = report_page._render_comparison(factorial, replace(settings, baseline=perfect))
    assert "Otsu&#x27;s threshold is better than every setting by Dice and F1 @ 4 voxels." in page
    # Its values are the best of these two columns, and of no other.
    row = page.partition('<td class="text">Otsu</td>')[2].partition("</tr>")[0]
    assert row.count('<td class="number best"') == row.count("1.000</td>") == 2


def test_the_page_needs_nothing_else_and_its_charts_are_sound(factorial):
    page = (factorial.out / "report.html").read_text()
    assert 'src="http' not in page
    assert 'href="http' not in page
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
        assert "nan" not in part.partition("</svg>")[0]
        assert "None" not in part.partition("</svg>")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 700])
def test_tables_fit_the_screen(factorial, tmp_path, width):
    tables, page = measure_excess((factorial.out / "report.html").read_text(), width, tmp_path)
    assert max(tables) <= 0
    assert page <= 0


def test_the_best_is_the_highest_finished_one(factorial):
    trials = [t for t in trial.load_trials(factorial.out) if t.value is not None]
    winner = max(trials, key=lambda t: t.value)
    best = yaml.safe_load((factorial.out / "best.yaml").read_text())
    assert best["transfer"] == winner.values["transfer"]
    assert best["out"] == str(factorial.out / "best")
    rows = list(csv.DictReader((factorial.out / "trials.csv").open()))
    assert [r["trial"] for r in rows] == [str(n) for n in range(60)]
    assert float(rows[winner.number]["evaluate.dice"]) == winner.value
    assert rows[7]["state"] == "failed"


def test_a_study_of_numbers_has_parallel_axes_and_importance(tmp_path):
    space = {
        "optim.lr": {"log": [1e-4, 1e-2]},
        "rule": {"choice": ["a", "b"]},
        "share": {"range": [0, 1], "when": {"rule": ["b"]}},
    }
    tree = {"out": tmp_path, "space": space, "sampler": {"kind": "random"}, "trials": 24, "asha": {"first": 10}}
    cfg = TypeAdapter(SearchConfig).validate_python(tree)
    study = Study(cfg)
    while (proposal := study.ask()) is not None:
        number, point = proposal
        state = "pruned" if number % 3 == 2 else "done"
        value = 1 - abs(np.log10(point["optim.lr"] / 1e-3)) if state == "done" else None
        folder = trial.trial_folder(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / "train.yaml").write_text("out: x\n")
        Trial(number, point, folder, state, [Attempt("1", 0.0, 1.0)], {10: 0.5}, value, 10, "").save()
        study.tell(number, state, value, {10: 0.5})
    record(cfg)
    assert search.run(cfg) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Importance for the objective" in page
    assert "24 trials: 16 done, 8 pruned; 0 restarts." in page


@pytest.mark.parametrize(
    "change",
    [{"objective": {"key": "evaluate.hd95_um", "goal": "minimize"}}, {"space": {"optim.lr": {"choice": [1, 2]}}}],
)
def test_values_are_not_shown_under_another_objective_or_space(factorial, change):
    report = (factorial.out / "report.html").read_bytes()
    tree = {**schema.to_plain(factorial), **change}
    with pytest.raises(ConfigError, match=f"are of another config; give theirs. Different:\n  {next(iter(change))}"):
        search.run(TypeAdapter(SearchConfig).validate_python(tree))
    assert (factorial.out / "report.html").read_bytes() == report
    tables = {**schema.to_plain(factorial), "draws": 170}
    verb._require_same_study(TypeAdapter(SearchConfig).validate_python(tables))


def test_a_study_without_trials_says_how_to_start_them(tmp_path):
    tree = {"out": tmp_path, "space": {"a": {"choice": [1]}}, "sampler": {"kind": "grid"}}
    with pytest.raises(InputError, match="python -m launch sweep"):
        search.run(TypeAdapter(SearchConfig).validate_python(tree))


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (1.3e-4, 8.9e-3, ["0.0002", "0.0005", "0.001", "0.002", "0.005"]),
        (1e-5, 1e-1, ["1e-05", "0.0001", "0.001", "0.01", "0.1"]),
        (3.1e-4, 3.2e-4, ["0.00031", "0.00032"]),
        (1.0, 1e20, [f"{10.0**k:g}" for k in range(0, 21, 3)]),
    ],
)
def test_logarithmic_axes_have_round_ticks(low, high, marks):
    assert [f"{m:g}" for m in sweep_charts._choose_log_ticks(low, high)] == marks


def test_a_line_of_parallel_coordinates_breaks_where_a_value_is_missing():
    axes = [
        sweep_charts.ParallelAxis("a"),
        sweep_charts.ParallelAxis("b", labels=("u", "v")),
        sweep_charts.ParallelAxis("c", log=True),
    ]
    whole = sweep_charts.draw_parallel_coordinates("t", axes, [[1, 0, 10.0], [2, 1, 100.0]], [1.0, 0.5])
    broken = sweep_charts.draw_parallel_coordinates("t", axes, [[1, None, 10.0], [2, 1, None]], [None, 0.5])
    below = sweep_charts.draw_parallel_coordinates(
        "t", [axes[0], sweep_charts.ParallelAxis("b", absent=True)], [[1, None]], [1.0]
    )
    assert below.count("<polyline") == 1
    assert whole.count("<polyline") == 2
    assert broken.count("<polyline") == 1
