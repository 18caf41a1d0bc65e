"""Every verb is killed at random moments, with a second process beside it; the results are those of quiet runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.kill_verbs import drill


@pytest.mark.slow
@pytest.mark.timeout(36_000)
def test_killed_verbs_and_second_processes_leave_the_results_of_quiet_runs(tmp_path: Path) -> None:
    facts = drill(tmp_path, kills=int(os.environ.get("HPC_NEURO_DRILL", "6")))
    assert facts.differs == []
    assert facts.kills
    assert not list(tmp_path.glob("killed/*/run.lock"))
    assert not list(tmp_path.glob("killed/**/.*.part"))
