"""Preempted and robbed of a node on a real Slurm, a training ends with the weights of an undisturbed one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import InputError
from hpc_neuro.train import TrainConfig
from launch import slurm, status, submit
from launch.executors.slurm import SlurmExecutor
from launch.job_files import ROOT
from launch.site import Site, load_site
from launch.sweep import driver
from tests.slurm.conftest import steps, wait, wait_all

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]
KEYS = ["optim.steps=60", "checkpoint.every=15", "validate.every=60", "tracker.every=2", "augment.warp=0"]


def running(job: status.LaunchedJob) -> bool:
    return slurm.read_job_states().get(job.id) == "RUNNING"


def test_preempted_and_robbed_of_a_node(
    cluster: Path, site: Site, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The undisturbed one is a trial of two ranks, as sweeps send them: they must have one set of values."""
    trial, executor = tmp_path / "0000", SlurmExecutor(site, ROOT)
    trial.mkdir()
    files.write_text(trial / "train.yaml", schema.dump(tiny_train(trial / "train", *KEYS)))
    calm = {executor.submit(driver.make_trial_command(trial), trial, "attempt_1"): trial / "attempt_1"}
    low = load_site("dev", ["partition=low"])
    (hit,) = submit.submit_verb("train", tiny_train(tmp_path / "hit", *KEYS), low)
    with pytest.raises(InputError, match="already has a job"):
        submit.submit_verb("train", tiny_train(tmp_path / "hit", *KEYS), low)

    wait("some steps", lambda: steps(hit.out) >= 6)
    # three of a node's four cores: the fourth is the trial's, and the training must go
    wants = ["--partition=main", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3", "--output=/dev/null"]
    slurm.run_command("sbatch", *wants, "--wrap=true")
    wait("the end of the first start", lambda: (hit.folder / "ends.json").exists())
    wait("more steps", lambda: steps(hit.out) >= 34)
    subprocess.run([cluster / "node.sh", "kill", "node2"], check=True)
    slurm.run_command(
        "scontrol", "update", "nodename=node2", "state=down", "reason=killed"
    )  # Slurm itself takes half a minute
    wait("the second end", lambda: not running(hit))
    subprocess.run([cluster / "node.sh", "start", "node2"], check=True)
    assert wait_all([hit])[hit.id] == "done"

    ends = json.loads((hit.out / "run.json").read_text())["ends"]
    reasons = [end["reason"] for end in ends]
    assert reasons[0] == "preemption"
    assert "node failure" in reasons[1]
    assert reasons[2:] == ["finished"]
    assert all(end["put_back"] for end in ends[:2])
    executor.poll(calm)
    assert json.loads((trial / "train" / "run.json").read_text())["exit"] == 0, (trial / "attempt_1.log").read_text()
    assert "2 rank(s) x 1 crops" in (trial / "train" / "log.txt").read_text()
    weights = [out / "weights" / "last" / "model.safetensors" for out in (trial / "train", hit.out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_bug_is_not_put_back_and_each_task_has_a_gpu(
    cluster: Path, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    site = load_site("dev", ["gres=gpu:pretended", "train.tasks_per_node=2", "train.gpus_per_task=1", "train.nodes=1"])
    (bug,) = submit.submit_verb(
        "train",
        tiny_train(tmp_path / "bug"),
        site,
        command=["sh", "-c", 'echo "$LOCAL_RANK of $WORLD_SIZE on $CUDA_VISIBLE_DEVICES"; exit 9'],
    )
    assert wait_all([bug]) == {bug.id: "failed"}
    assert slurm.parse_fields(slurm.run_command("scontrol", "show", "job", "-o", bug.id))["Restarts"] == "0"
    (end,) = json.loads((bug.folder / "ends.json").read_text())
    assert "crash (exit code 9)" in end["reason"]
    assert end["put_back"] is False
    said = [path.read_text() for path in sorted((bug.folder / "logs").glob(f"{bug.id}_[01]_log.out"))]
    assert ["0 of 2 on 0,1" in said[0], "1 of 2 on 0,1" in said[1]] == [True, True]  # rank n takes the n-th of them
