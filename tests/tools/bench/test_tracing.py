"""The benchmark of tracing runs every method that is there, and each finds the neurites."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.bench import tracing


def test_methods_side_by_side(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> SimpleNamespace:  # a process of its own costs seconds of imports
        name, file = command[command.index("--one") + 1], Path(command[command.index("--file") + 1])
        facts = tracing.measure_method(name, file)
        return SimpleNamespace(stdout=json.dumps({**facts, "peak_bytes": facts["peak_bytes"] + 1}))

    monkeypatch.setattr(tracing, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "argv", ["bench_tracing", "--size", "96", "--neurites", "3", "--repeat", "1"])
    tracing.main()
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    for name in ("hpc_neuro", "scikit-image"):
        assert facts[name]["recall"] > 0.95
        assert facts[name]["precision"] > 0.95
        assert facts[name]["peak_bytes"] > 0
    ratio = facts["hpc_neuro"]["peak_bytes"] / facts["scikit-image"]["peak_bytes"]
    assert facts["peak_bytes_to_scikit-image"] == pytest.approx(ratio, rel=0.01, abs=1e-3)
    assert ("kimimaro" in facts) != any("kimimaro: not installed" in line for line in lines)
