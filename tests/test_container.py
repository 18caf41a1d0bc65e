"""The recipes of containers and the conda environment name files that exist; they are not built here."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = (ROOT / "slurm/container/Dockerfile").read_text()
APPTAINER = (ROOT / "slurm/container/apptainer.def").read_text()


def list_commands(recipe: str) -> list[str]:
    """The apt-get, grep and pip commands of a recipe, without the layers' punctuation and the name of the index."""
    commands = re.findall(r"^\s*(?:RUN |&& )?((?:DS_BUILD_OPS=0 )?(?:apt-get|grep|pip) .*?)(?: \\)?$", recipe, re.M)
    return [re.sub(r'"(\$\{TORCH_INDEX\}|\{\{ torch_index \}\})"', "INDEX", command) for command in commands]


def test_both_recipes_install_the_same() -> None:
    docker = [command.removesuffix(" && hpc-neuro --help > /dev/null") for command in list_commands(DOCKER)]
    assert docker == list_commands(APPTAINER)
    assert len(docker) == 5
    bases = re.findall(r"^(?:FROM|From:) (\S+)", DOCKER + APPTAINER, re.M)
    assert len(bases) == 2
    assert len(set(bases)) == 1


def test_the_python_is_that_of_the_lock_file() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()[0]
    version = re.search(r"Python (3\.\d+)", lock)
    assert version is not None
    assert f"python:{version[1]}-" in DOCKER


def test_all_files_exist() -> None:
    section = APPTAINER.partition("%files")[2].partition("%post")[0]
    names = [line.split()[0] for line in section.splitlines() if line.strip()]
    assert {"requirements.lock", "hpc_neuro", "launch"} <= set(names)
    names += re.findall(r"^COPY (?!\. )(\S+) (\S+)", DOCKER, re.M)[0]
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_conda_environment_installs_the_locked_packages() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(item for item in environment["dependencies"] if str(item).startswith("python="))
    assert f'python_requires=">={python.partition("=")[2]}' in (ROOT / "setup.py").read_text()
    (packages,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert packages[-1] == "-e ."
    locks = [line.split()[1] for line in packages[:-1]]
    assert all(line.startswith("-c ") for line in packages[:-1])
    assert all((ROOT / name).is_file() for name in locks)
    # The same files as `make env`.
    assert f"LOCKS  := {' '.join(locks)}" in (ROOT / "Makefile").read_text()
