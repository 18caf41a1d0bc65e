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
from launch.executors.cluster import SlurmExecutor
from launch.job_files import ROOT
from launch.site import Site, load_site
from launch.sweep import driver
from tests.slurm.conftest import count_steps, wait, wait_all

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]
KEYS = ["optim.steps=60", "checkpoint.every=15", "validate.every=60", "tracker.every=2", "augment.warp=0"]


def is_running(job: status.LaunchedJob) -> bool:
    return slurm.read_job_states().get(job.id) == "RUNNING"


def test_preempted_and_robbed_of_a_node(
    cluster: Path, site: Site, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The undisturbed one is a trial of two ranks, as sweeps submit them: they must have one set of values."""
    trial, executor = tmp_path / "0000", SlurmExecutor(site, ROOT)
    trial.mkdir()
    files.write_text(trial / "train.yaml", schema.dump(tiny_train(trial / "train", *KEYS)))
    undisturbed = {executor.submit(driver.make_trial_command(trial), trial, "attempt_1"): trial / "attempt_1"}
    low = load_site("dev", ["partition=low"])
    (job,) = submit.submit_verb("train", tiny_train(tmp_path / "hit", *KEYS), low)
    with pytest.raises(InputError, match="already has a job"):
        submit.submit_verb("train", tiny_train(tmp_path / "hit", *KEYS), low)

    wait("some steps", lambda: count_steps(job.out) >= 6)
    # three of a node's four cores: the fourth is the trial's, and the training must go
    resources = ["--partition=main", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=3", "--output=/dev/null"]
    slurm.run_command("sbatch", *resources, "--wrap=true")
    wait("the end of the first start", lambda: (job.folder / "ends.json").exists())

    wait("more steps", lambda: count_steps(job.out) >= 34)
    subprocess.run([cluster / "node.sh", "kill", "node2"], check=True)
    # Slurm itself takes half a minute to notice
    slurm.run_command("scontrol", "update", "nodename=node2", "state=down", "reason=killed")
    wait("the second end", lambda: not is_running(job))
    subprocess.run([cluster / "node.sh", "start", "node2"], check=True)
    assert wait_all([job])[job.id] == "done"

    ends = json.loads((job.out / "run.json").read_text())["ends"]
    reasons = [end["reason"] for end in ends]
    assert reasons[0] == "preemption"
    assert "node failure" in reasons[1]
    assert reasons[2:] == ["finished"]
    assert all(end["put_back"] for end in ends[:2])
    executor.poll(undisturbed)
    assert json.loads((trial / "train" / "run.json").read_text())["exit"] == 0, (trial / "attempt_1.log").read_text()
    assert "2 ranks x 1 crop x" in (trial / "train" / "log.txt").read_text()
    weights = [out / "weights" / "last" / "model.safetensors" for out in (trial / "train", job.out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_bug_is_not_put_back_and_each_task_has_its_gpu_and_cores(
    cluster: Path, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    tasks = ["train.nodes=1", "train.tasks_per_node=2", "train.gpus_per_task=1", "train.cpus_per_task=2"]
    echo = 'echo "$LOCAL_RANK of $WORLD_SIZE on $CUDA_VISIBLE_DEVICES with $SLURM_CPUS_PER_TASK cores"'
    (job,) = submit.submit_verb(
        "train",
        tiny_train(tmp_path / "bug"),
        load_site("dev", ["gres=gpu:pretended", *tasks]),
        command=["sh", "-c", f"{echo}; exit 9"],
    )
    assert wait_all([job]) == {job.id: "failed"}
    assert slurm.read_job(job.id)["Restarts"] == "0"
    (end,) = json.loads((job.folder / "ends.json").read_text())
    assert "crash (exit code 9)" in end["reason"]
    assert end["put_back"] is False
    logs = [path.read_text() for path in sorted((job.folder / "logs").glob(f"{job.id}_[01]_log.out"))]
    for rank, log in enumerate(logs):
        assert f"{rank} of 2 on 0,1 with 2 cores" in log  # rank n takes the n-th of them
    assert len(logs) == 2
