"""Interrupted in two ways on a real Slurm, a training ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.train import TrainConfig
from launch import jobs, slurm
from launch.site import Site
from tests.slurm.conftest import steps, wait, wait_all

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]
KEYS = ["optim.steps=100", "checkpoint.every=25", "validate.every=100", "tracker.every=5", "augment.warp=0"]


def running(job: jobs.Job) -> bool:
    return slurm.states().get(job.id) == "RUNNING"


def test_a_signal_and_a_node_failure(
    cluster: Path, site: Site, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    calm = jobs.submit("train", tiny_train(tmp_path / "calm", *KEYS), site)
    code = tmp_path / "calm" / "launch" / "code"
    (hit,) = jobs.submit("train", tiny_train(tmp_path / "hit", *KEYS), site, code=code)
    with pytest.raises(jobs.InputError, match="already has a job"):
        jobs.submit("train", tiny_train(tmp_path / "hit", *KEYS), site, code=code)

    wait("some steps", lambda: steps(hit.out) >= 20)
    subprocess.run(["scancel", "--signal=USR2", hit.id], check=True)
    wait("the end of the first start", lambda: (hit.folder / "ends.json").exists())
    wait("the second start", lambda: running(hit))
    wait("more steps", lambda: steps(hit.out) >= 60)
    subprocess.run([cluster / "node.sh", "kill", "node2"], check=True)
    wait("the second end", lambda: not running(hit))  # seen by us or by Slurm, whoever is first
    subprocess.run([cluster / "node.sh", "start", "node2"], check=True)
    assert wait_all([hit])[hit.id] == "done"
    assert wait_all(calm)[calm[0].id] in ("done", "failed")  # the node it also ran on was killed

    ends = json.loads((hit.out / "run.json").read_text())["ends"]
    reasons = [end["reason"] for end in ends]
    assert "SIGUSR2" in reasons[0]
    assert "node failure" in reasons[1]
    assert reasons[2:] == ["finished"]
    assert all(end["put_back"] for end in ends[:2])
    weights = [p / "weights" / "last" / "model.safetensors" for p in (calm[0].out, hit.out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_bug_is_not_put_back(
    cluster: Path, site: Site, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    (bug,) = jobs.submit("train", tiny_train(tmp_path / "bug"), site, command=["sh", "-c", "exit 9"])
    assert wait_all([bug]) == {bug.id: "failed"}
    assert slurm.fields(slurm.ask("scontrol", "show", "job", "-o", bug.id))["Restarts"] == "0"
    (end,) = json.loads((bug.folder / "ends.json").read_text())
    assert "crash (exit code 9)" in end["reason"]
    assert end["put_back"] is False
