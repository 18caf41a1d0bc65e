"""What differs between clusters, as a config: `configs/cluster/SITE.yaml`.

A site also says how Slurm is asked for the resources of a verb: `sbatch_options`, `setup_lines` and `environment_for`
are what every batch script of this package is made from.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, config
from hpc_neuro.pipeline import LAUNCHABLE

SITE_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "cluster"
"""Folder of the sites that are shipped."""
_OPTION_FIELDS = ("partition", "account", "qos", "gres", "constraint", "interface")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


@config
class Resources:
    """What one verb asks for."""

    nodes: int = Field(default=1, ge=1)
    """Nodes."""
    tasks_per_node: int = Field(default=1, ge=1)
    """Processes per node: one per GPU for train, one per MPI rank for precompute."""
    gpus_per_task: int = Field(default=0, ge=0)
    """GPUs per process."""
    cpus_per_task: int = Field(default=1, ge=1)
    """Cores per process."""
    memory_gb: float | None = Field(default=None, gt=0)
    """[GB] Per node; none: the partition's default."""
    minutes: int = Field(default=60, ge=1)
    """[min] Time limit of one start; a requeued job gets it anew."""
    partition: str | None = None
    """Partition of this verb; none: the site's."""
    mpi: Literal["pmi2", "pmix", "none"] = "none"
    """How srun starts MPI ranks: pmi2 for MPICH (installed with hpc_neuro), pmix for Open MPI."""

    def __post_init__(self) -> None:
        _require_no_faults(find_option_faults("partition", self.partition or ""))

    @property
    def tasks(self) -> int:
        """Number of processes on all nodes."""
        return self.nodes * self.tasks_per_node

    @property
    def gpus_per_node(self) -> int:
        """GPUs of all processes of a node."""
        return self.tasks_per_node * self.gpus_per_task


@config
class ClusterFacts:
    """One cluster, without the resources of the verbs; `Site` adds a section for each verb."""

    partition: str | None = None
    """Partition; none: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    gres: str | None = None
    """`gpu:a100` where GPUs must be requested by type; a missing number is filled in from gpus_per_task."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclusive: bool = False
    """Share no node with other jobs."""
    modules: tuple[str, ...] = ()
    """`module load` each of these before anything runs."""
    setup: tuple[str, ...] = ()
    """Shell lines that run after the modules are loaded."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every process; names with KEY, TOKEN, SECRET or PASSWORD stay out of files others can read."""
    container: str = ""
    """Words before the command, such as `apptainer exec --nv image.sif`."""
    scratch: Path | None = None
    """Folder for temporary files (TMPDIR) on the nodes."""
    interface: str | None = None
    """Network interface between ranks (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); none: NCCL and gloo choose."""
    interface_on_login: bool = True
    """Whether the login node has that interface too, so that its name can be checked before the queue."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """[GB] Memory of one GPU; enables the check of training memory before the queue."""
    teraflops: float | None = Field(default=None, gt=0)
    """[TFLOP/s] What one GPU (or rank) reaches in training; enables the check of training time before the queue."""
    signal_seconds: int = Field(default=120, ge=10)
    """[s] How long before the end of the time limit, and of a preemption, a job is told to save and stop."""
    max_requeue: int = Field(default=10, ge=0)
    """How often a job is requeued after a timeout, a preemption or a node failure."""
    max_jobs: int | None = Field(default=None, ge=1)
    """How many jobs one user may have queued, where Slurm's accounting does not say."""
    at_once: int = Field(default=256, ge=1)
    """How many tasks of an array run at the same time; on PBS and LSF, how many shares there may be."""

    def __post_init__(self) -> None:
        # All faults at once, each by its key.
        faults = []
        for name in _OPTION_FIELDS:
            faults += find_option_faults(name, getattr(self, name) or "")

        for module in self.modules:
            faults += find_option_faults("modules", module)

        faults += find_line_faults("container", self.container)
        faults += find_line_faults("scratch", str(self.scratch or ""))
        faults += _find_setup_faults(self.setup)
        faults += _find_environment_faults(self.environment)
        _require_no_faults(faults)

    def resources(self, verb: str) -> Resources:
        """What a verb asks for, with the site's partition filled in."""
        section: Resources = getattr(self, verb)
        if section.partition is not None or self.partition is None:
            return section
        return dataclasses.replace(section, partition=self.partition)

    def gpu_options(self, resources: Resources) -> dict[str, str | int]:
        """The sbatch option for the GPUs of a node, `gres` or `gpus_per_node`; {} without GPUs."""
        count = resources.gpus_per_node
        if not count:
            return {}
        if self.gres is None:
            return {"gpus_per_node": count}

        # `gpu:a100` lacks the number, `gpu:a100:4` has it.
        has_number = self.gres.rpartition(":")[2].isdecimal()
        return {"gres": self.gres if has_number else f"{self.gres}:{count}"}

    def sbatch_options(self, resources: Resources) -> dict[str, str | int]:
        """Options of sbatch for the resources of a verb, by name with underscores; those that are unset are absent."""
        options: dict[str, str | int | None] = {
            "time": resources.minutes,
            "nodes": resources.nodes,
            "ntasks_per_node": resources.tasks_per_node,
            "cpus_per_task": resources.cpus_per_task,
            "mem": f"{int(resources.memory_gb * 1024)}M" if resources.memory_gb else None,
            "partition": resources.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "exclusive": self.exclusive or None,
            **self.gpu_options(resources),
        }
        return {name: value for name, value in options.items() if value is not None}

    def srun_options(self, resources: Resources) -> list[str]:
        """Options of the srun that starts the ranks of a job."""
        return [
            # When one rank has ended, the others have this long before srun kills them.
            f"--wait={max(60, self.signal_seconds)}",
            "--kill-on-bad-exit=0",
            # Since Slurm 22.05 srun does not inherit this option of sbatch: without it every rank gets one core.
            f"--cpus-per-task={resources.cpus_per_task}",
        ]

    def setup_lines(self, code: Path) -> list[str]:
        """Shell lines of a batch script before its command; `code` goes first on PYTHONPATH."""
        return [
            *(f"module load {shlex.quote(module)}" for module in self.modules),
            *self.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]

    def environment_for(self, resources: Resources) -> dict[str, str]:
        """Variables of every process of a verb."""
        # Libraries would otherwise start a thread per core of the node, in every rank.
        variables = {"OMP_NUM_THREADS": str(resources.cpus_per_task)}
        if self.scratch:
            variables["TMPDIR"] = str(self.scratch)

        # What the user sets wins over the defaults above.
        variables |= self.environment
        if self.interface:
            variables |= {"NCCL_SOCKET_IFNAME": self.interface, "GLOO_SOCKET_IFNAME": self.interface}

        return variables


def _add_verb_sections(base: type[Any]) -> Any:
    """Extend the facts of a cluster by a section of resources for each verb that can be launched."""
    # The table of verbs says which there are: a new verb needs no edit here.
    sections: dict[str, Any] = {verb: Field(default_factory=Resources) for verb in LAUNCHABLE}
    namespace = {
        "__module__": __name__,
        "__doc__": "One cluster.",
        "__annotations__": dict.fromkeys(sections, Resources),
    }
    return config(type("Site", (base,), namespace | sections))


if TYPE_CHECKING:
    Site = ClusterFacts
else:
    Site = _add_verb_sections(ClusterFacts)


def load_site(name: str | None, overrides: list[str]) -> Site:
    """Load a site by the path of its YAML file or by the name of a shipped one; None: the defaults.

    Raises ConfigError.
    """
    # A name without the ending of a file is a shipped site.
    path = None
    if name is not None:
        path = Path(name) if name.endswith((".yaml", ".yml")) else SITE_FOLDER / f"{name}.yaml"
        if not path.exists():
            shipped = ", ".join(sorted(p.stem for p in SITE_FOLDER.glob("*.yaml")))
            raise ConfigError(
                f"--cluster {name}: {path} does not exist; give the path of a YAML file, or one of {shipped}"
            )

    site: Site = schema.load(Site, path, overrides)
    return site


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value must not be readable by others."""
    return _SECRET_NAME.search(name) is not None


def hide_secrets(site: Site) -> Site:
    """The site with `...` in place of the values of secret variables."""
    shown = {name: "..." if is_secret(name) else value for name, value in site.environment.items()}
    return dataclasses.replace(site, environment=shown)


def split_secrets(variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """(variables that anybody may read, secret ones)."""
    secrets = {name: value for name, value in variables.items() if is_secret(name)}
    return {name: value for name, value in variables.items() if name not in secrets}, secrets


def find_line_faults(key: str, text: str) -> list[str]:
    """Faults of a text that becomes part of a shell script: a line break in it would begin a command of its own."""
    # Covers line breaks, escape sequences and undecodable bytes.
    if text.isprintable():
        return []
    return [f"{key} {text!r} has a line break or another control character; write it on one line without it"]


def find_option_faults(key: str, text: str) -> list[str]:
    """Faults of a text that becomes an option of sbatch, or part of a path of a log, where Slurm replaces `%j`."""
    if "%" in text:
        return [f"{key} {text!r} has a %, which Slurm replaces in names and paths; choose a name without it"]
    return find_line_faults(key, text)


def require_plain_path(key: str, path: Path) -> None:
    """Raise ConfigError where a path cannot stand in a batch script or in the pattern of a log's name."""
    faults = find_option_faults(key, str(path.absolute()))
    if faults:
        raise ConfigError(faults[0])


def _find_setup_faults(lines: Iterable[str]) -> list[str]:
    faults = []

    for line in lines:
        faults += find_line_faults("setup", line.replace("\t", " "))
        # The lines stand in the batch script, which people share when they ask for help.
        names = re.findall(r"(?:^|[\s;&])(\w+)=", line)
        secrets = [name for name in names if is_secret(name)]
        if secrets:
            faults.append(
                f"setup sets {secrets[0]} in a file that others can read; set it under `environment`, whose secrets "
                "are kept in a file of mode 0600"
            )

    return faults


def _find_environment_faults(variables: Mapping[str, str]) -> list[str]:
    faults = []

    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            faults.append(f"environment: {name!r} is no name of a variable; use letters, digits and _")
        elif not value.isprintable():
            faults.append(f"environment: the value of {name} has a line break or another control character")

    return faults


def _require_no_faults(faults: list[str]) -> None:
    if faults:
        raise ValueError("; ".join(faults))
