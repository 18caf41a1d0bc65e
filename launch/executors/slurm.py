"""Jobs of a sweep on Slurm: plain sbatch, one squeue for all of them, no accounting needed."""

from __future__ import annotations

import getpass
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import job_files, slurm
from launch.executors import JobState, job_file, read_exit_code
from launch.site import Site, require_plain_path

_SETTLE_SECONDS = 15.0
"""[s] A shared file system may show a job's exit code this much later than squeue forgets the job."""


class SlurmExecutor:
    """Runs each trial as a job of its own; the driver, not Slurm, submits one that died again."""

    def __init__(self, site: Site, code: Path) -> None:
        """code: the snapshot that goes first on PYTHONPATH."""
        self.site, self.code = site, code
        self._gone_since: dict[str, float] = {}

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Write FOLDER/NAME.sh and hand it to sbatch. Raises ConfigError for a folder that cannot stand in a script."""
        require_plain_path("out", folder / name)
        script = job_file(folder / name, "sh")
        # The script holds the site's environment, and with it secrets.
        job_files.write_private_text(script, self.make_script(command, folder / name))
        with slurm.hide_own_job():
            return slurm.run_command("sbatch", "--parsable", str(script)).strip().partition(";")[0]

    def find(self, folder: Path, name: str) -> str | None:
        """Find a job by the id that it wrote when it began, or by the comment that it carries in the queue."""
        path = job_file(folder / name, "job")
        if path.exists():
            return path.read_text(encoding="utf-8").strip()

        # A job that still waits has written nothing.
        queue = slurm.run_command("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%k")
        pairs = (line.strip().partition("|") for line in queue.splitlines())
        return next((job for job, _, comment in pairs if comment == str(folder / name)), None)

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """Ask squeue once; of a job that it does not know, the folder says how it ended."""
        states = slurm.read_job_states() if jobs else {}
        return {job: self._judge_state(job, states.get(job, ""), base) for job, base in jobs.items()}

    def cancel(self, jobs: Sequence[str]) -> None:
        """Run scancel: SIGTERM to every process, SIGKILL after the cluster's KillWait."""
        if jobs:
            slurm.run_command("scancel", "--quiet", *jobs)

    def _judge_state(self, job: str, state: str, base: Path) -> JobState:
        if slurm.is_active(state):
            self._gone_since.pop(job, None)
            return JobState("queued" if state in ("PENDING", "CONFIGURING") else "running")

        # squeue forgets a job at once, while its last file may still be on its way.
        code = read_exit_code(base)
        since = self._gone_since.setdefault(job, time.monotonic())
        if code is None and time.monotonic() - since < _SETTLE_SECONDS:
            return JobState("running")

        return JobState("ended", code)

    def make_script(self, command: Sequence[str], base: Path) -> str:
        """The batch script of a trial."""
        # BASE is STUDY/trials/NUMBER/attempt_N.
        trial, study = base.parent, base.parent.parent.parent
        options = {
            "job_name": f"{study.name}-{trial.name}",
            "comment": base,
            "output": job_file(base, "log"),
            "open_mode": "append",
            **self.site.sbatch_options(self.site.resources("train")),
            "signal": f"TERM@{self.site.signal_seconds}",
            "no_requeue": True,
        }
        quoted_base = shlex.quote(str(base))
        return "\n".join(
            [
                "#!/bin/bash",
                *(_format_option(name, value) for name, value in options.items()),
                # The trial saves and ends by itself; this shell lives on to write how.
                "trap : TERM USR1 USR2",
                f"echo $SLURM_JOB_ID > {quoted_base}.job",
                *self._make_setup(),
                f"cd {shlex.quote(str(trial))}",
                self._make_srun_line(command),
                f"code=$?; echo $code > {quoted_base}.exit.part && mv {quoted_base}.exit.part {quoted_base}.exit",
                "",
            ]
        )

    def _make_setup(self) -> list[str]:
        """Shell lines of the site, and the environment of every rank."""
        # PYTHONPATH comes last, so that a site cannot hide the snapshot of the code.
        *setup, path = self.site.setup_lines(self.code)
        variables = self.site.environment_for(self.site.resources("train"))
        return [*setup, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()), path]

    def _make_srun_line(self, command: Sequence[str]) -> str:
        resources = self.site.resources("train")
        words = shlex.join([*shlex.split(self.site.container), *command])
        line = f"srun {shlex.join(self.site.srun_options(resources))} {words}"
        if resources.tasks == 1:
            return line

        # All ranks train; the verbs that follow, if any, run in one process.
        one_task = f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task={resources.cpus_per_task}"
        return f"{line} && if [ -e infer.yaml ]; then {one_task} {words}; fi"


def _format_option(name: str, value: object) -> str:
    option = f"#SBATCH --{name.replace('_', '-')}"
    return option if value is True else f"{option}={shlex.quote(str(value))}"
