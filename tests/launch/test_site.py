"""Sites: their keys, the options of sbatch and srun that they become, and texts that must not reach a script."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import LAUNCHABLE
from launch.site import SITE_FOLDER, Resources, Site, is_secret, load_site, require_plain_path, split_secrets
from tests.conftest import REPO


@pytest.mark.parametrize("name", sorted(p.stem for p in SITE_FOLDER.glob("*.yaml")))
def test_shipped_sites_load(name: str):
    site = load_site(name, [])
    assert all(site.resources(verb).tasks >= 1 for verb in LAUNCHABLE)


def test_a_site_is_changed_by_keys_and_an_unknown_one_names_the_others():
    site = load_site("dev", ["train.nodes=3", "partition=low"])
    assert site.resources("train").nodes == 3
    assert site.resources("train").partition == "low"
    assert site.resources("precompute").tasks == 2  # as in the file
    with pytest.raises(ConfigError, match="cpu, dev, gpu"):
        load_site("nowhere", [])
    with pytest.raises(ConfigError, match="nodess"):
        load_site("dev", ["train.nodess=3"])


def test_every_verb_that_can_be_launched_has_a_section_of_resources():
    for verb in LAUNCHABLE:
        assert load_site(None, [f"{verb}.nodes=7"]).resources(verb) == Resources(nodes=7)


@pytest.mark.parametrize(
    ("gres", "options"),
    [(None, {"gpus_per_node": 4}), ("gpu:a100", {"gres": "gpu:a100:4"}), ("gpu:a100:8", {"gres": "gpu:a100:8"})],
)
def test_gpus_are_requested_by_number_or_by_type(gres, options):
    site = Site(gres=gres)
    assert site.gpu_options(Resources(tasks_per_node=2, gpus_per_task=2)) == options
    assert site.gpu_options(Resources(tasks_per_node=2)) == {}


def test_srun_is_told_the_cores_of_a_task():
    assert "--cpus-per-task=6" in Site().srun_options(Resources(cpus_per_task=6))


def test_the_plain_batch_scripts_tell_srun_the_cores_of_a_task(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "activate").touch()
    env = {"PATH": "/usr/bin:/bin", "HPC_NEURO_VENV": str(tmp_path), "SLURM_CPUS_PER_TASK": "6"}
    command = ["bash", "-c", ". slurm/env.sh; env"]
    output = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, check=True).stdout
    assert "SRUN_CPUS_PER_TASK=6" in output.splitlines()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ('partition="main\\nrm -rf x"', "partition 'main\\nrm -rf x' has a line break"),
        ('account="a\\x1bb"', "account 'a\\x1bb' has a line break or another control character"),
        ("qos=%j", "qos '%j' has a %"),
        ('gres="gpu:a\\rb"', "gres"),
        ('constraint="a\\n#SBATCH --wrap=x"', "constraint"),
        ('interface="ib0\\nx"', "interface"),
        ('modules=["cuda\\nrm"]', "modules 'cuda\\nrm'"),
        ('setup=["module load x\\nrm"]', "setup 'module load x\\nrm'"),
        ('container="apptainer\\nrm"', "container"),
        ('scratch="/tmp/a\\nb"', "scratch"),
        ('environment={"A": "1\\n2"}', "the value of A has a line break"),
        ('environment={"A B": "1"}', "'A B' is no name of a variable"),
        ('train.partition="main\\nx"', "partition 'main\\nx'"),
    ],
)
def test_a_text_that_would_change_a_batch_script_is_refused(key: str, message: str):
    with pytest.raises(ConfigError) as refusal:
        load_site(None, [key])
    assert message in str(refusal.value)


def test_tabs_and_percent_signs_are_fine_where_a_shell_reads_them():
    site = load_site(None, ['setup=["if true; then\\tdate +%s; fi"]', 'environment={"FORMAT": "%d"}'])
    assert site.setup == ("if true; then\tdate +%s; fi",)


@pytest.mark.parametrize("name", ["a%jb", "a\nb", "a\x07b"])
def test_a_run_folder_that_would_change_a_script_or_the_name_of_a_log_is_refused(name: str):
    with pytest.raises(ConfigError, match="out '/runs/a"):
        require_plain_path("out", Path("/runs") / name)
    require_plain_path("out", Path("/runs/müller's neurons [1]"))


def test_secrets_are_told_by_their_names_and_refused_in_setup():
    names = ("WANDB_API_KEY", "HF_TOKEN", "aws_secret_access", "DB_PASSWORD")
    assert all(map(is_secret, names))
    assert not is_secret("OMP_NUM_THREADS")
    assert split_secrets({"HF_TOKEN": "x", "A": "y"}) == ({"A": "y"}, {"HF_TOKEN": "x"})
    with pytest.raises(ConfigError, match="setup sets WANDB_API_KEY .* set it under `environment`"):
        load_site(None, ['setup=["export WANDB_API_KEY=abc"]'])
    moved = load_site(None, ["environment={WANDB_API_KEY: abc}"])
    assert moved.environment_for(Resources())["WANDB_API_KEY"] == "abc"
