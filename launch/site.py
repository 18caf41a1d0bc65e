"""What differs between clusters, as a config: configs/cluster/SITE.yaml."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic import Field

from hpc_neuro.core import schema
from hpc_neuro.core.schema import ConfigError, config

SHIPPED = Path(__file__).resolve().parent.parent / "configs" / "cluster"


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
    """[min] Time limit of one start; a job that is put back has it anew."""
    partition: str | None = None
    """Overrules the site's."""
    mpi: Literal["pmi2", "pmix", "none"] = "none"
    """How srun starts MPI ranks; pmi2 for MPICH (the one that is installed with hpc_neuro), pmix for Open MPI."""

    @property
    def tasks(self) -> int:
        """Processes in all."""
        return self.nodes * self.tasks_per_node


@config
class Site:
    """One cluster."""

    partition: str | None = None
    """Partition; none: the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    gres: str | None = None
    """`gpu:a100` where GPUs must be asked for by type; their number is added, if there is none, from gpus_per_task."""
    constraint: str | None = None
    """Features that nodes must have."""
    exclusive: bool = False
    """Share no node with other jobs."""
    modules: tuple[str, ...] = ()
    """`module load` these before anything runs."""
    setup: tuple[str, ...] = ()
    """Shell lines after that."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for every process."""
    container: str = ""
    """Words before the command, such as `apptainer exec --nv image.sif`."""
    scratch: Path | None = None
    """Folder for temporary files (TMPDIR), on the nodes."""
    interface: str | None = None
    """Network interface that ranks talk over (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); none: they choose."""
    interface_on_login: bool = True
    """Whether the login node has that interface too, so that its name can be checked before the queue."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """[GB] Memory of one GPU; with it, the memory that training will need is checked before the queue."""
    teraflops: float | None = Field(default=None, gt=0)
    """[TFLOP/s] What one GPU (or rank) reaches in training; with it, time is checked before the queue."""
    signal_seconds: int = Field(default=120, ge=10)
    """[s] How long before the end of the time limit, and of a preemption, a job is told to save and stop."""
    max_requeue: int = Field(default=10, ge=0)
    """How often a job is put back to the queue after a time-out, a preemption or a node failure."""
    max_jobs: int | None = Field(default=None, ge=1)
    """How many jobs one person may have queued, where Slurm's accounting does not say."""
    at_once: int = Field(default=256, ge=1)
    """How many tasks of an array run at once."""
    prepare: Resources = Field(default_factory=Resources)
    """What `prepare` asks for, and so on for each verb."""
    precompute: Resources = Field(default_factory=Resources)
    train: Resources = Field(default_factory=Resources)
    infer: Resources = Field(default_factory=Resources)
    evaluate: Resources = Field(default_factory=Resources)
    demo: Resources = Field(default_factory=Resources)

    def gpus(self, asked: Resources) -> dict[str, str | int]:
        """How sbatch is asked for the GPUs of a node, `gres` or `gpus_per_node`; {} for none."""
        count = asked.tasks_per_node * asked.gpus_per_task
        if self.gres is None or not count:
            return {"gpus_per_node": count} if count else {}
        return {"gres": self.gres if self.gres.rpartition(":")[2].isdigit() else f"{self.gres}:{count}"}

    def resources(self, verb: str) -> Resources:
        """What a verb asks for, its partition filled in."""
        asked: Resources = getattr(self, verb)
        if asked.partition is not None or self.partition is None:
            return asked
        return dataclasses.replace(asked, partition=self.partition)


def load_site(name: str | None, overrides: list[str]) -> Site:
    """A site by the path of its YAML file or by the name of a shipped one; None: one task, nothing special."""
    path = None
    if name is not None:
        path = Path(name) if name.endswith((".yaml", ".yml")) else SHIPPED / f"{name}.yaml"
        if not path.exists():
            shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
            raise ConfigError(
                f"--cluster {name}: {path} does not exist; give the path of a YAML file, or one of {shipped}"
            )
    return schema.load(Site, path, overrides)
