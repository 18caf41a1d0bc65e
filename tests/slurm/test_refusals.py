"""Submissions that would fail are refused before the queue, each with its reason, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.train import TrainConfig
from launch import preflight, slurm, status
from launch.site import load_site
from launch.sweep import cli
from tests.train.conftest import TINY

pytestmark = pytest.mark.slurm

# what is wrong, keys of train, keys of the site, part of the answer
CASES = [
    ("batch", ["optim.batch=1"], [], "1 crops leave some of the 2 ranks without any"),
    ("store", ["store=/nowhere/store"], [], "/nowhere/store"),
    ("space", ["checkpoint.keep=1000000000"], [], "free there"),
    ("cache", ["distill={}", "cache=/nowhere/cache"], [], "/nowhere/cache"),
    ("partition", [], ["partition=gpus"], "no partition gpus; set cluster.partition to one of main, low"),
    ("time limit", [], ["train.minutes=6000"], "above main's limit of 60"),
    ("no time", ["checkpoint.margin=300"], ["train.minutes=5"], "leave no time to work"),
    ("total time", ["optim.steps=100000000"], ["teraflops=0.001"], "are all it gets"),
    ("nodes", ["optim.batch=6"], ["train.nodes=3"], "gives at most 2"),
    ("cores", [], ["train.cpus_per_task=64"], "want 64 per node, main has 4"),
    ("GPUs", [], ["train.gpus_per_task=9"], "want 9 per node, main has 2"),
    ("memory of a node", [], ["train.memory_gb=100000"], "main has nodes of"),
    ("memory of a GPU", [], ["train.gpus_per_task=1", "gpu_memory_gb=0.001"], "a GPU here has 0.001 GB"),
    ("GPUs by type", [], ["train.gpus_per_task=1", "gres=gpu:a100"], "1 GPUs of type a100 want 1 per node, main has 0"),
    ("GPUs by number", [], ["train.gpus_per_task=2", "gres=gpu:pretended:1"], "asks for 1 GPUs per node, but 1 tasks"),
    ("container", [], ["container=apptainer exec /nowhere/image.sif"], "/nowhere/image.sif does not exist"),
    ("feature", [], ["constraint=a100"], "no node of main has a100"),
    ("interface", [], ["interface=ib9"], "there is no ib9 here"),
    ("limit of jobs", [], ["max_jobs=0"], "max_jobs"),
]


@pytest.mark.parametrize(("name", "keys", "site_keys", "message"), CASES, ids=[c[0] for c in CASES])
def test_a_bad_submission_is_refused(
    name: str,
    keys: list[str],
    site_keys: list[str],
    message: str,
    cluster: Path,
    tiny_train: Callable[..., TrainConfig],
    tmp_path: Path,
) -> None:
    before = set(slurm.read_job_states())
    with pytest.raises(ConfigError) as refused:
        stages: list[tuple[str, Any]] = [("train", tiny_train(tmp_path / "out", *keys))]
        preflight.check(stages, load_site("dev", site_keys), "slurm")
    assert message in str(refused.value)
    assert set(slurm.read_job_states()) == before
    assert not (tmp_path / "out").exists()


def test_a_job_to_wait_for_must_be_known_and_train_is_no_array(
    cluster: Path, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    stages: list[tuple[str, Any]] = [("train", tiny_train(tmp_path / "out"))]
    with pytest.raises(ConfigError) as refused:
        preflight.check(stages, load_site("dev", []), "slurm", count=4, after=["999999"])
    assert "knows no such job" in str(refused.value)
    assert "one piece of work" in str(refused.value)


def test_a_good_submission_is_told_what_it_needs_and_how_it_will_be_stopped(
    cluster: Path, tiny_train: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    cfg = tiny_train(tmp_path / "out")
    lines = preflight.check([("train", cfg)], load_site("dev", ["partition=low", "teraflops=0.01"]), "slurm")
    text = "\n".join(lines)
    assert "per rank" in text
    assert " min in all, 1 start" in text
    assert "6 steps of 2 crops" in text
    assert "told by the stop signal and has 30 s" in text
    assert not cfg.out.exists()
    with pytest.raises(InputError, match="nothing was launched"):
        status.read_jobs(cfg.out)


def test_a_sweep_is_held_against_the_cluster_before_its_first_trial(
    cluster: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = {
        "out": str(tmp_path / "study"),
        "train": {"keys": [f"store={tiny_store}", *TINY]},
        "space": {"optim.lr": {"log": [1e-3, 1e-2]}},
        "trials": 1,
    }
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(tree))
    words = [str(tmp_path / "search.yaml"), "--on", "slurm", "--cluster", "dev", "cluster.train.minutes=600"]
    assert cli.main(words) == 2
    assert "above main's limit of 60" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()
