"""A sweep on the real cluster, with stand-in trials as Slurm jobs: early stopping, kills, and a new driver."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from hpc_neuro.core.schema import InputError
from hpc_neuro.search import trial
from launch import slurm
from launch.executors.cluster import SlurmExecutor
from launch.job_files import ROOT
from launch.site import Site, load_site
from launch.sweep.driver import SweepDriver
from tests.helpers.sweep_runs import STEPS, make_search, make_stand_in_command, read_events, step_until
from tests.slurm.conftest import wait

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def small() -> Site:
    """configs/cluster/dev.yaml with one task per trial."""
    return load_site("dev", ["train.nodes=1"])


def make_driver(cfg, site: Site, seconds: float) -> SweepDriver:
    def write_trial(folder, number, point) -> None:
        tree = {"lr": 1e-3, "steps": STEPS, "every": 2, "seconds": seconds, **point}
        (folder / "train.yaml").write_text(yaml.safe_dump(tree))

    return SweepDriver(cfg, STEPS, write_trial, SlurmExecutor(site, ROOT), make_stand_in_command)


def test_trials_are_jobs_that_are_stopped_killed_sent_again_and_taken_over(cluster, small, tmp_path):
    cfg = make_search(
        tmp_path / "study",
        space={"lr": {"choice": [1e-3, 1e-5]}, "seed": {"choice": [0, 1]}},
        sampler={"kind": "grid"},
        trials=None,
        asha={"first": 4, "factor": 2},
        concurrent=2,
        poll=0.3,
    )
    first = make_driver(cfg, small, 6)
    first.step()
    assert len(slurm.read_job_states()) >= 2
    victim = first.trials[0]
    step_until(first, lambda: victim.step >= 2)
    subprocess.run(["scancel", "--signal=KILL", "--full", str(victim.job)], check=True)
    forgotten = first.trials[1].job
    first.trials[1].attempts[-1].job = None  # the driver is killed between submission and note
    first.trials[1].save()
    second = make_driver(cfg, small, 6)
    assert second.trials[1].job == forgotten
    assert second.run()
    ended = trial.load_trials(cfg.out)
    assert {t.state for t in ended if t.values["lr"] == 1e-3} == {"done"}
    assert {t.state for t in ended if t.values["lr"] == 1e-5} == {"pruned"}
    assert len(ended[0].attempts) >= 2
    assert all(set(events) == {"begins"} for events in read_events(cfg).values()), "two were at work in one folder"
    jobs = [a.job for t in ended for a in t.attempts]
    assert len(set(jobs)) == len(jobs) >= 5, "a job was counted twice"
    wait(
        "all jobs to be gone",
        lambda: not any(slurm.is_active(s) for j, s in slurm.read_job_states().items() if j in jobs),
        60,
    )


def test_a_refused_submission_names_what_slurm_said(cluster, tmp_path):
    executor = SlurmExecutor(load_site("dev", ["train.nodes=1", "partition=nowhere"]), ROOT)
    with pytest.raises(InputError, match="partition"):
        executor.submit([sys.executable, "-c", "pass"], tmp_path, "attempt_1")
