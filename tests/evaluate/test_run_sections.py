"""Sections of the report about runs: learning curves, methods, provenance."""

from __future__ import annotations

from pathlib import Path

from hpc_neuro import evaluate
from hpc_neuro.evaluate import run_sections
from hpc_neuro.evaluate.summary import Results
from hpc_neuro.report.provenance import RunRecord


def test_rates_and_memory_are_no_losses() -> None:
    facts = {"lr": 0.1, "grad_norm": 1.0, "crops_per_s": 2.0, "tokens_per_s": 300.0, "mfu": 0.4, "eta_s": 5.0}
    facts |= {"data_wait_share": 0.1, "memory_bytes": 9, "memory_bytes_by_rank": [9]}
    rows = [{"step": s, "kind": "train", "loss": 1.0, "dice": 0.5, "distill_bend": 0.1, **facts} for s in (1, 2)]
    loss, parts, *_ = run_sections.draw_curves(rows)
    for word in ("tokens", "mfu", "crops", "memory", "wait", "eta"):
        assert word not in loss
    assert ">dice<" in loss
    assert "distill bend" in parts
    assert "distill bend" not in loss


def make_results(*ids: str) -> Results:
    return Results(
        ids=ids,
        methods=("model", "otsu"),
        seeds={"model": [{}, {}], "otsu": [{}]},
        gold={},
        volume_facts={i: {"Voxel size [µm]": "1 x 0.33 x 0.33"} for i in ids},
    )


def make_runs() -> list[RunRecord]:
    train = {
        "student": {"size": "tiny", "patch": [8, 16, 16]},
        "teacher": {"model": "bundled"},
        "transfer": {"rule": "average"},
        "optim": {"steps": 250, "batch": 2, "lr": 0.002},
        "crop": {"size": [16, 96, 96]},
        "losses": [{"kind": "dice"}, {"kind": "cross_entropy"}],
        "distill": {"weight": 5.0},
        "seed": 0,
    }
    infer = {"overlap": 0.5, "flips": ["y"], "trace": {"min_branch": 5.0, "min_cable": 30.0, "gap": 20.0}}
    return [
        RunRecord("train", Path("train"), {"config": train}),
        RunRecord("infer", Path("infer"), {"config": infer}),
        RunRecord("evaluate", Path("out"), {"code": "0.1.0"}),
    ]


def test_the_methods_name_data_split_model_steps_seeds_and_tracer() -> None:
    cfg = evaluate.EvaluateConfig(store=Path("s"), predictions=Path("p"), out=Path("o"))
    text = run_sections.describe_methods(make_results("a", "b"), cfg, make_runs(), [0.5, 0.575], 3)
    for part in (
        "A 3D vision transformer (size tiny, patches of 8 x 16 x 16 voxels), initialized from the 2D teacher bundled",
        "was trained for 250 steps of 2 crops of 16 x 96 x 96 voxels (AdamW, peak learning rate 0.002, seed 0)",
        "on 3 neurons (validation included) with the loss dice + cross entropy and feature distillation",
        "predicted in windows that overlap by 50% and averaged over 2 orientations.",
        "Voxels with a probability of at least 0.5 to 0.575 are foreground.",
        "side branches shorter than 5 voxels were left out, trees without a given root need at least 30 voxels of",
        "cable and gaps of up to 20 voxels were bridged.",
        "Scores are of 2 neurons of the test split (voxels of 1 x 0.33 x 0.33 µm, z y x).",
        "Scores of 2 trained models were averaged neuron by neuron.",
        "bootstrap intervals over neurons (10,000 draws)",
        "Otsu's threshold of the raw image",
        "Software: hpc_neuro 0.1.0.",
    ):
        assert part in text
    assert "None" not in text


def test_methods_leave_out_what_was_not_recorded() -> None:
    cfg = evaluate.EvaluateConfig(store=Path("s"), predictions=Path("p"), out=Path("o"))
    runs = [RunRecord("train", Path("train"), None), RunRecord("infer", Path("infer"), {"config": {}})]
    text = run_sections.describe_methods(make_results("a"), cfg, runs, [], 0)
    assert text.startswith("Scores are of 1 neuron of the test split")
    assert "None" not in text
    assert "bootstrap" not in text


def test_records_are_shown_as_sentences_and_settings_not_as_dictionaries() -> None:
    record = {
        "command": ["hpc-neuro", "train", "out=a b"],
        "inputs": {"syn_1": "0123456789abcdef"},
        "summary": {"best_val_dice": 0.8138090349, "steps": 250, "mean": {"model": {"dice": 1}}},
        "config": {"student": {"size": "tiny", "patch": [8, 16, 16]}},
    }
    page = run_sections.render_provenance([RunRecord("train", Path("some/folder"), record)])
    assert "hpc-neuro train &#x27;out=a b&#x27;" in page
    assert "syn_1 0123456789ab" in page
    assert "best val dice 0.813809, steps 250<" in page
    assert "student:\n  size: tiny\n  patch: [8, 16, 16]" in page
    for raw in ("{&#x27;", "{&quot;", "best_val_dice"):
        assert raw not in page
