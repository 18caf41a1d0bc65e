"""The planned memory is what is then held, and the arithmetic of stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_neuro.train import plan
from hpc_neuro.train.ledger import ideal

REPO = Path(__file__).resolve().parents[2]


def test_each_stage_shares_out_one_kind_more():
    """The known figures of mixed precision Adam: 16 bytes per parameter, of which 12 + 2 + 2 are shared in turn."""
    held = [ideal(1000, 10, stage, 2) for stage in range(4)]
    assert [h.total for h in held] == [16000, 4000 + 1200, 2000 + 1400, 1600]


def test_the_lowest_stage_that_fits_is_named():
    rows = plan.stages(10**6, 0, 4, 2, 1000, 1024, offload=False)
    totals = [row.total for row in rows]
    assert totals == sorted(totals, reverse=True)
    assert "the lowest stage that fits a GPU of 80.0 GB is 0" in list(plan.lines(rows, 80e9))[-1]
    assert "no stage fits" in list(plan.lines(rows, 1e6))[-1]
    assert len(list(plan.lines(rows, None))) == 5
    assert plan.stages(10**6, 10**6, 4, 2, 0, 0, offload=True)[2].held.optimizer == 0


@pytest.mark.slow
def test_two_ranks_hold_their_even_share():
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.bench_zero", "--ranks", "2"]
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worst"] < 0.05
    assert [row["stage"] for row in found["stages"]] == [0, 1, 2, 3]
