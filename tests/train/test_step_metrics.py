"""Numbers said of a step: weighted means over passes, terms of no sample, speed, and the refusal of a diverged run."""

from __future__ import annotations

import math

import pytest
import torch

from hpc_neuro.train.step_metrics import DivergedError, Meter

CPU = torch.device("cpu")


def fill_meter(*passes: tuple[float, float, float], norm: float = 1.0) -> Meter:
    """One step; each pass is (loss of two samples, distillation, number of distilled samples)."""
    meter = Meter(CPU)
    meter.new_step()
    for loss, distill, count in passes:
        meter.add({"loss": torch.tensor(loss), "distill": torch.tensor(distill)}, {"loss": 2.0, "distill": count})
    meter.end_step(norm, {"step": 7, "kind": "train", "lr": 0.1})
    return meter


def test_terms_are_means_over_their_own_samples():
    row = fill_meter((1.0, 4.0, 1.0), (3.0, 8.0, 3.0)).collect_rows(4, 0, True)[0]
    assert row["loss"] == 2.0
    assert row["distill"] == 7.0
    assert (row["step"], row["lr"], row["grad_norm"]) == (7, 0.1, 1.0)


def test_a_term_of_no_sample_is_left_out_of_the_mean_and_nan_alone():
    nan = math.nan
    assert fill_meter((1.0, nan, 0.0), (3.0, 8.0, 1.0)).collect_rows(4, 0, True)[0]["distill"] == 8.0
    assert math.isnan(fill_meter((1.0, nan, 0.0)).collect_rows(4, 0, True)[0]["distill"])


def test_speed_waiting_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("hpc_neuro.train.step_metrics.time.monotonic", lambda: now[0])
    meter = Meter(CPU)
    for step in range(2):
        meter.new_step()
        with meter.measure_wait():
            now[0] += 1.0
        now[0] += 3.0
        with meter.pause():
            now[0] += 50.0
        meter.add({"loss": torch.tensor(1.0)}, {"loss": 1.0})
        meter.end_step(0.0, {"step": step})
    first, last = meter.collect_rows(3, 10, True)
    assert "crops_per_s" not in first
    assert last["crops_per_s"] == pytest.approx(6 / 8)
    assert last["data_wait_share"] == pytest.approx(0.25)
    assert last["eta_s"] == pytest.approx(40.0)
    assert last["memory_bytes"] > 1e7
    assert meter.collect_rows(3, 0, True) == []


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_ends_the_run_with_advice(loss, norm):
    with pytest.raises(DivergedError, match=r"step 7: .* optim\.lr"):
        fill_meter((loss, 1.0, 1.0), norm=norm).collect_rows(4, 0, True)


def test_a_skipped_half_precision_step_is_no_divergence():
    assert fill_meter((1.0, 1.0, 1.0), norm=math.inf).collect_rows(4, 0, check_norm=False)[0]["grad_norm"] == math.inf
