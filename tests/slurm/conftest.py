"""The development cluster for tests, one test at a time, and a training small enough for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_neuro import train
from hpc_neuro.core.schema import load
from launch import slurm, status
from launch.site import Site, load_site
from tests.helpers.tiny_store import write_store
from tests.train.conftest import TINY

CLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "dev_cluster"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the development cluster, up and for this test alone; skips with the reason where it is not up."""
    if reason := os.environ.get("HPC_NEURO_NO_SLURM"):
        pytest.skip(f"no Slurm here: {reason}")
    folder = Path(os.environ.get("HPC_NEURO_SLURM_DIR", "/run/hpc_neuro_slurm"))
    if not (folder / "pids").exists():
        pytest.skip("the development cluster is not up; `make slurm-up` brings it up (as root, on Debian)")
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slurm.read_configuration.cache_clear()
    with (folder / "test.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = set(slurm.read_job_states())
        yield CLUSTER
        states = slurm.read_job_states()
        new = [job for job, state in states.items() if job not in before and slurm.is_active(state)]
        if new:
            slurm.run_command("scancel", "--quiet", *new)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training volumes and one for validation."""
    return write_store(tmp_path_factory.mktemp("slurm") / "store", {"a": "train", "b": "train", "c": "val"})


@pytest.fixture
def tiny_train(tiny_store: Path) -> Callable[..., train.TrainConfig]:
    """tiny_train(out, *keys) -> TrainConfig."""

    def make(out: Path, *keys: str) -> train.TrainConfig:
        return load(train.TrainConfig, None, [f"store={tiny_store}", f"out={out}", *TINY, *keys])

    return make


@pytest.fixture(scope="session")
def site() -> Site:
    """configs/cluster/dev.yaml."""
    return load_site("dev", [])


def count_steps(out: Path) -> int:
    """Training steps in the metrics so far."""
    with contextlib.suppress(FileNotFoundError):
        return (out / "metrics.jsonl").read_text().count('"train"')
    return 0


def wait(subject: str, holds: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until `holds` returns True; fail the test when that takes too long."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            pytest.fail(f"waited {seconds:.0f} s for {subject}; squeue says:\n{subprocess.getoutput('squeue')}")
        time.sleep(0.2)


def wait_all(jobs: list[status.LaunchedJob], seconds: float = 400.0) -> dict[str, str]:
    """Wait until all jobs have ended; their states."""
    poller, states = slurm.Poller(0.3, 1.0), dict[str, str]()

    def have_ended() -> bool:
        states.update(status.poll_jobs(jobs, poller))
        return all(state in status.ENDED for state in states.values())

    wait("the jobs to end", have_ended, seconds)
    return states
