"""Sites, chains, shares, and how Slurm's words are read; nothing here submits."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.schema import ConfigError, InputError
from launch import chain, job_end, preflight, slurm, submit
from launch.__main__ import main
from launch.executors.slurm import SlurmExecutor
from launch.job_files import ROOT, snapshot_code
from launch.site import SITE_FOLDER, Resources, Site, load_site

PIPELINE = ["prepare", "precompute", "train", "infer", "evaluate"]


@pytest.mark.parametrize("name", sorted(p.stem for p in SITE_FOLDER.glob("*.yaml")))
def test_shipped_sites_load(name: str):
    site = load_site(name, [])
    assert all(site.resources(verb).tasks >= 1 for verb in PIPELINE)


def test_a_site_is_changed_by_keys_and_an_unknown_one_names_the_others():
    site = load_site("dev", ["train.nodes=3", "partition=low"])
    assert site.resources("train").nodes == 3
    assert site.resources("train").partition == "low"
    assert site.resources("precompute").tasks == 2  # as in the file
    with pytest.raises(ConfigError, match="cpu, dev, gpu"):
        load_site("nowhere", [])
    with pytest.raises(ConfigError, match="nodess"):
        load_site("dev", ["train.nodess=3"])


def test_a_chain_fills_in_the_folders_it_hands_on(tmp_path: Path):
    keys = [f"out={tmp_path}", f"prepare.images={tmp_path}", "train.optim.steps=7"]
    stages = dict(chain.plan_chain(PIPELINE, None, keys))
    assert list(stages) == PIPELINE
    assert stages["train"].store == stages["prepare"].out == tmp_path / "store"
    assert stages["train"].cache == stages["precompute"].out
    assert stages["infer"].model == stages["train"].out
    assert stages["evaluate"].predictions == stages["infer"].out
    assert stages["train"].optim.steps == 7
    assert stages["train"].tracker.group == tmp_path.name
    mine = dict(chain.plan_chain(PIPELINE, None, [*keys, "train.tracker.group=mine"]))
    assert mine["train"].tracker.group == "mine"


@pytest.mark.parametrize(
    ("verbs", "keys", "said"),
    [
        (["train", "prepare"], ["out=x"], "order of the pipeline"),
        (["prepare", "fly"], ["out=x"], "fly cannot stand in a chain"),
        (["prepare"], [], "wants out=FOLDER"),
        (["prepare"], ["out=x", "train.seed=1"], "of no verb of the chain"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(verbs, keys, said):
    with pytest.raises(ConfigError, match=said):
        chain.plan_chain(verbs, None, keys)


@given(st.integers(0, 3000), st.integers(1, 1001))
def test_chunks_keep_every_share_once_and_fit(count: int, size: int):
    parts = [(i, count) for i in range(count)]
    cut = submit.split_into_arrays(parts, size)
    assert [p for chunk in cut for p in chunk] == parts
    assert all(0 < len(chunk) <= size for chunk in cut)
    assert len(cut) == -(-count // size)


def test_only_shares_that_did_not_end_well_are_missing(tmp_path: Path):
    for index, code in ((0, 0), (1, 1), (3, 0)):
        files.write_json(
            tmp_path / "launch" / submit.share_name(index, 5) / job_end.ENDS_FILE, [{"exit": 1}, {"exit": code}]
        )
    assert [i for i, _ in submit.find_missing_shares(tmp_path, 5)] == [1, 2, 4]


def test_training_is_no_array():
    with pytest.raises(ConfigError, match="one piece of work"):
        submit.require_divisible("train", "slurm")


def test_array_ids_are_expanded():
    assert slurm.expand_array_id("12_[0-2,5%4]") == ["12_0", "12_1", "12_2", "12_5"]
    assert slurm.expand_array_id("12_7") == ["12_7"]
    assert slurm.expand_array_id("12") == ["12"]


def test_the_poller_backs_off_while_nothing_changes_and_outlives_a_silent_controller():
    slept: list[float] = []
    answers: list[dict[str, str] | None] = [{"1": "PENDING"}] * 4 + [None, {"1": "RUNNING", "2": "RUNNING"}]

    def read() -> dict[str, str]:
        answer = answers.pop(0)
        if answer is None:
            raise InputError("no answer")
        return answer

    poller = slurm.Poller(1.0, 3.0, read, slept.append)
    seen = [poller.poll(["1"]) for _ in range(6)]
    assert seen[3] == seen[4] == {"1": "PENDING"}  # the last known, while the controller is silent
    assert seen[5] == {"1": "RUNNING"}
    assert slept == [1.0, 1.5, 2.25, 3.0, 3.0]
    assert poller.pause == 1.0
    silent = slurm.Poller(1.0, 3.0, lambda: slurm.run_command("false"), slept.append)
    with pytest.raises(InputError):
        [silent.poll(["1"]) for _ in range(9)]
    assert silent.failures == 6


@pytest.mark.parametrize(("text", "found"), [("01:00:00", 60), ("1-02:30:00", 1590), ("UNLIMITED", None)])
def test_time_limits_of_slurm(text, found):
    assert slurm.parse_minutes(text) == found


def test_gpus_of_a_node():
    assert slurm.count_gpus("gpu:a100:4(S:0-1),shard:8") == 4
    assert slurm.count_gpus("gpu:a100:4,gpu:v100:2(IDX:0)") == 6
    assert slurm.count_gpus("gpu:a100:4,gpu:v100:2", "v100") == 2
    assert slurm.count_gpus("gpu:2") == 2
    assert slurm.count_gpus("(null)") == 0


@pytest.mark.parametrize(
    ("gres", "asked"),
    [(None, {"gpus_per_node": 4}), ("gpu:a100", {"gres": "gpu:a100:4"}), ("gpu:a100:8", {"gres": "gpu:a100:8"})],
)
def test_gpus_are_asked_for_by_number_or_by_type(gres, asked):
    site = Site(gres=gres)
    assert site.gpu_options(Resources(tasks_per_node=2, gpus_per_task=2)) == asked
    assert site.gpu_options(Resources(tasks_per_node=2)) == {}


def test_a_container_stands_before_every_command(tmp_path: Path):
    site = load_site("dev", ["container=apptainer exec --nv '/shared/my image.sif'"])
    words = ("apptainer", "exec", "--nv", "/shared/my image.sif")
    cfg = submit.load_config("evaluate", None, ["store=x", "predictions=y", f"out={tmp_path}"])
    task = submit.Submission("evaluate", cfg, site, "slurm", tmp_path, ()).make_task(tmp_path, None)
    assert task.command[:6] == (*words, sys.executable, "-m")
    script = SlurmExecutor(site, tmp_path).make_script(["python", "trial"], tmp_path / "0000" / "attempt_1")
    srun = [line for line in script.splitlines() if line.startswith("srun")]
    assert [shlex.join([*words, "python", "trial"]) in part for part in srun[0].split("&&")] == [True, True]
    (fault,) = preflight.find_container_faults(site)
    assert "/shared/my image.sif does not exist" in fault


ASSOCIATIONS = "lab|normal,long|\nother|normal|20\n"  # as `sacctmgr -nP show assoc` of Slurm 22.05 writes it


@pytest.mark.parametrize(
    ("site", "fault", "most"),
    [
        (Site(), "", None),
        (Site(account="lab", qos="long"), "", None),
        (Site(account="other", qos="normal"), "", 20),
        (Site(account="theirs"), "no account theirs; yours are lab, other", None),
        (Site(account="other", qos="long"), "long is not open to account other; open are normal", 20),
        (Site(qos="debug"), "debug is not open to you; open are normal, long", None),
    ],
)
def test_accounts_are_checked_where_slurm_asks_for_them(monkeypatch, site, fault, most):
    enforced = {"AccountingStorageEnforce": "associations,limits"}
    monkeypatch.setattr(slurm, "read_configuration", lambda: enforced)
    monkeypatch.setattr(slurm, "run_command", lambda *words: ASSOCIATIONS)  # the answer of a service
    found = preflight.find_account_faults(site)
    assert len(found) == bool(fault)
    assert fault in "".join(found)
    assert preflight.find_max_jobs(site) == most
    enforced["AccountingStorageEnforce"] = "none"
    assert preflight.find_account_faults(site) == []


def test_ranks_of_a_trial_meet_and_only_train_together(tmp_path: Path):
    """Two processes as srun starts them, then the one that does the rest; the verbs only say who they are."""
    for verb in ("train", "infer"):
        (tmp_path / f"{verb}.yaml").touch()
    script = (
        "import os, sys\nfrom hpc_neuro import cli\nfrom launch.sweep import trial\n"
        "def main(words):\n    print(words[0], *(os.environ.get(k) for k in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')))\n"
        "cli.main = main\nsys.exit(trial.main(sys.argv[1:]))"
    )

    def start(rank: int, size: int) -> subprocess.Popen[str]:
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": size, "SLURM_JOB_ID": 7}
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "SUBMITIT_EXECUTOR")}
        env |= {k: str(v) for k, v in place.items()} | {"PYTHONPATH": str(ROOT)}
        words = [sys.executable, "-c", script, str(tmp_path)]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True)

    second, first = start(1, 2), start(0, 2)
    said = [child.communicate(timeout=60)[0].split() for child in (first, second)]
    port = said[0][-1]
    assert said == [["train", "0", "2", port], ["train", "1", "2", port]]
    assert start(0, 1).communicate(timeout=60)[0].split() == ["train", *["None"] * 3, "infer", *["None"] * 3]


def test_a_time_limit_that_leaves_no_time_is_a_fault(tmp_path: Path):
    site = Site(signal_seconds=120)
    cfg = submit.load_config("evaluate", None, ["store=x", "predictions=y", f"out={tmp_path}"])
    asked = load_site(None, ["evaluate.minutes=2"]).evaluate
    (fault,) = preflight.find_time_faults(cfg, asked, site)
    assert "leave no time to work" in fault
    assert preflight.find_time_faults(cfg, load_site(None, ["evaluate.minutes=4"]).evaluate, site) == []


@pytest.mark.parametrize(
    ("verb", "asked", "fault"),
    [
        ("train", Resources(nodes=2), ""),
        ("prepare", Resources(), ""),
        (
            "prepare",
            Resources(nodes=2),
            "2 would do the same; share volumes out with --array",
        ),
        ("demo", Resources(tasks_per_node=3), "3 would do the same"),
        ("infer", Resources(nodes=2), "2 processes of infer find each other by MPI"),
        ("infer", Resources(nodes=2, mpi="pmi2"), ""),
    ],
)
def test_who_may_have_several_processes(verb, asked, fault):
    found = preflight.find_task_faults(verb, asked)
    assert len(found) == bool(fault)
    assert fault in "".join(found)


def test_the_snapshot_says_what_it_is_a_copy_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    copy = snapshot_code(tmp_path / "code")
    assert (copy / "hpc_neuro" / "core" / "run_folder.py").read_bytes() == Path(run_folder.__file__).read_bytes()
    assert (copy / "CODE_VERSION").read_text().strip()
    assert snapshot_code(tmp_path / "code") == copy
    marker = copy / "launch" / "marker"
    marker.touch()  # the present code is another now
    assert snapshot_code(tmp_path / "code", keep=True) == copy
    assert "(" + (copy / "CODE_VERSION").read_text().strip() + ") is run, which is not the present" in caplog.text
    second = snapshot_code(tmp_path / "code")
    assert second == tmp_path / "code.2"
    assert not (second / "launch" / "marker").exists()
    assert marker.exists()  # what a queued job will run is never touched again
    assert snapshot_code(tmp_path / "code") == second


def test_errors_are_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["fly", "out=x", "--on", "local"]) == 2
    assert "fly" in capsys.readouterr().err
    assert main(["status", str(tmp_path)]) == 2
    assert "nothing was launched" in capsys.readouterr().err
    assert main([]) == 2


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
