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
from hpc_neuro.data import swc
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate import reliability
from hpc_neuro.evaluate.metric_rows import rows
from hpc_neuro.evaluate.predictions import Predictions
from hpc_neuro.evaluate.summary import _tex
from hpc_neuro.metrics import tree as tree_metrics
from hpc_neuro.metrics import voxel
from hpc_neuro.metrics.calibration import Bin
from tests.evaluate.conftest import write_predictions

REQUIRED = {
    *("dice", "cldice", "hd95_um", "precision_4vox", "recall_4vox", "f1_4vox", "esa", "dsa", "pds"),
    *("length_um", "tips", "branch_points"),
}  # architecture 4b


@pytest.fixture(scope="module")
def done(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything: two seeds of the model, another model, a training run, a tolerance in um."""
    folder = tmp_path_factory.mktemp("done")
    exact = write_predictions(folder / "exact", store)
    near = write_predictions(folder / "near", store, shift=1.0)
    far = write_predictions(folder / "far", store, shift=6.0, nothing=("b",))
    train = folder / "train"
    train.mkdir()
    steps = [{"step": i, "kind": "train", "lr": 1e-3, "loss": 1 / (i + 1), "dice": None} for i in range(5)]
    (train / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*steps, {"step": 5, "kind": "val", "dice": 0.5}])))
    cfg = evaluate.EvaluateConfig(
        store=store,
        predictions=exact,
        out=folder / "out",
        compare={"model": [near], "far": [far]},
        tolerance_um=2.5,
        train=train,
        draws=200,
        pictures=1,
    )
    assert evaluate.run(cfg) == 0
    return cfg.out


def test_metrics_json_has_what_programs_read(done: Path) -> None:
    found = json.loads((done / "metrics.json").read_text())
    assert set(found["volumes"]) == {"a", "b"}
    for scores in (*found["volumes"].values(), found["mean"]):
        assert set(scores) == {"model", "far", "otsu"}
        for one in scores.values():
            assert set(one) >= REQUIRED
            assert all(math.isfinite(v) for v in one.values())
    assert found["mean"]["model"]["dice"] == pytest.approx(
        np.mean([found["volumes"][i]["model"]["dice"] for i in ("a", "b")])
    )
    assert set(found["gold"]["a"]) == {"length_um", "tips", "branch_points"}
    assert set(found["definitions"]) == set(found["mean"]["model"])
    low, high = found["interval_95"]["model"]["dice"]
    assert low <= found["mean"]["model"]["dice"] <= high
    paired = found["difference"]["model - otsu"]["dice"]
    assert paired["mean"] == pytest.approx(found["mean"]["model"]["dice"] - found["mean"]["otsu"]["dice"])
    assert paired["n"] == 2


def test_the_confidence_is_held_against_gold(done: Path) -> None:
    """The perfect model is right throughout, and says less than that."""
    found = json.loads((done / "metrics.json").read_text())["confidence"]
    assert [(b["low"], b["right"]) for b in found["bins"]] == [(0.7, 1.0)]
    assert found["bins"][0]["cable"] > 10
    assert found["error"] == pytest.approx(1 - found["bins"][0]["confidence"])
    page = (done / "report.html").read_text()
    assert "0.7 to 0.8" in page
    assert "Confidence against truth" not in page  # one bin is no curve
    two = [Bin(low=low, high=low + 0.1, cable=9.0, confidence=low, right=low) for low in (0.7, 0.8)]
    cfg = load(evaluate.EvaluateConfig, None, ["store=a", "predictions=b", "out=c"])
    assert "Confidence against truth" in reliability.section({"confidence": two}, cfg)


def test_the_second_look_in_mirrors_is_held_against_gold(store: Path, tmp_path: Path) -> None:
    folder = write_predictions(tmp_path / "p", store)
    index = json.loads((folder / "predictions.json").read_text())
    cfg = load(evaluate.EvaluateConfig, None, [f"store={store}", f"predictions={folder}", "out=c"])

    def tell(name: str, header: str, row: str, more: int = 0) -> None:
        nodes = len(swc.read(folder / index[name]["swc_voxel"])) + more
        (folder / f"{name}.csv").write_text("\n".join([header, *[row] * nodes]))
        index[name]["confidence"] = f"{name}.csv"
        (folder / "predictions.json").write_text(json.dumps(index))

    def measured() -> dict[str, list[Bin]]:
        return reliability.measured(cfg, Store(store), ("a", "b"), Predictions(folder, ("a", "b"), cfg))

    assert set(measured()) == {"confidence"}
    header = "node,confidence,disagreement,mean"
    tell("a", header, "1,0.78,0.25,0.95")
    tell("b", "node,confidence", "1,0.78")
    assert set(measured()) == {"confidence"}  # one volume's would not be comparable
    tell("b", header, "1,0.78,0.25,0.85")
    found = measured()
    assert [(b.low, b.right) for b in found["mean"]] == [(0.8, 1.0), (0.9, 1.0)]
    assert [(b.low, b.confidence) for b in found["agreement"]] == [(0.7, pytest.approx(0.75))]
    assert sum(b.cable for b in found["mean"]) == pytest.approx(sum(b.cable for b in found["confidence"]))
    told = reliability.as_json(found)
    assert set(told) == {"bins", "error", "views"}
    assert told["views"]["agreement"]["error"] == pytest.approx(0.25)
    assert "Mean of all views" in reliability.section(found, cfg)
    tell("b", header, "1,0.78,0.25,0.85", more=1)
    with pytest.raises(InputError, match="but the tree has"):
        measured()
    tell("b", header, "1,0.78,often,0.85")
    with pytest.raises(InputError, match="cannot be read as confidences"):
        measured()


def test_scores_equal_the_metrics_on_the_same_data(done: Path, store: Path) -> None:
    found = json.loads((done / "metrics.json").read_text())
    volume = Store(store)["a"]
    mask, gold = volume.mask(Box.whole(volume.shape)) == 1, volume.tree()
    exact, near = found["seeds"]["model"][0]["a"], found["seeds"]["model"][1]["a"]
    assert (exact["dice"], exact["cldice"], exact["hd95_um"], exact["f1_4vox"]) == pytest.approx((1, 1, 0, 1))
    assert exact["esa"] == pytest.approx(0, abs=1e-5)  # the SWC file has six decimals
    assert (exact["splits"], exact["merges"], exact["mask_missed"], exact["tree_missed"]) == (0, 0, 0, 0)
    moved = np.roll(mask, 1, axis=1)
    assert near["dice"] == pytest.approx(voxel.dice(moved, mask))
    assert near["hd95_um"] == pytest.approx(voxel.hd95(moved, mask, volume.voxel_size))
    shifted = morphology.Tree(gold.points + np.array([0, 1.0, 0]), gold.radii, gold.parents, gold.types)
    assert near["esa"] == pytest.approx(tree_metrics.distances(shifted, gold)["esa"], abs=1e-5)
    assert near["length_um"] == pytest.approx(found["gold"]["a"]["length_um"], rel=1e-6)
    assert found["volumes"]["a"]["model"]["dice"] == pytest.approx((exact["dice"] + near["dice"]) / 2)
    assert near["f1_2.5um"] == pytest.approx(1.0)


def test_a_miss_stays_in_the_mean(done: Path, store: Path) -> None:
    found = json.loads((done / "metrics.json").read_text())
    miss = found["volumes"]["b"]["far"]
    diagonal = math.dist((0, 0, 0), Store(store)["b"].shape)
    assert (miss["dice"], miss["f1_4vox"], miss["pds"]) == (0, 0, 1)
    assert (miss["mask_missed"], miss["tree_missed"]) == (1, 1)
    assert (miss["hd95_um"], miss["esa"], miss["dsa"]) == pytest.approx((diagonal,) * 3)
    assert found["mean"]["far"]["esa"] > diagonal / 2


def test_tables(done: Path) -> None:
    lines = list(csv.DictReader((done / "metrics.csv").open()))
    assert [(x["volume"], x["method"], x["seed"]) for x in lines[:5]] == [
        ("a", "model", "0"),
        ("a", "model", "1"),
        ("a", "far", "0"),
        ("a", "otsu", "0"),
        ("a", "gold", "0"),
    ]
    assert float(lines[0]["dice"]) == 1.0
    assert lines[4]["dice"] == ""
    latex = (done / "metrics.tex").read_text()
    assert latex.count(r"\\") == 4
    assert r"\textbf{" in latex
    assert _tex(r"a_1 & 50 % [#1] {$x^2$} ~\ µm") == (
        r"a\_1 \& 50 \% [\#1] \{\$x\textasciicircum{}2\$\} \textasciitilde{}\textbackslash{} \textmu{}m"
    )


def test_the_report_stands_alone(done: Path) -> None:
    page = (done / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    for heading in ("Result", "Differences", "Neurons", "Pictures", "Learning curves", "Definitions", "Provenance"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("data:image/jpeg") == 1
    assert (done / "pictures" / "b.jpg").exists() or (done / "pictures" / "a.jpg").exists()


def test_every_number_has_a_definition(done: Path, store: Path) -> None:
    cfg = evaluate.EvaluateConfig(store=store, predictions=store, out=done, tolerance_um=2.5)
    found = json.loads((done / "metrics.json").read_text())
    assert {r.key for r in rows(cfg)} == set(found["volumes"]["a"]["model"])
    assert all(r.definition and "{" not in r.definition + r.title + r.key for r in rows(cfg))


def test_again_is_already_complete_and_killed_goes_on(
    done: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from hpc_neuro.core.schema import load

    cfg = load(evaluate.EvaluateConfig, done / "config.yaml")
    before = (done / "metrics.json").read_bytes()
    score = done / "scores" / "model.0" / "a.json"
    stamp = score.stat().st_mtime_ns
    (done / "report.html").unlink()
    assert evaluate.run(cfg) == 0
    assert score.stat().st_mtime_ns == stamp
    assert (done / "report.html").exists()
    assert (done / "metrics.json").read_bytes() == before
    with caplog.at_level("INFO", "hpc_neuro"):
        assert evaluate.run(cfg) == 0
    assert "already complete" in caplog.text


def test_streamed_scores_equal_whole_ones(done: Path, store: Path, tmp_path: Path) -> None:
    predictions = write_predictions(tmp_path / "p", store, shift=2.0)
    scores = []
    for whole in (1, 1 << 30):
        cfg = evaluate.EvaluateConfig(
            store=store,
            predictions=predictions,
            out=tmp_path / f"{whole}",
            whole=whole,
            otsu=False,
            pictures=0,
            draws=100,
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
            lambda p: (p / "run.json").write_text('{"config": {"trace": {"old": 1}}}'),
            "settings of the tracer that this version does not take (old:",
        ),
        (
            lambda p: (p / "run.json").write_text('{"config": {"trace": {"threshold": 0.5}}}'),
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
