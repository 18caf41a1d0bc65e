"""The benchmark of the tubes compares equals, and prints what it measured."""

from __future__ import annotations

import argparse
import json
import sys

import pytest
import torch

from tools.bench import tubular


@pytest.mark.parametrize("taps", [3, 5])
def test_both_methods_give_the_same_values_and_gradients(taps: int) -> None:
    results = {}
    for method in tubular.METHODS:
        inputs = [t.detach().double().requires_grad_() for t in tubular.make_inputs((4, 5, 6), 3, taps, "cpu")]
        out = tubular.METHODS[method](*inputs)
        out.square().sum().backward()
        results[method] = [out, *(t.grad for t in inputs)]
    for a, b in zip(results["tubes"], results["all_taps"], strict=True):
        torch.testing.assert_close(a, b)


def test_the_last_line_is_json_with_ratios_and_peaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tubular, "SMALL", (6, 7, 8))
    monkeypatch.setattr(tubular, "LARGE", (8, 8, 8))
    peaks = {"tubes": 1 << 20, "all_taps": 1 << 22}  # measured in processes of their own, see the test below
    monkeypatch.setattr(tubular, "measure_peak_alone", lambda method, shape, args: (peaks[method], 0.5))
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--channels", "4", "--taps", "3", "--repeats", "1"])
    tubular.main()
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["largest_difference"] < 1e-4
    assert report["time_ratio"] == pytest.approx(report["seconds"]["tubes"] / report["seconds"]["all_taps"])
    assert report["peak_bytes"] == peaks
    assert report["memory_ratio"] == 0.25
    assert report["large"] == {"shape": [8, 8, 8], "peak_bytes": 1 << 20, "seconds": 0.5}
    assert any(line.startswith("6x7x8") and f"{report['seconds']['tubes']:.3f}" in line for line in lines)


@pytest.mark.slow
def test_at_full_size_less_memory_than_the_taps_alone_would_take() -> None:
    args = argparse.Namespace(threads=1, channels=32, taps=9, device="cpu")
    size, _ = tubular.measure_peak_alone("tubes", tubular.SMALL, args)
    taps = 9 * 32 * 48 * 64 * 56 * 4
    assert 0 < size < taps
