"""Submitting verbs as jobs into run folders: one job, or shares as the tasks of an array (PBS and LSF: as jobs).

    OUT/launch/         code/  config.yaml  secrets.json  jobs.json  ends.json  starts/  logs/

Share (i, n) of an array takes every n-th volume from the i-th on and keeps its own record in OUT/shares/NAME. Results
go straight into OUT, where the last job, the same verb without a share, finds them finished and gathers them. Shares
that ended well are not submitted again.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import LAUNCHABLE, Verb
from launch import job_files, slurm
from launch.executors import job_file
from launch.executors.cluster import QUEUES, QueueExecutor, find_mpiexec, name_job
from launch.job_end import JobRecord
from launch.site import Resources, Site, require_plain_path, split_secrets
from launch.status import JOBS_FILE, LaunchedJob, Place, read_jobs, require_idle
from launch.supervise import RankTask

Share = tuple[int, int]
"""(index, count): every count-th volume from the index-th on."""
SUBMIT_PROGRAMS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub"}
"""`--on` -> the program that submits a job."""
SECRETS_FILE = "secrets.json"
"""Secret variables of a site, in OUT/launch, with mode 0600."""


def load_config(verb: str, config: Path | None, keys: Sequence[str], values: Mapping[str, Any] | None = None) -> Any:
    """Load the config of a verb; `values` are as in `schema.load`. Raises ConfigError."""
    return schema.load(require_launchable(verb).load_config_class(), config, keys, values)


def require_launchable(verb: str) -> Verb:
    """The row of a verb that can be launched. Raises ConfigError for any other name."""
    if verb not in LAUNCHABLE:
        raise ConfigError(f"{verb!r} is not one of the verbs that can be launched: {', '.join(LAUNCHABLE)}")
    return LAUNCHABLE[verb]


def submit_verb(
    verb: str,
    cfg: Any,
    site: Site,
    on: Place = "slurm",
    after: Sequence[str] = (),
    code: Path | None = None,
    count: int = 1,
    command: Sequence[str] = (),
) -> list[LaunchedJob]:
    """Submit a verb with its config into its run folder.

    after: ids of jobs that must end well first. code: a snapshot to share with other jobs; none: one is made in the
    run folder. count: 1 for one job; else one job per missing share, on Slurm in arrays as long as it takes, and the
    one that gathers. command: runs instead of the verb, for a share with `share=[i,n]` appended, and then nothing
    gathers. Checks nothing but that the folder has no job already; see `preflight.check`. Raises ConfigError for a verb
    that cannot be divided.
    """
    require_program(on)

    if count > 1:
        require_divisible(verb, on, site, count)

    # Two jobs must never write into one folder.
    require_idle(cfg.out)

    code = code or cfg.out.resolve() / "launch" / "code"
    submission = Submission(verb, cfg, site, on, code, tuple(command))
    if count == 1:
        return submission.submit(after)

    # Slurm refuses longer arrays; shares that ended well are not repeated.
    longest = int(slurm.read_configuration()["MaxArraySize"]) if on == "slurm" else count
    jobs = [
        job
        for shares in split_into_arrays(find_missing_shares(cfg.out, count), longest)
        for job in submission.submit(after, shares)
    ]

    # What runs in place of the verb has no results to gather.
    if command:
        return jobs
    return jobs + submission.submit([*after, *list_arrays(jobs)])


def require_program(on: str) -> None:
    """Raise InputError where the program that submits jobs is not on this machine."""
    program = SUBMIT_PROGRAMS.get(on)
    if program and shutil.which(program) is None:
        raise InputError(
            f"{program} is not on this machine; submit from a login node of the cluster, use --on local, or add "
            "--dry-run to see the script and the forecast"
        )


# --------------------------------------------------------------------------------------------------------- shares


def count_shares(verb: str, count: int, is_alone: bool) -> int:
    """Into how many shares a verb is divided: in a chain, verbs that cannot be divided stay whole."""
    return count if is_alone or LAUNCHABLE[verb].divisible else 1


def require_divisible(verb: str, on: Place, site: Site, count: int) -> None:
    """Raise ConfigError where a verb cannot be shared out among jobs."""
    if not LAUNCHABLE[verb].divisible:
        divisible = ", ".join(name for name, row in LAUNCHABLE.items() if row.divisible)
        raise ConfigError(f"--array: {verb} is one piece of work and cannot be shared out; only {divisible} can")
    if on == "local":
        raise ConfigError("--array: one machine has no queue; leave it out, or use --on slurm, pbs or lsf")
    if on in QUEUES and count > site.at_once:
        raise ConfigError(
            f"--array {count}: on PBS and LSF each share is a job of its own, and all may run at once; at_once of the "
            f"site allows {site.at_once}; give --array {site.at_once}, or raise at_once"
        )


def share_name(index: int, count: int) -> str:
    """Name of one share of an array, as in OUT/shares/NAME."""
    return f"{index:04d}_of_{count:04d}"


def find_missing_shares(out: Path, count: int) -> list[Share]:
    """Shares of `count` that have not ended well."""
    finished = _list_finished_on_queue(out)
    names = [share_name(index, count) for index in range(count)]
    return [(index, count) for index, name in enumerate(names) if name not in finished and not _is_done(out, name)]


def _list_finished_on_queue(out: Path) -> set[str]:
    """The shares that a job on PBS or LSF ended well."""
    jobs = read_jobs(out) if (out / "launch" / JOBS_FILE).exists() else []
    ends = [(job.share, job.read_end()) for job in jobs if job.on in QUEUES and job.share]
    return {share for share, end in ends if end is not None and end["exit"] == 0}


def _is_done(out: Path, share: str) -> bool:
    ends = JobRecord(out / "launch" / share, out).read_ends()
    return bool(ends) and ends[-1]["exit"] == 0


def split_into_arrays(shares: Sequence[Share], size: int) -> list[list[Share]]:
    """Split shares into arrays of `size` tasks at most (Slurm's MaxArraySize), as even as can be."""
    if not shares:
        return []
    # Even sizes keep all arrays busy for about as long.
    number = -(-len(shares) // size)
    bounds = [round(i * len(shares) / number) for i in range(number + 1)]
    return [list(shares[start:stop]) for start, stop in itertools.pairwise(bounds)]


def list_arrays(jobs: Sequence[LaunchedJob]) -> list[str]:
    """Ids of the arrays that jobs are tasks of, each once."""
    return list(dict.fromkeys(job.id.partition("_")[0] for job in jobs))


def describe_jobs(jobs: Sequence[LaunchedJob]) -> str:
    """`job 12`, `40 tasks in arrays 12, 13, then job 14`, or `3 shares as jobs 12, 13, 14, then job 15`."""
    shares = [job for job in jobs if job.share]
    parts = list[str]()
    # Shares first, as the single job waits for them.
    if shares:
        ids, is_queue = list_arrays(shares), shares[0].on in QUEUES
        noun, form = ("share", "as jobs") if is_queue else ("task", "in arrays")
        parts.append(f"{files.format_count(len(shares), noun)} {form} {', '.join(ids)}")
    if not jobs[-1].share:
        parts.append(f"job {jobs[-1].id}")
    return ", then ".join(parts)


# ----------------------------------------------------------------------------------------------------------- jobs


@dataclasses.dataclass(frozen=True)
class Submission:
    """A verb on its way to the queue."""

    verb: str
    cfg: Any
    site: Site
    on: Place
    code: Path
    command: tuple[str, ...]

    @property
    def out(self) -> Path:
        """Run folder."""
        return Path(self.cfg.out).resolve()

    @property
    def launch_folder(self) -> Path:
        """OUT/launch."""
        return self.out / "launch"

    @property
    def resources(self) -> Resources:
        """What the verb asks for."""
        return self.site.resources(self.verb)

    def submit(self, after: Sequence[str], shares: Sequence[Share] = ()) -> list[LaunchedJob]:
        """Submit one job, or an array with a task for each share."""
        # Refuse before anything is written.
        require_plain_path("out", self.out)
        logs = self.launch_folder / "logs"
        job_files.make_protected_folder(logs)

        # The job reads these hours later: later edits of the code or the config file must not reach it.
        code = job_files.snapshot_code(self.code)
        files.write_text(self.launch_folder / "config.yaml", schema.dump(self.cfg))

        tasks = [self.make_task(code, share) for share in shares] or [self.make_task(code, None)]
        names = [share_name(*share) for share in shares] or [""]
        if self.on in QUEUES:
            return [self._submit_to_queue(code, task, name, after) for task, name in zip(tasks, names, strict=True)]
        if self.on == "local":
            executor = self._make_local_executor(logs, code)
        else:
            executor = self._make_slurm_executor(logs, code, tasks, after)

        # A sweep or a script may submit from within a job, whose variables sbatch would take for options.
        with slurm.hide_own_job(), job_files.protect_new_files():
            try:
                handles = executor.submit_array(tasks)
            except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
                raise InputError(f"no job was taken: {' '.join(str(error).split())}") from None

        # submitit returns the tasks of an array in the order of its shares.
        jobs = [
            LaunchedJob(handle.job_id, self.on, self.verb, self.out, name)
            for handle, name in zip(handles, names, strict=True)
        ]
        self._record_jobs(jobs, code, after)
        return jobs

    def write_script(self) -> str:
        """The script that a scheduler would get, and above it the command that would submit it; writes no file."""
        logs, code = self.launch_folder / "logs", self.code
        task = self.make_task(code, None, is_written=False)
        if self.on in QUEUES:
            queue, base = self._make_queue(code, ()), logs / "job_1"
            words = queue.list_submit_words(name_job(base), job_file(base, "sh"), self.resources)
            return f"# {shlex.join(words)}\n{queue.make_script(task.command, base)}"

        from submitit.slurm.slurm import _make_sbatch_string

        command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(logs))}"
        return str(_make_sbatch_string(command, logs, **self._list_slurm_options(logs, code, [task], ())))

    def _submit_to_queue(self, code: Path, task: RankTask, share: str, after: Sequence[str]) -> LaunchedJob:
        """Submit one job to PBS or LSF. How it ended is in its files: no rank is watched, and nothing is requeued."""
        logs = self.launch_folder / "logs"
        # Files of earlier jobs stay.
        number = next(n for n in itertools.count(1) if not job_file(logs / f"job_{n}", "sh").exists())
        name = f"job_{number}"
        with job_files.protect_new_files():
            identity = self._make_queue(code, after).submit(task.command, logs, name)
        job = LaunchedJob(identity, self.on, self.verb, self.out, share, files=name)
        self._record_jobs([job], code, after)
        return job

    def _make_queue(self, code: Path, after: Sequence[str]) -> QueueExecutor:
        return QUEUES[self.on](self.site, code, self.verb, Path.cwd(), after)

    def make_task(self, code: Path, share: Share | None, is_written: bool = True) -> RankTask:
        """What each rank of a job runs. is_written: whether the secrets are written where it finds them."""
        config = str(self.launch_folder / "config.yaml")
        words = [*self.command] or [sys.executable, "-m", "hpc_neuro", self.verb, config]
        if share:
            words.append(f"share=[{share[0]},{share[1]}]")

        # On Slurm, srun starts the ranks.
        if self.on == "local" and self.resources.mpi != "none" and self.resources.tasks > 1:
            words = [find_mpiexec(), "-n", str(self.resources.tasks), *words]

        # The environment of every rank, without what others must not read.
        public, secrets = split_secrets(self.site.environment_for(self.resources))
        secrets_file = self.launch_folder / SECRETS_FILE if secrets else None
        # On PBS and LSF they stand in the script, which only its owner can read.
        if secrets_file and is_written and self.on not in QUEUES:
            # The pickle of this task can be read by others, and is copied when people ask for help.
            job_files.write_private_text(secrets_file, json.dumps(secrets))

        return RankTask(
            command=(*shlex.split(self.site.container), *words),
            folder=self.launch_folder / share_name(*share) if share else self.launch_folder,
            out=run_folder.share_folder(self.out, share),
            cwd=Path.cwd(),
            code=code,
            environment=public,
            secrets_file=secrets_file,
            umask=job_files.read_umask(),
            signal_seconds=self.site.signal_seconds,
            max_requeue=self.site.max_requeue,
        )

    def _make_local_executor(self, logs: Path, code: Path) -> Any:
        """submitit's executor of processes on this machine."""
        resources = self.resources
        executor = submitit.LocalExecutor(logs)
        executor.update_parameters(
            timeout_min=resources.minutes,
            # mpiexec starts the ranks.
            tasks_per_node=1 if resources.mpi != "none" else resources.tasks,
            gpus_per_node=resources.tasks * resources.gpus_per_task,
            signal_delay_s=self.site.signal_seconds,
            setup=self.site.setup_lines(code),
        )
        return executor

    def _make_slurm_executor(self, logs: Path, code: Path, tasks: Sequence[RankTask], after: Sequence[str]) -> Any:
        """submitit's executor of Slurm jobs."""
        # submitit writes the batch script, and the tasks as pickles, into the folder of logs.
        executor = submitit.SlurmExecutor(logs)
        executor.update_parameters(**self._list_slurm_options(logs, code, tasks, after))
        return executor

    def _list_slurm_options(
        self, logs: Path, code: Path, tasks: Sequence[RankTask], after: Sequence[str]
    ) -> dict[str, Any]:
        """The options of a batch job on Slurm, by submitit's names."""
        resources, site = self.resources, self.site
        options: dict[str, Any] = {
            **site.sbatch_options(resources),
            "job_name": f"{self.verb}:{tasks[0].out.name}",
            "signal_delay_s": site.signal_seconds,
            "array_parallelism": site.at_once,
            "stderr_to_stdout": True,
            "setup": self._make_script_head(logs, code, tasks),
            "teardown": [self._make_last_line()],
            "srun_args": [f"--mpi={resources.mpi}", *site.srun_options(resources)],
            "additional_parameters": {"requeue": True},
        }

        # A job whose dependency failed would otherwise stay in the queue for ever.
        if after:
            options["dependency"] = f"afterok:{':'.join(after)}"
            options["additional_parameters"] = {"requeue": True, "kill-on-invalid-dep": "yes"}
        return options

    def _make_script_head(self, logs: Path, code: Path, tasks: Sequence[RankTask]) -> list[str]:
        """Lines of the batch script before srun."""
        # The tasks of an array share one script: each finds its folder by its index.
        folders = " ".join(shlex.quote(str(task.folder)) for task in tasks)
        outs = " ".join(shlex.quote(str(task.out)) for task in tasks)
        return [
            job_files.refuse_writable_pickle(logs),
            *self.site.setup_lines(code),
            f"folders=({folders})",
            f"outs=({outs})",
            # bash must outlive a SIGTERM to record how the job ended.
            "trap : TERM USR1 USR2",
        ]

    def _make_last_line(self) -> str:
        """Last line of the batch script: record why the start ended, and requeue the job."""
        index = "${SLURM_ARRAY_TASK_ID:-0}"
        return (
            f'{shlex.quote(sys.executable)} -m launch.job_end "${{folders[{index}]}}" "${{outs[{index}]}}" '
            f"{self.resources.tasks} {self.site.max_requeue} {self.site.signal_seconds} $?"
        )

    def _record_jobs(self, jobs: Sequence[LaunchedJob], code: Path, after: Sequence[str]) -> None:
        """Append jobs to OUT/launch/jobs.json."""
        path = self.launch_folder / JOBS_FILE
        # Jobs of earlier submissions stay: `status` shows how each ended.
        rows = files.read_json(path, f"remove {path}", list[dict[str, Any]]) if path.exists() else []
        facts = {
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "after": list(after),
            "code": str(code),
            "resources": dataclasses.asdict(self.resources),
        }
        rows += [
            {"id": job.id, "on": job.on, "verb": job.verb, "share": job.share, "files": job.files, **facts}
            for job in jobs
        ]
        files.write_json(path, rows)
