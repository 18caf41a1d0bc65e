"""Several ranks on one machine: they share its cores, and a silent one is named while the others end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_neuro import infer
from tests.helpers.journal import list_begun
from tests.helpers.small_volumes import KEYS, configure, probability


@pytest.mark.mpi
def test_a_silent_rank_is_named_and_the_run_goes_on_where_it_was(
    model: Path, store: Path, finished_run: Path, tmp_path: Path
) -> None:
    """It is stopped in a block, not killed: MPI would wait for it for ever."""
    keys = [f"model={model}", f"out={tmp_path / 'o'}", f"store={store}", *KEYS]
    start = [
        str(Path(sys.executable).with_name("mpiexec")),
        "-n",
        "2",
        sys.executable,
        "-m",
        "tests.helpers.silent_infer",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [*start, *keys, "silence=1.5"], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert ended.returncode != 0
    assert ended.stderr.count("has been silent for") == 1, ended.stderr
    assert "rank 1 (" in ended.stderr
    assert "The same command goes on" in ended.stderr
    threads = [int(n) for n in re.findall(r"(\d+) threads", ended.stdout)]
    assert len(threads) == 2
    cores = os.cpu_count() or 1
    assert sum(threads) <= max(cores, 2) or len(os.sched_getaffinity(0)) < cores  # then the launcher has bound them
    assert list_begun(tmp_path / "o", "a")  # the block it was at
    assert infer.run(configure(model, tmp_path / "o", f"store={store}")) == 0
    assert (probability(tmp_path / "o", "a") == probability(finished_run, "a")).all()
    assert not list((tmp_path / "o").glob(".*"))
