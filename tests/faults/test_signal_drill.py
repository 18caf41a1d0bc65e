"""Warnings at random moments are no deaths, and the results are those of quiet runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.signal_drill import drill

WARNINGS = int(os.environ.get("HPC_NEURO_WARNINGS", "4"))
"""Warnings over all verbs; the drill of a release takes 100."""


@pytest.mark.slow
@pytest.mark.timeout(600 + 30 * WARNINGS)
def test_warned_verbs_leave_the_bytes_of_quiet_runs_and_no_death(tmp_path: Path) -> None:
    facts = drill(tmp_path, WARNINGS)
    assert facts["deaths"] == facts["parts"] == 0, facts
    assert facts["differs"] == []
    assert set(facts["codes"]) <= {0, 75}
    assert sum(facts["warnings"].values()) >= WARNINGS
