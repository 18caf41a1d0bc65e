"""The drill of sweeps in small, with real SIGKILLs of trials and of the driver's process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO


@pytest.mark.slow
def test_every_trial_is_accounted_for_after_kills_of_trials_and_driver(tmp_path: Path) -> None:
    drill = REPO / "tests" / "faults" / "sweep_drill.py"
    command = [sys.executable, str(drill), str(tmp_path), "--trials", "10", "--seconds", "1"]
    done = subprocess.run(command, cwd=REPO, timeout=280, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["every_trial_accounted_for"]
    assert result["done"] + result["pruned"] == result["trials"] == 10
    assert (result["driver_killed"], result["two_in_one_folder"]) == (2, 0)
    assert result["jobs"] == 10 + result["trials_sent_again"]
    assert result["done"] >= 1
