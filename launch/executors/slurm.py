"""Jobs of a sweep on Slurm: plain sbatch, one squeue for all of them, no accounting needed."""

from __future__ import annotations

import getpass
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_neuro.core import files
from launch import slurm
from launch.executors import JobState, beside, exit_code
from launch.site import Site

_SETTLE = 15.0  # [s] a shared file system may show a job's exit code this much later than squeue forgets the job


class Slurm:
    """Each trial a job of its own; the driver, not Slurm, sends one that died again."""

    def __init__(self, site: Site, code: Path) -> None:
        """code: the snapshot that goes first on PYTHONPATH."""
        self.site, self.code = site, code
        self._gone: dict[str, float] = {}

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Write FOLDER/NAME.sh and hand it to sbatch."""
        script = beside(folder / name, "sh")
        files.write_text(script, self.script(command, folder / name))
        return slurm.ask("sbatch", "--parsable", str(script)).strip().partition(";")[0]

    def find(self, folder: Path, name: str) -> str | None:
        """By the comment that the job carries, or, once it runs, by the id that it noted."""
        noted = beside(folder / name, "job")
        if noted.exists():
            return noted.read_text(encoding="utf-8").strip()
        queue = slurm.ask("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%k")
        pairs = (line.strip().partition("|") for line in queue.splitlines())
        return next((job for job, _, comment in pairs if comment == str(folder / name)), None)

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """One squeue; how a job that is not there ended, its folder says."""
        known = slurm.states() if jobs else {}
        return {job: self._state(job, known.get(job, ""), base) for job, base in jobs.items()}

    def cancel(self, jobs: Sequence[str]) -> None:
        """scancel: SIGTERM to every process, SIGKILL after the cluster's KillWait."""
        if jobs:
            slurm.ask("scancel", "--quiet", *jobs)

    def _state(self, job: str, state: str, base: Path) -> JobState:
        if slurm.active(state):
            self._gone.pop(job, None)
            return JobState("queued" if state in ("PENDING", "CONFIGURING") else "running")
        code = exit_code(base)
        since = self._gone.setdefault(job, time.monotonic())
        if code is None and time.monotonic() - since < _SETTLE:
            return JobState("running")
        return JobState("ended", code)

    def script(self, command: Sequence[str], base: Path) -> str:
        """The batch script of a trial."""
        asked = self.site.resources("train")
        options = {
            "job-name": f"{base.parent.parent.parent.name}-{base.parent.name}",
            "comment": base,
            "output": beside(base, "log"),
            "open-mode": "append",
            "nodes": asked.nodes,
            "ntasks-per-node": asked.tasks_per_node,
            "cpus-per-task": asked.cpus_per_task,
            "time": asked.minutes,
            "partition": asked.partition,
            "account": self.site.account,
            "qos": self.site.qos,
            "constraint": self.site.constraint,
            "mem": f"{int(asked.memory_gb * 1024)}M" if asked.memory_gb else None,
            **{k.replace("_", "-"): v for k, v in self.site.gpus(asked).items()},
            "signal": f"TERM@{self.site.signal_seconds}",
        }
        lines = [f"#SBATCH --{k}={shlex.quote(str(v))}" for k, v in options.items() if v is not None]
        quoted = shlex.quote(str(base))
        words = shlex.join([*shlex.split(self.site.container), *command])
        runs = f"srun --kill-on-bad-exit=0 --wait={max(60, self.site.signal_seconds)} {words}"
        if asked.tasks > 1:  # all ranks train; what follows, if anything, wants one
            runs += f" && if [ -e infer.yaml ]; then srun --nodes=1 --ntasks=1 --ntasks-per-node=1 {words}; fi"
        return "\n".join(
            [
                "#!/bin/bash",
                *lines,
                *(["#SBATCH --exclusive"] if self.site.exclusive else []),
                "#SBATCH --no-requeue",
                "trap : TERM USR1 USR2  # the trial saves and ends by itself; this shell notes how",
                f"echo $SLURM_JOB_ID > {quoted}.job",
                *self._setup(),
                f"cd {shlex.quote(str(base.parent))}",
                runs,
                f"code=$?; echo $code > {quoted}.exit.part && mv {quoted}.exit.part {quoted}.exit",
                "",
            ]
        )

    def _setup(self) -> list[str]:
        """Shell lines of the site, and the environment of every rank."""
        site = self.site
        variables = {"OMP_NUM_THREADS": str(site.resources("train").cpus_per_task), **site.environment}
        if site.scratch:
            variables["TMPDIR"] = str(site.scratch)
        if site.interface:
            variables |= {"NCCL_SOCKET_IFNAME": site.interface, "GLOO_SOCKET_IFNAME": site.interface}
        return [
            *(f"module load {shlex.quote(m)}" for m in site.modules),
            *site.setup,
            *(f"export {k}={shlex.quote(v)}" for k, v in variables.items()),
            f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        ]
