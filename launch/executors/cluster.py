"""Jobs on a cluster: one batch job for each trial of a sweep, on Slurm, PBS or LSF, and for a verb on PBS or LSF.

The queue tells which jobs wait and run; how a job ended is read from the file that it left, so no accounting is needed.

    Slurm        srun starts the ranks of a trial, on one or more nodes; Slurm warns a trial before its time limit
    PBS, LSF     torchrun or mpiexec starts the ranks on one node; the warning differs between sites, so the script asks
                 the command to save and stop by itself, `signal_seconds` before the time limit
"""

from __future__ import annotations

import getpass
import hashlib
import re
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS
from launch import job_files, slurm
from launch.executors import JobState, job_file, make_exit_line, read_exit_code
from launch.site import Resources, Site, require_plain_path

_SETTLE_SECONDS = 15.0
"""[s] A shared file system may show a job's exit code this much later than the queue forgets the job."""
_KILL_SECONDS = 30
"""[s] Before the time limit, a trial that has not stopped by then is killed, so that its exit code is written."""
_ENDED = re.compile(r"finished|unknown job|not found|no matching job|no unfinished job", re.IGNORECASE)
"""What PBS and LSF say of a job that has ended, and where there is no job."""


class ClusterExecutor(ABC):
    """Runs each trial as a job of its own; the driver, not the scheduler, submits one that died again."""

    settle_seconds = _SETTLE_SECONDS
    """[s] How long the exit code of a job that the queue has forgotten is waited for."""

    def __init__(self, site: Site, code: Path, verb: str = "train") -> None:
        """code: the snapshot that goes first on PYTHONPATH. verb: the one whose resources of the site are asked for."""
        self.site, self.code, self.verb = site, code, verb
        self._gone_since: dict[str, float] = {}

    @abstractmethod
    def make_script(self, command: Sequence[str], base: Path) -> str:
        """The batch script of a trial."""

    @abstractmethod
    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs: SIGTERM, and SIGKILL later; those that have ended are passed over."""

    @abstractmethod
    def _submit_script(self, script: Path, base: Path) -> str:
        """Hand a script to the scheduler; the id of its job."""

    @abstractmethod
    def _find_in_queue(self, base: Path) -> str | None:
        """The id of the job of FOLDER/NAME that waits or runs."""

    @abstractmethod
    def _read_states(self) -> dict[str, JobState]:
        """The jobs of this user that wait or run."""

    @property
    def resources(self) -> Resources:
        """What a job asks for."""
        return self.site.resources(self.verb)

    def submit(self, command: Sequence[str], folder: Path, name: str) -> str:
        """Write FOLDER/NAME.sh and submit it. Raises ConfigError for a folder that cannot stand in a script."""
        base = folder / name
        require_plain_path("out", base)
        script = job_file(base, "sh")
        # The script holds the site's environment, and with it secrets.
        job_files.write_private_text(script, self.make_script(command, base))
        with slurm.hide_own_job():
            return self._submit_script(script, base)

    def find(self, folder: Path, name: str) -> str | None:
        """Find a job by the id that it wrote when it began, or in the queue."""
        path = job_file(folder / name, "job")
        if path.exists() and (job := path.read_text(encoding="utf-8", errors="replace").strip()):
            return job
        # A job that still waits has written nothing, and one on a full disk an empty file.
        return self._find_in_queue(folder / name)

    def poll(self, jobs: Mapping[str, Path]) -> dict[str, JobState]:
        """Ask the queue once; of a job that it does not know, the folder says how it ended."""
        states = self._read_states() if jobs else {}
        return {job: self._judge_state(job, states.get(job), base) for job, base in jobs.items()}

    def _judge_state(self, job: str, state: JobState | None, base: Path) -> JobState:
        if state is not None:
            self._gone_since.pop(job, None)
            return state

        # The queue forgets a job at once, while its last file may still be on its way.
        code = read_exit_code(base)
        since = self._gone_since.setdefault(job, time.monotonic())
        if code is None and time.monotonic() - since < self.settle_seconds:
            return JobState("running")
        return JobState("ended", code)

    def _make_setup(self) -> list[str]:
        """Shell lines of the site, and the environment of every rank."""
        # PYTHONPATH comes last, so that a site cannot hide the snapshot of the code.
        *setup, path = self.site.setup_lines(self.code)
        variables = self.site.environment_for(self.resources)
        return [*setup, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()), path]


class SlurmExecutor(ClusterExecutor):
    """Slurm: plain sbatch, one squeue for all jobs."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """Run scancel: SIGTERM to every process, SIGKILL after the cluster's KillWait."""
        if jobs:
            slurm.run_command("scancel", "--quiet", *jobs)

    def _submit_script(self, script: Path, base: Path) -> str:
        return slurm.run_command("sbatch", "--parsable", str(script)).strip().partition(";")[0]

    def _find_in_queue(self, base: Path) -> str | None:
        # A job carries its base as its comment.
        queue = slurm.run_command("squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%k")
        pairs = (line.strip().partition("|") for line in queue.splitlines())
        return next((job for job, _, comment in pairs if comment == str(base)), None)

    def _read_states(self) -> dict[str, JobState]:
        return {
            job: JobState("queued" if state in ("PENDING", "CONFIGURING") else "running")
            for job, state in slurm.read_job_states().items()
            if slurm.is_active(state)
        }

    def make_script(self, command: Sequence[str], base: Path) -> str:
        """The batch script of a trial."""
        # BASE is STUDY/trials/NUMBER/attempt_N.
        trial, study = base.parent, base.parent.parent.parent
        options = {
            "job_name": f"{study.name}-{trial.name}",
            "comment": base,
            "output": job_file(base, "log"),
            "open_mode": "append",
            **self.site.sbatch_options(self.resources),
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
                make_exit_line(quoted_base),
                "",
            ]
        )

    def _make_srun_line(self, command: Sequence[str]) -> str:
        resources = self.resources
        words = shlex.join([*shlex.split(self.site.container), *command])
        line = f"srun {shlex.join(self.site.srun_options(resources))} {words}"
        if resources.tasks == 1:
            return line

        # All ranks train; the verbs that follow, if any, run in one process.
        one_task = f"srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task={resources.cpus_per_task}"
        return f"{line} && if [ -e infer.yaml ]; then {one_task} {words}; fi"


class QueueExecutor(ClusterExecutor):
    """What PBS and LSF share: commands that take options in place of a header, and scripts that run torchrun."""

    def __init__(
        self, site: Site, code: Path, verb: str = "train", cwd: Path | None = None, after: Sequence[str] = ()
    ) -> None:
        """As of ClusterExecutor. cwd: where the command runs; None: the folder of the job's files. after: jobs that
        must end well first.

        Raises ConfigError for what the scheduler does not have.
        """
        super().__init__(site, code, verb)
        self.cwd, self.after = cwd, tuple(after)
        faults = [name for name in ("qos", "gres", "constraint") if getattr(site, name)]
        if faults:
            raise ConfigError(f"{', '.join(faults)}: {self.scheduler} has no such option; remove it from the site")
        if self.resources.nodes > 1:
            raise ConfigError(f"{verb}.nodes: on {self.scheduler} a job runs on one node; set {verb}.nodes=1")

    @property
    @abstractmethod
    def scheduler(self) -> str:
        """Its name for people."""

    @abstractmethod
    def list_submit_words(self, name: str, script: Path, resources: Resources) -> list[str]:
        """The command that submits a script."""

    @abstractmethod
    def _parse_id(self, answer: str) -> str:
        """The id of a job in the answer of that command."""

    @abstractmethod
    def _list_cancel_words(self, job: str) -> list[str]:
        """The command that ends a job: SIGTERM, and SIGKILL later."""

    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs; those that have ended are passed over."""
        for job in jobs:
            try:
                slurm.run_command(*self._list_cancel_words(job))
            except InputError as error:
                if not _ENDED.search(str(error)):
                    raise

    def _submit_script(self, script: Path, base: Path) -> str:
        words = self.list_submit_words(name_job(base), script, self.resources)
        return self._parse_id(slurm.run_command(*words))

    def make_script(self, command: Sequence[str], base: Path) -> str:
        """The script of a trial."""
        resources = self.resources
        quoted = shlex.quote(str(base))
        lines = [
            "#!/bin/bash",
            # The scheduler would show its own copy of the output only at the end.
            f"exec >> {quoted}.log 2>&1 < /dev/null",
            # The trial saves and ends by itself; this shell lives on to write how.
            "trap : TERM INT USR1 USR2",
            f'echo "${{PBS_JOBID:-$LSB_JOBID}}" > {quoted}.job',
            *self._make_setup(),
            f"cd {shlex.quote(str(self.cwd or base.parent))}",
            f"{self._make_timeout(resources)} {self._make_command(command, resources)} &",
            # `wait` returns when a signal arrives, and is asked again until the trial has ended.
            "trial=$!; trap 'kill -TERM $trial' TERM INT USR1 USR2",
            "while :; do wait $trial; kill -0 $trial 2> /dev/null || break; done",
            # The shell remembers how the trial ended; the last answer may have been that of the signal.
            f"wait $trial; {make_exit_line(quoted)}",
            "",
        ]
        return "\n".join(lines)

    def _make_timeout(self, resources: Resources) -> str:
        """The command that asks a trial to save and stop before the time limit, and kills it later."""
        last = max(60 * resources.minutes - self.site.signal_seconds, 1)
        kill_after = max(self.site.signal_seconds - _KILL_SECONDS, 1)
        return f"timeout --preserve-status --signal=TERM --kill-after={kill_after} {last}"

    def _make_command(self, command: Sequence[str], resources: Resources) -> str:
        words = [*shlex.split(self.site.container)]
        if resources.tasks > 1 and VERBS[self.verb].ranks == "mpi":
            words = [find_mpiexec(), "-n", str(resources.tasks), *words]
        elif resources.tasks > 1:
            words += ["torchrun", "--standalone", f"--nproc-per-node={resources.tasks}", "--no-python"]
        return shlex.join([*words, *command])


class PbsExecutor(QueueExecutor):
    """PBS Professional and OpenPBS: qsub, qselect, qdel."""

    scheduler = "PBS"

    def list_submit_words(self, name: str, script: Path, resources: Resources) -> list[str]:
        chunk = f"1:ncpus={resources.tasks_per_node * resources.cpus_per_task}"
        if resources.gpus_per_node:
            chunk += f":ngpus={resources.gpus_per_node}"
        if resources.memory_gb:
            chunk += f":mem={int(resources.memory_gb * 1024)}mb"

        words = ["qsub", "-N", name, "-l", f"select={chunk}", "-l", f"walltime={_format_clock(resources.minutes)}:00"]
        if self.site.exclusive:
            words += ["-l", "place=excl"]
        # -r n: the driver submits a trial again, not the scheduler.
        words += ["-r", "n", "-j", "oe", "-o", "/dev/null"]
        words += ["-q", resources.partition] if resources.partition else []
        words += ["-A", self.site.account] if self.site.account else []
        words += ["-W", f"depend=afterok:{':'.join(self.after)}"] if self.after else []
        return [*words, str(script)]

    def _parse_id(self, answer: str) -> str:
        return answer.strip()

    def _find_in_queue(self, base: Path) -> str | None:
        return next(iter(self._select("-N", name_job(base))), None)

    def _read_states(self) -> dict[str, JobState]:
        waiting = set(self._select("-s", "HQTW"))
        return {job: JobState("queued" if job in waiting else "running") for job in self._select()}

    def _select(self, *options: str) -> list[str]:
        return slurm.run_command("qselect", "-u", getpass.getuser(), *options).split()

    def _list_cancel_words(self, job: str) -> list[str]:
        return ["qdel", job]


class LsfExecutor(QueueExecutor):
    """IBM Spectrum LSF: bsub, bjobs, bkill."""

    scheduler = "LSF"

    def list_submit_words(self, name: str, script: Path, resources: Resources) -> list[str]:
        cores = resources.tasks_per_node * resources.cpus_per_task
        words = ["bsub", "-J", name, "-n", str(cores), "-R", "span[hosts=1]", "-W", _format_clock(resources.minutes)]
        if resources.memory_gb:
            words += ["-R", f"rusage[mem={int(resources.memory_gb * 1024)}MB/host]"]
        if resources.gpus_per_node:
            words += ["-gpu", f"num={resources.gpus_per_node}"]
        if self.site.exclusive:
            words.append("-x")
        # -rn: the driver submits a trial again, not the scheduler.
        words += ["-rn", "-o", "/dev/null"]
        words += ["-q", resources.partition] if resources.partition else []
        words += ["-P", self.site.account] if self.site.account else []
        # -ti: a job whose dependency failed would otherwise stay in the queue for ever.
        words += ["-w", " && ".join(f"done({job})" for job in self.after), "-ti"] if self.after else []
        return [*words, "/bin/bash", str(script)]

    def _parse_id(self, answer: str) -> str:
        match = re.search(r"Job <(\d+)>", answer)
        if match is None:
            raise InputError(
                f"bsub answered {answer.strip()!r}, expected `Job <ID> is submitted`; submit from a login node"
            )
        return match[1]

    def _find_in_queue(self, base: Path) -> str | None:
        return next((words[0] for words in self._list_jobs("-J", name_job(base))), None)

    def _read_states(self) -> dict[str, JobState]:
        return {
            job: JobState("queued" if state in ("PEND", "PSUSP", "WAIT") else "running")
            for job, state in self._list_jobs()
            if state not in ("DONE", "EXIT")
        }

    def _list_jobs(self, *options: str) -> list[list[str]]:
        """[job, state] of the jobs of this user."""
        words = ["bjobs", "-u", getpass.getuser(), "-noheader", "-o", "jobid stat", *options]
        # Without any job bjobs fails, or prints a sentence, depending on its version.
        try:
            answer = slurm.run_command(*words)
        except InputError as error:
            answer = str(error)
            if not _ENDED.search(answer):
                raise
        return [] if _ENDED.search(answer) else [line.split() for line in answer.splitlines() if line.strip()]

    def _list_cancel_words(self, job: str) -> list[str]:
        return ["bkill", job]


QUEUES: dict[str, type[QueueExecutor]] = {"pbs": PbsExecutor, "lsf": LsfExecutor}
"""`--on` -> its executor."""


def find_mpiexec() -> str:
    """The mpiexec of the installed MPICH; a site's own is found by its name."""
    installed = Path(sys.executable).with_name("mpiexec")
    return str(installed) if installed.exists() else "mpiexec"


def name_job(base: Path) -> str:
    """The name of the job of FOLDER/NAME: PBS takes 15 characters, and it must be of no other job."""
    return f"t{hashlib.sha256(str(base.absolute()).encode()).hexdigest()[:14]}"


def _format_clock(minutes: int) -> str:
    """Minutes as HH:MM."""
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _format_option(name: str, value: object) -> str:
    option = f"#SBATCH --{name.replace('_', '-')}"
    return option if value is True else f"{option}={shlex.quote(str(value))}"
