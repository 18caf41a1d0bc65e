"""evaluate on predictions whose scores are known."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro import evaluate
from hpc_neuro.cli import main
from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate.summary import _escape_latex
from hpc_neuro.metrics import metric, voxel
from hpc_neuro.metrics import tree as tree_metrics
from tests.evaluate.conftest import write_predictions

REQUIRED = {
    *("dice", "cldice", "hd95_um", "precision_4vox", "recall_4vox", "f1_4vox", "esa", "dsa", "pds"),
    *("length_um", "tips", "branch_points"),
}
"""What other programs read."""


def test_metrics_json_has_what_programs_read(finished_run: Path) -> None:
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert set(metrics["volumes"]) == {"a", "b"}
    for scores in (*metrics["volumes"].values(), metrics["mean"]):
        assert set(scores) == {"model", "far", "otsu"}
        for one in scores.values():
            assert set(one) >= REQUIRED
            assert all(math.isfinite(v) for v in one.values())
    assert metrics["mean"]["model"]["dice"] == pytest.approx(
        np.mean([metrics["volumes"][i]["model"]["dice"] for i in ("a", "b")])
    )
    assert set(metrics["gold"]["a"]) == {"length_um", "tips", "branch_points"}
    assert set(metrics["definitions"]) == set(metrics["mean"]["model"])
    low, high = metrics["interval_95"]["model"]["dice"]
    assert low <= metrics["mean"]["model"]["dice"] <= high
    paired = metrics["difference"]["model - otsu"]["dice"]
    assert paired["mean"] == pytest.approx(metrics["mean"]["model"]["dice"] - metrics["mean"]["otsu"]["dice"])
    assert paired["n"] == 2


def test_scores_equal_the_metrics_on_the_same_data(finished_run: Path, store: Path) -> None:
    metrics = json.loads((finished_run / "metrics.json").read_text())
    volume = Store(store)["a"]
    mask, gold = volume.mask(Box.whole(volume.shape)) == 1, volume.tree()
    exact, near = metrics["seeds"]["model"][0]["a"], metrics["seeds"]["model"][1]["a"]
    assert (exact["dice"], exact["cldice"], exact["hd95_um"], exact["f1_4vox"]) == pytest.approx((1, 1, 0, 1))
    assert exact["esa"] == pytest.approx(0, abs=1e-5)  # the SWC file has six decimals
    assert (exact["splits"], exact["merges"], exact["mask_missed"], exact["tree_missed"]) == (0, 0, 0, 0)
    moved = np.roll(mask, 1, axis=1)
    assert near["dice"] == pytest.approx(voxel.dice(moved, mask))
    assert near["hd95_um"] == pytest.approx(voxel.hd95(moved, mask, volume.voxel_size))
    shifted = morphology.Tree(gold.points + np.array([0, 1.0, 0]), gold.radii, gold.parents, gold.types)
    assert near["esa"] == pytest.approx(tree_metrics.distances(shifted, gold)["esa"], abs=1e-5)
    assert near["length_um"] == pytest.approx(metrics["gold"]["a"]["length_um"], rel=1e-6)
    assert metrics["volumes"]["a"]["model"]["dice"] == pytest.approx((exact["dice"] + near["dice"]) / 2)
    assert near["f1_2.5um"] == pytest.approx(1.0)


def test_a_miss_stays_in_the_mean(finished_run: Path, store: Path) -> None:
    metrics = json.loads((finished_run / "metrics.json").read_text())
    miss = metrics["volumes"]["b"]["far"]
    diagonal = math.dist((0, 0, 0), Store(store)["b"].shape)
    assert (miss["dice"], miss["f1_4vox"], miss["pds"]) == (0, 0, 1)
    assert (miss["mask_missed"], miss["tree_missed"]) == (1, 1)
    assert (miss["hd95_um"], miss["esa"], miss["dsa"]) == pytest.approx((diagonal,) * 3)
    assert metrics["mean"]["far"]["esa"] > diagonal / 2


def test_tables(finished_run: Path) -> None:
    lines = list(csv.DictReader((finished_run / "metrics.csv").open()))
    assert [(x["volume"], x["method"], x["seed"]) for x in lines[:5]] == [
        ("a", "model", "0"),
        ("a", "model", "1"),
        ("a", "far", "0"),
        ("a", "otsu", "0"),
        ("a", "gold", "0"),
    ]
    assert float(lines[0]["dice"]) == 1.0
    assert lines[4]["dice"] == ""
    latex = (finished_run / "metrics.tex").read_text()
    assert latex.count(r"\\") == 4
    assert r"\textbf{" in latex
    assert _escape_latex(r"a_1 & 50 % [#1] {$x^2$} ~\ µm") == (
        r"a\_1 \& 50 \% [\#1] \{\$x\textasciicircum{}2\$\} \textasciitilde{}\textbackslash{} \textmu{}m"
    )


def test_the_report_stands_alone(finished_run: Path) -> None:
    page = (finished_run / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    for heading in ("Result", "Differences", "Neurons", "Pictures", "Learning curves", "Definitions", "Provenance"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/jpeg") == 1
    assert (finished_run / "pictures" / "b.jpg").exists() or (finished_run / "pictures" / "a.jpg").exists()


def test_every_number_has_a_definition(finished_run: Path, store: Path) -> None:
    cfg = evaluate.EvaluateConfig(store=store, predictions=store, out=finished_run, tolerance_um=2.5)
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert {m.key for m in cfg.list_metrics()} == set(metrics["volumes"]["a"]["model"])
    assert all(m.definition and "{" not in m.definition + m.title + m.key for m in cfg.list_metrics())


def test_again_is_already_complete_and_killed_goes_on(
    finished_run: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:

    cfg = load(evaluate.EvaluateConfig, finished_run / "config.yaml")
    before = (finished_run / "metrics.json").read_bytes()
    score = finished_run / "scores" / "model.0" / "a.json"
    stamp = score.stat().st_mtime_ns
    (finished_run / "report.html").unlink()
    assert evaluate.run(cfg) == 0
    assert score.stat().st_mtime_ns == stamp
    assert (finished_run / "report.html").exists()
    assert (finished_run / "metrics.json").read_bytes() == before
    with caplog.at_level("INFO", "hpc_neuro"):
        assert evaluate.run(cfg) == 0
    assert "already complete" in caplog.text


def test_blockwise_scores_equal_whole_ones(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = write_predictions(tmp_path / "p", store, shift=2.0)
    scores = []
    for limit in (1, 1 << 30):
        monkeypatch.setattr(metric, "MAX_VOXELS_IN_MEMORY", limit)
        cfg = evaluate.EvaluateConfig(
            store=store, predictions=predictions, out=tmp_path / f"{limit}", otsu=False, pictures=0, draws=100
        )
        assert evaluate.run(cfg) == 0
        scores.append(json.loads((cfg.out / "metrics.json").read_text())["volumes"])
    for volume in ("a", "b"):
        assert scores[0][volume]["model"] == pytest.approx(scores[1][volume]["model"])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda p: (p / "predictions.json").unlink(), "predictions.json does not exist; make the predictions"),
        (lambda p: (p / "predictions.json").write_text("{}"), "holds no prediction of a, b"),
        (lambda p: (p / "b.tif").unlink(), "b.tif, which does not exist"),
        (lambda p: (p / "predictions.json").write_text("{"), "is not readable JSON"),
        (
            lambda p: (p / "run.json").write_text('{"verb": "infer", "config": {"trace": {"old": 1}}}'),
            "settings of the tracer that this version does not take (old:",
        ),
        (
            lambda p: (p / "run.json").write_text('{"verb": "infer", "config": {"trace": {"threshold": 0.5}}}'),
            "was traced by a version without block, ",
        ),
    ],
)
def test_bad_predictions_are_refused_before_anything_is_written(
    spoil, sentence: str, store: Path, tmp_path: Path
) -> None:
    folder = write_predictions(tmp_path / "p", store)
    spoil(folder)
    cfg = evaluate.EvaluateConfig(store=store, predictions=folder, out=tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(sentence)):
        evaluate.run(cfg)
    assert not cfg.out.exists()


def test_other_bad_input(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_predictions(tmp_path / "p", store)
    args = ["evaluate", f"store={store}", f"predictions={folder}", f"out={tmp_path / 'out'}"]
    assert main([*args, "split=val"]) == 2
    assert "the val split" in capsys.readouterr().err
    assert main([*args, "compare={otsu: [x]}"]) == 2
    assert "this name is taken" in capsys.readouterr().err
    assert main([*args, f"train={tmp_path}"]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err
    assert main([*args, "--dry-run"]) == 0
    assert "2 neurons of the test split" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_predictions_of_another_shape_are_refused(store: Path, tmp_path: Path) -> None:
    import tifffile

    folder = write_predictions(tmp_path / "p", store)
    tifffile.imwrite(folder / "a.tif", np.zeros((20, 52, 60), np.uint8), metadata={"axes": "ZYX"})
    cfg = evaluate.EvaluateConfig(store=store, predictions=folder, out=tmp_path / "out")
    with pytest.raises(InputError, match="has shape"):
        evaluate.run(cfg)
    assert not (cfg.out / "metrics.json").exists()
