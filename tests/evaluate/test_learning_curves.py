"""Learning curves: what is drawn as a loss is one."""

from __future__ import annotations

from hpc_neuro.evaluate import learning_curves


def test_rates_and_memory_are_no_losses() -> None:
    facts = {"lr": 0.1, "grad_norm": 1.0, "crops_per_s": 2.0, "tokens_per_s": 300.0, "mfu": 0.4, "eta_s": 5.0}
    facts |= {"data_wait_share": 0.1, "memory_bytes": 9, "memory_bytes_by_rank": [9]}
    rows = [{"step": s, "kind": "train", "loss": 1.0, "dice": 0.5, "distill_bend": 0.1, **facts} for s in (1, 2)]
    loss, parts, *_ = learning_curves.draw_curves(rows)
    for word in ("tokens", "mfu", "crops", "memory", "wait", "eta"):
        assert word not in loss
    assert ">dice<" in loss
    assert "distill bend" in parts
    assert "distill bend" not in loss
