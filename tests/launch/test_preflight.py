"""What is refused before the queue; nothing here asks a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import preflight, slurm, submit
from launch.__main__ import main
from launch.job_files import ROOT
from launch.site import Resources, Site, load_site

ASSOCIATIONS = "lab|normal,long|\nother|normal|20\n"  # as `sacctmgr -nP show assoc` of Slurm 22.05 writes it


@pytest.mark.parametrize(
    ("site", "fault", "max_jobs"),
    [
        (Site(), "", None),
        (Site(account="lab", qos="long"), "", None),
        (Site(account="other", qos="normal"), "", 20),
        (Site(account="theirs"), "no account theirs; yours are lab, other", None),
        (Site(account="other", qos="long"), "long is not open to account other; open are normal", 20),
        (Site(qos="debug"), "debug is not open to you; open are normal, long", None),
    ],
)
def test_accounts_are_checked_where_slurm_enforces_them(monkeypatch, site, fault, max_jobs):
    configuration = {"AccountingStorageEnforce": "associations,limits"}
    monkeypatch.setattr(slurm, "read_configuration", lambda: configuration)
    monkeypatch.setattr(slurm, "run_command", lambda *words: ASSOCIATIONS)  # the answer of a service
    faults = preflight.find_account_faults(site)
    assert len(faults) == bool(fault)
    assert fault in "".join(faults)
    assert preflight.find_max_jobs(site) == max_jobs
    configuration["AccountingStorageEnforce"] = "none"
    assert preflight.find_account_faults(site) == []


def test_a_time_limit_that_leaves_no_time_is_a_fault(tmp_path: Path):
    site = Site(signal_seconds=120)
    cfg = submit.load_config("evaluate", None, ["store=x", "predictions=y", f"out={tmp_path}"])
    short = load_site(None, ["evaluate.minutes=2"]).resources("evaluate")
    (fault,) = preflight.find_time_faults(cfg, short, site)
    assert "leave no time to work" in fault
    long = load_site(None, ["evaluate.minutes=4"]).resources("evaluate")
    assert preflight.find_time_faults(cfg, long, site) == []


@pytest.mark.parametrize(
    ("verb", "resources", "fault"),
    [
        ("train", Resources(nodes=2), ""),
        ("prepare", Resources(), ""),
        ("prepare", Resources(nodes=2), "2 would do the same; share volumes out with --array"),
        ("demo", Resources(tasks_per_node=3), "3 would do the same"),
        ("infer", Resources(nodes=2), "2 processes of infer find each other by MPI"),
        ("infer", Resources(nodes=2, mpi="pmi2"), ""),
    ],
)
def test_which_verbs_may_have_several_processes(verb, resources, fault):
    faults = preflight.find_task_faults(verb, resources)
    assert len(faults) == bool(fault)
    assert fault in "".join(faults)


def test_an_image_that_does_not_exist_is_a_fault():
    site = load_site("dev", ["container=apptainer exec --nv '/shared/my image.sif'"])
    (fault,) = preflight.find_container_faults(site)
    assert "/shared/my image.sif does not exist" in fault


@pytest.mark.parametrize(
    ("name", "advice"), [("a%j", "choose a name without it"), ('"a\\nb"', "no text can hold; give another folder")]
)
def test_a_run_folder_that_cannot_stand_in_a_script_is_refused_with_one_sentence(
    tmp_path: Path, capsys, name: str, advice: str
):
    out = f'"{tmp_path}/{name.strip(chr(34))}"'
    keys = ["store=x", "predictions=y", f"out={out}"]
    assert main(["evaluate", *keys, "--on", "local", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert f"{str(tmp_path)!r}"[:-1] in error
    assert advice in error
    assert list(tmp_path.iterdir()) == []


def test_a_check_in_a_fork_does_not_wait_for_threads_that_were_not_forked():
    script = (
        "import sys, torch\nfrom launch import forecast\n"
        "def work():\n    torch.nn.functional.conv3d(torch.zeros(1, 8, 32, 64, 64), torch.zeros(8, 8, 3, 3, 3))\n"
        "    return ['done']\n"
        "torch.set_num_threads(4)\nwork()\nprint(forecast.run_limited(60, work, 1))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "([], ['done'])\n"


def test_errors_are_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["fly", "out=x", "--on", "local"]) == 2
    assert "fly" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "nothing was launched" in capsys.readouterr().err
    assert main(["infer", "out=x", "--on", "local", "--array", "0"]) == 2
    assert "--array 0: give the number of tasks" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["cluster.partition=x"]) == 2
