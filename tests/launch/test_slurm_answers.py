"""How the answers of Slurm are read; no Slurm is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from launch import slurm, status
from launch.__main__ import main


def write_command(folder: Path, name: str, script: str) -> None:
    """Write a stand-in for a command of Slurm's."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("job", "tasks"),
    [
        ("12_[0-2,5%4]", ["12_0", "12_1", "12_2", "12_5"]),
        ("12_[1-3,5%2]", ["12_1", "12_2", "12_3", "12_5"]),
        ("12_[0-6:3]", ["12_0", "12_3", "12_6"]),
        ("12_7", ["12_7"]),
        ("12", ["12"]),
        ("12_[1,3,5,...%4]", ["12_1", "12_3", "12_5", "12_*"]),
        ("12_[0-999999999999]", ["12_*"]),
        ("12_[1-5:0]", ["12_*"]),
        ("12_[a-b]", ["12_*"]),
        ("12_[1-3,5-...]", ["12_1", "12_2", "12_3", "12_*"]),
        ("12_[1,3,", ["12_1", "12_3", "12_*"]),
        ("12_[...]", ["12_*"]),
    ],
)
def test_array_ids_are_expanded(job: str, tasks: list[str]):
    assert slurm.expand_array_id(job) == tasks


def test_a_task_that_squeue_left_out_of_a_shortened_list_has_the_state_of_its_array():
    states = {"12_1": "PENDING", "12_*": "PENDING", "12_0": "COMPLETED", "13": "RUNNING"}
    assert slurm.find_state(states, "12_0") == "COMPLETED"
    assert slurm.find_state(states, "12_44") == "PENDING"
    assert slurm.find_state(states, "14_1") is None
    assert slurm.find_state(states, "12") is None


def test_status_of_an_array_whose_indices_squeue_shortened(tmp_path: Path, monkeypatch, capsys):
    indices = ",".join(str(i) for i in range(1, 30, 2))
    write_command(tmp_path / "bin", "squeue", f"echo '777_[{indices},...%4]|PENDING'\necho '778|RUNNING'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    jobs = [{"id": job, "on": "slurm", "verb": "infer", "share": ""} for job in ("777_5", "777_31", "778")]
    files.write_json(tmp_path / "out" / "launch" / "jobs.json", jobs)

    assert main(["status", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "job 777_5: queued" in output
    assert "job 777_31: queued" in output
    assert "job 778: running" in output


def test_the_poller_backs_off_while_nothing_changes_and_outlives_a_silent_controller():
    pauses: list[float] = []
    answers: list[dict[str, str] | None] = [{"1": "PENDING"}] * 4 + [None, {"1": "RUNNING", "2": "RUNNING"}]

    def read() -> dict[str, str]:
        answer = answers.pop(0)
        if answer is None:
            raise InputError("no answer")
        return answer

    poller = slurm.Poller(1.0, 3.0, read, pauses.append)
    states = [poller.poll(["1"]) for _ in range(6)]
    assert states[3] == states[4] == {"1": "PENDING"}  # the last known, while the controller is silent
    assert states[5] == {"1": "RUNNING"}
    assert pauses == [1.0, 1.5, 2.25, 3.0, 3.0]
    assert poller.pause == 1.0

    answers = [{"1": "PENDING"}, *[None] * 9]
    silent = slurm.Poller(1.0, 3.0, read, pauses.append)
    with pytest.raises(InputError):
        [silent.poll(["1"]) for _ in range(9)]
    assert silent.failures == 6


def test_jobs_are_not_lost_because_slurm_never_answered(tmp_path: Path, monkeypatch, capsys):
    write_command(tmp_path / "bin", "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    files.write_json(
        tmp_path / "out" / "launch" / "jobs.json", [{"id": "7", "on": "slurm", "verb": "train", "share": ""}]
    )

    assert main(["status", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert "Unable to contact slurm controller" in captured.err
    assert "lost" not in captured.out
    # A second job must not be submitted meanwhile.
    with pytest.raises(InputError, match="Unable to contact"):
        status.require_idle(tmp_path / "out")


@pytest.mark.parametrize("answer", ["garbage", "7|RUNNING|more", "slurm_load_jobs error: x", "7|running", "7"])
def test_an_answer_of_another_form_is_shown(answer: str, tmp_path: Path, monkeypatch):
    write_command(tmp_path / "bin", "squeue", f"echo '{answer}'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with pytest.raises(InputError, match="where JOB.STATE is expected"):
        slurm.read_job_states()


@pytest.mark.parametrize(("command", "answer"), [("sinfo", "many|GB|gpu"), ("sinfo", "8|lots||"), ("sinfo", "one")])
def test_answers_about_nodes_of_another_form_are_shown(command: str, answer: str, tmp_path: Path, monkeypatch):
    write_command(tmp_path / "bin", command, f"echo '{answer}'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    read = slurm.read_node_states if "|" not in answer else slurm.read_node_kinds
    with pytest.raises(InputError, match=f"{command} answered '"):
        read("gpu")
    with pytest.raises(InputError, match="sacctmgr answered"):
        slurm.Association.parse(answer)


@pytest.mark.parametrize(("limit", "minutes"), [("01:00:00", 60), ("1-02:30:00", 1590), ("UNLIMITED", None)])
def test_time_limits_are_read_as_minutes(limit, minutes):
    assert slurm.parse_minutes(limit) == minutes


def test_gpus_of_a_node_are_counted_by_type():
    assert slurm.count_gpus("gpu:a100:4(S:0-1),shard:8") == 4
    assert slurm.count_gpus("gpu:a100:4,gpu:v100:2(IDX:0)") == 6
    assert slurm.count_gpus("gpu:a100:4,gpu:v100:2", "v100") == 2
    assert slurm.count_gpus("gpu:2") == 2
    assert slurm.count_gpus("(null)") == 0


def test_what_is_submitted_does_not_see_the_job_of_its_driver(monkeypatch):
    job = {
        "SLURM_JOB_ID": "7",
        "SBATCH_PARTITION": "low",
        "SRUN_CPUS_PER_TASK": "2",
        "PMI_RANK": "0",
        "WORLD_SIZE": "2",
    }
    for name, value in (job | {"SLURM_CONF": "/etc/slurm.conf"}).items():
        monkeypatch.setenv(name, value)
    with slurm.hide_own_job():
        assert not job.keys() & os.environ.keys()
        assert os.environ["SLURM_CONF"] == "/etc/slurm.conf"
    assert job.items() <= os.environ.items()
