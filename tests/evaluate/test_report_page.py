"""What the report says, and whether it fits the screen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpc_neuro import evaluate
from hpc_neuro.core.schema import load
from hpc_neuro.evaluate.report_page import advise, render_report
from hpc_neuro.evaluate.summary import Results
from hpc_neuro.infer import InferConfig
from hpc_neuro.report.provenance import RunRecord
from hpc_neuro.train import TrainConfig
from tests.helpers.browser import measure_excess


def configure() -> evaluate.EvaluateConfig:
    return evaluate.EvaluateConfig(store=Path("s"), predictions=Path("p"), out=Path("o"), draws=100)


def make_results(ids: tuple[str, ...] = ("a", "b"), **methods: dict[str, float]) -> Results:
    """The same scores for every neuron; metrics that are not given are 0.5."""
    keys = [m.key for m in configure().list_metrics()]
    scores = {name: dict.fromkeys(keys, 0.5) | given for name, given in methods.items()}
    return Results(
        ids=ids,
        methods=tuple(methods),
        seeds={name: [dict.fromkeys(ids, values)] for name, values in scores.items()},
        gold={i: {"length_um": 1.0, "tips": 2, "branch_points": 3} for i in ids},
        volume_facts={i: {"Voxel size [µm]": "1 x 1 x 1"} for i in ids},
    )


def render(results: Results) -> str:
    runs = [RunRecord("evaluate", Path("o"), {"code": "0.1.0"})]
    return render_report(
        results,
        configure(),
        pictures=[],
        training=None,
        runs=runs,
        notices=[],
        reliability={},
        hits={},
        methods="Text.",
    )


@pytest.mark.parametrize(
    ("model", "otsu", "advice"),
    [
        ({"dice": 0.5}, {"dice": 0.6}, "`optim.steps` of `train`"),
        ({"dice": 0.7, "precision_4vox": 0.4}, {"f1_4vox": 0.6}, "`trace.min_branch` or `trace.min_cable`"),
        ({"dice": 0.7, "recall_4vox": 0.4}, {"f1_4vox": 0.6}, "lower `threshold` or a larger `trace.gap`"),
    ],
)
def test_the_report_says_what_to_do_when_the_baseline_wins(
    model: dict[str, float], otsu: dict[str, float], advice: str
) -> None:
    results = make_results(model=model, otsu=otsu)
    (sentence,) = advise(results, configure())
    assert "Otsu's threshold is better than the model: " in sentence
    assert "0.600 against 0.500" in sentence
    assert advice in sentence
    assert "What to do next" in render(results)


def test_the_settings_that_the_advice_names_exist() -> None:
    train = load(TrainConfig, None, ["store=s", "out=o", "cache=c", "optim.steps=7"])
    assert train.optim.steps == 7
    keys = ["model=m", "store=s", "out=o", "threshold=0.3", "trace.gap=30", "trace.min_branch=9", "trace.min_cable=50"]
    infer = load(InferConfig, None, keys)
    assert (infer.threshold, infer.trace.gap, infer.trace.min_branch, infer.trace.min_cable) == (0.3, 30, 9, 50)


def test_there_is_no_advice_where_the_model_wins_or_has_no_baseline() -> None:
    assert advise(make_results(model={"dice": 0.6}, otsu={"dice": 0.5}), configure()) == []
    assert advise(make_results(model={"dice": 0.1}), configure()) == []
    assert "What to do next" not in render(make_results(model={}, otsu={}))


def test_one_neuron_is_one_neuron() -> None:
    results = make_results(("a",), model={"dice": 0.1}, otsu={})
    page = render(results)
    assert "1 neuron of the test split" in page
    assert "1 neurons" not in page
    assert "One neuron is little evidence" in page


def test_metrics_run_down_the_page_unless_there_are_many_methods() -> None:
    few = render(make_results(model={}, otsu={}))
    assert re.search(r"<th[^>]*>Metric</th><th[^>]*>Model</th><th[^>]*>Otsu</th><th[^>]*>Gold</th>", few)
    many = render(make_results(model={}, **{f"other {i}": {} for i in range(6)}))
    assert '<button type="button">F1 @ 4 voxels\N{NO-BREAK SPACE}↑</button>' in many
    assert "<th" in many


def test_people_read_titles_and_not_keys(finished_run: Path) -> None:
    page = re.sub(
        r"<(script|style|pre)>.*?</\1>|data:image[^\"]*", "", (finished_run / "report.html").read_text(), flags=re.S
    )
    for key in ("length_um", "cable_um", "f1_4vox", "branch_points", "_no_stub", "{&#x27;", "{'"):
        assert key not in page


@pytest.mark.slow
@pytest.mark.parametrize("width", [1300, 700])
def test_tables_fit_the_screen(finished_run: Path, tmp_path: Path, width: int) -> None:
    tables, page = measure_excess((finished_run / "report.html").read_text(), width, tmp_path)
    assert max(tables) <= 0
    assert page <= 0
