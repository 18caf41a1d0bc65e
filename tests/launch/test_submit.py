"""Chains, shares, and the files that a queued job will read."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.schema import ConfigError, InputError
from launch import chain, job_end, job_files, slurm, status, submit
from launch.executors.cluster import SlurmExecutor
from launch.site import Site, load_site
from tests.launch.test_slurm_answers import write_command

PIPELINE = ["prepare", "precompute", "train", "infer", "evaluate"]
SECRET = "environment={WANDB_API_KEY: hush, NCCL_DEBUG: WARN}"


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make_submission(out: Path, site: Site, on: str = "slurm") -> submit.Submission:
    cfg = submit.load_config("evaluate", None, ["store=x", "predictions=y", f"out={json.dumps(str(out))}"])
    return submit.Submission("evaluate", cfg, site, on, out / "launch" / "code", ())


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Everybody may write new files."""
    umask = os.umask(0)
    yield
    os.umask(umask)


# -------------------------------------------------------------------------------------------------- chains and shares


def test_a_chain_fills_in_the_folders_that_link_its_verbs(tmp_path: Path):
    keys = [f"out={tmp_path}", f"prepare.images={tmp_path}", "train.optim.steps=7"]
    stages = dict(chain.plan_chain(PIPELINE, None, keys))
    assert list(stages) == PIPELINE
    assert stages["train"].store == stages["prepare"].out == tmp_path / "store"
    assert stages["train"].cache == stages["precompute"].out
    assert stages["infer"].model == stages["train"].out
    assert stages["evaluate"].predictions == stages["infer"].out
    assert stages["train"].optim.steps == 7
    assert stages["train"].tracker.group == tmp_path.name
    with_group = dict(chain.plan_chain(PIPELINE, None, [*keys, "train.tracker.group=mine"]))
    assert with_group["train"].tracker.group == "mine"


@pytest.mark.parametrize(
    ("verbs", "keys", "message"),
    [
        (["train", "prepare"], ["out=x"], "order of the pipeline"),
        (["prepare", "fly"], ["out=x"], "fly cannot stand in a chain"),
        (["prepare"], [], "wants out=FOLDER"),
        (["prepare"], ["out=x", "train.seed=1"], "of no verb of the chain"),
    ],
)
def test_a_chain_that_cannot_run_is_refused(verbs, keys, message):
    with pytest.raises(ConfigError, match=message):
        chain.plan_chain(verbs, None, keys)


@given(st.integers(0, 3000), st.integers(1, 1001))
def test_arrays_hold_every_share_once_and_fit(count: int, size: int):
    shares = [(i, count) for i in range(count)]
    arrays = submit.split_into_arrays(shares, size)
    assert [share for array in arrays for share in array] == shares
    assert all(0 < len(array) <= size for array in arrays)
    assert len(arrays) == -(-count // size)


def test_only_shares_that_did_not_end_well_are_missing(tmp_path: Path):
    for index, code in ((0, 0), (1, 1), (3, 0)):
        ends = tmp_path / "launch" / submit.share_name(index, 5) / job_end.ENDS_FILE
        end = {"start": "5.0", "reason": "", "put_back": False, "at": ""}
        files.write_json(ends, [{**end, "exit": 1}, {**end, "exit": code}])
    assert [i for i, _ in submit.find_missing_shares(tmp_path, 5)] == [1, 2, 4]


def test_training_is_no_array():
    with pytest.raises(ConfigError, match="one piece of work"):
        submit.require_divisible("train", "slurm", load_site("dev", []), 2)


# --------------------------------------------------------------------------------------------------- scripts and tasks


def test_a_container_stands_before_every_command(tmp_path: Path):
    site = load_site("dev", ["container=apptainer exec --nv '/shared/my image.sif'"])
    words = ("apptainer", "exec", "--nv", "/shared/my image.sif")
    task = make_submission(tmp_path, site).make_task(tmp_path, None)
    assert task.command[:6] == (*words, sys.executable, "-m")
    script = SlurmExecutor(site, tmp_path).make_script(["python", "trial"], tmp_path / "0000" / "attempt_1")
    srun = [line for line in script.splitlines() if line.startswith("srun")]
    assert [shlex.join([*words, "python", "trial"]) in part for part in srun[0].split("&&")] == [True, True]


def test_every_srun_is_told_the_cores_of_a_task(tmp_path: Path):
    site = load_site("dev", ["train.cpus_per_task=6", "evaluate.cpus_per_task=3"])
    script = SlurmExecutor(site, tmp_path).make_script(["trial"], tmp_path / "0000" / "attempt_1")
    srun = next(line for line in script.splitlines() if line.startswith("srun"))
    assert srun.count("--cpus-per-task=6") == srun.count("srun ") == 2

    submission = make_submission(tmp_path, site)
    executor = submission._make_slurm_executor(tmp_path, tmp_path, [submission.make_task(tmp_path, None)], [])
    assert "--cpus-per-task=3" in executor.parameters["srun_args"]


@pytest.mark.parametrize("name", ["a%j", "a\nb"])
def test_a_folder_that_cannot_stand_in_a_script_is_refused_before_anything_is_written(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="out"):
        make_submission(tmp_path / name, Site()).submit([])
    with pytest.raises(ConfigError, match="out"):
        SlurmExecutor(Site(), tmp_path).submit(["true"], tmp_path / name, "attempt_1")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_is_submitted_without_the_options_of_the_drivers_own_job(tmp_path: Path, monkeypatch):
    write_command(tmp_path / "bin", "sbatch", f"env > {tmp_path}/environment\necho 4242")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = {"SLURM_CPU_BIND": "none", "SLURM_MEM_PER_CPU": "1", "SBATCH_PARTITION": "low", "SRUN_CPUS_PER_TASK": "9"}
    for name, value in options.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")

    assert SlurmExecutor(Site(), tmp_path).submit(["true"], tmp_path, "attempt_1") == "4242"
    environment = dict(line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines())
    assert not options.keys() & environment.keys()
    assert environment["SLURM_CONF"] == "/etc/slurm.conf"


# ------------------------------------------------------------------------------------------------ secrets and pickles


def test_secrets_are_in_a_file_of_the_owner_alone_and_reach_the_verb(tmp_path: Path):
    task = make_submission(tmp_path, load_site(None, [SECRET])).make_task(tmp_path, None)
    assert b"hush" not in pickle.dumps(task)
    assert task.environment["NCCL_DEBUG"] == "WARN"
    assert permissions(task.secrets_file) == 0o600
    assert task._build_environment({})["WANDB_API_KEY"] == "hush"
    assert make_submission(tmp_path, Site()).make_task(tmp_path, None).secrets_file is None


def test_compilers_keep_their_caches_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    task = make_submission(tmp_path, load_site(None, ["scratch=/scratch"])).make_task(tmp_path, None)
    folder = f"/scratch/hpc_neuro_compilers_{os.getuid()}"
    environment = task._build_environment({})
    assert environment["TRITON_CACHE_DIR"] == f"{folder}/triton"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == f"{folder}/torchinductor"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    assert task._build_environment({})["TRITON_CACHE_DIR"] == "/mine"


def test_the_script_of_a_trial_which_holds_secrets_is_read_by_its_owner_alone(tmp_path: Path, monkeypatch, open_umask):
    write_command(tmp_path / "bin", "sbatch", "echo 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    SlurmExecutor(load_site(None, [SECRET]), tmp_path).submit(["true"], tmp_path, "attempt_1")
    holding = [path for path in tmp_path.iterdir() if path.is_file() and "hush" in path.read_text()]
    assert [path.name for path in holding] == ["attempt_1.sh"]
    assert permissions(holding[0]) == 0o600


def test_a_folder_of_pickles_that_others_can_write_into_is_refused_and_the_advice_works(tmp_path: Path, open_umask):
    logs = tmp_path / "out" / "launch" / "logs"
    job_files.make_protected_folder(logs)
    assert permissions(logs) == permissions(logs.parent) == 0o755
    for folder in (logs, logs.parent):
        folder.chmod(0o775)
        with pytest.raises(InputError, match="others can write into") as refusal:
            job_files.make_protected_folder(logs)
        advice = str(refusal.value).split("`")[1]
        assert advice == f"chmod go-w {folder}"
        subprocess.run(shlex.split(advice), check=True)
        job_files.make_protected_folder(logs)


@pytest.mark.parametrize("array", [False, True])
def test_a_job_refuses_a_pickle_that_others_can_change(tmp_path: Path, array: bool):
    logs = tmp_path / "the logs"
    logs.mkdir(mode=0o755)
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "9"}
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"} if array else {}
    submitted = logs / ("7_2_submitted.pkl" if array else "9_submitted.pkl")
    script = job_files.refuse_writable_pickle(logs) + "\necho loaded"

    def run_script() -> tuple[int, str, str]:
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    # The pickle is renamed into its place after sbatch has answered.
    assert run_script() == (0, "loaded\n", "")
    submitted.touch(mode=0o644)
    assert run_script() == (0, "loaded\n", "")
    submitted.chmod(0o664)
    code, output, error = run_script()
    assert (code, output) == (2, "")
    assert f"others can write into {submitted}" in error
    submitted.chmod(0o644)
    logs.chmod(0o757)
    assert run_script()[0] == 2


@pytest.mark.slow
def test_a_local_job_runs_with_the_users_umask_but_its_pickle_is_protected(tmp_path: Path, open_umask):
    cfg = submit.load_config("evaluate", None, ["store=x", "predictions=y", f"out={tmp_path / 'out'}"])
    command = ["sh", "-c", f"umask > {tmp_path}/umask; echo $WANDB_API_KEY > {tmp_path}/secret"]
    jobs = submit.submit_verb("evaluate", cfg, load_site(None, [SECRET]), "local", command=command)
    lines: list[str] = []
    assert status.follow_jobs(jobs, slurm.Poller(0.2, 0.5), lines.append) == 0
    assert int((tmp_path / "umask").read_text(), 8) == 0
    assert (tmp_path / "secret").read_text() == "hush\n"
    pickles = list((tmp_path / "out" / "launch" / "logs").glob("*.pkl"))
    assert pickles
    assert not any(permissions(path) & 0o022 for path in pickles)
    (end,) = json.loads((tmp_path / "out" / "launch" / "ends.json").read_text())
    assert (end["reason"], end["exit"]) == ("finished", 0)
    assert "finished" in lines[-1]


def test_the_snapshot_says_what_it_is_a_copy_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    copy = job_files.snapshot_code(tmp_path / "code")
    module = Path(run_folder.__file__)
    assert (copy / module.relative_to(job_files.ROOT)).read_bytes() == module.read_bytes()
    assert (copy / "CODE_VERSION").read_text().strip()
    assert job_files.snapshot_code(tmp_path / "code") == copy

    marker = copy / "launch" / "marker"
    marker.touch()  # the present code is another now
    assert job_files.snapshot_code(tmp_path / "code", keep=True) == copy
    version = (copy / "CODE_VERSION").read_text().strip()
    assert f"({version}) is run, which is not the present" in caplog.text

    second = job_files.snapshot_code(tmp_path / "code")
    assert second == tmp_path / "code.2"
    assert not (second / "launch" / "marker").exists()
    assert marker.exists()  # what a queued job will run is never touched again
    assert job_files.snapshot_code(tmp_path / "code") == second
