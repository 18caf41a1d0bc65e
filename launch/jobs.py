"""Submitting verbs as jobs into run folders, and asking after many of them at once.

OUT/launch/         code/  config.yaml  jobs.json  ends.json  starts/  logs/
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import submitit

from hpc_neuro.core import files, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import LAUNCHABLE
from launch import job_end, slurm
from launch.site import Resources, Site
from launch.snapshot import snapshot
from launch.supervise import Task

State = Literal["queued", "running", "done", "failed", "cancelled", "lost"]
JOBS = "jobs.json"


@dataclass(frozen=True)
class Job:
    """One submitted verb."""

    id: str  # Slurm's; the process's without Slurm
    on: Literal["slurm", "local"]
    verb: str
    out: Path  # run folder
    share: str = ""  # which of an array's shares, `0003_of_0010`

    @property
    def folder(self) -> Path:
        """Where its starts and ends are recorded."""
        return self.out / "launch" / self.share if self.share else self.out / "launch"

    def end(self) -> dict[str, Any] | None:
        """The last recorded end (reason, exit, put_back, at), None before there is one."""
        path = self.folder / job_end.ENDS
        if not path.exists():
            return None
        mine = [e for e in files.read_json(path, f"remove {path}") if e["start"].rpartition(".")[0].endswith(self.id)]
        return mine[-1] if mine else None


def load(verb: str, config: Path | None, keys: Sequence[str], values: Mapping[str, Any] | None = None) -> Any:
    """Load the config of a verb; `values` are as in `schema.load`. Raises ConfigError."""
    if verb not in LAUNCHABLE:
        raise ConfigError(f"{verb!r} is not one of the verbs that can be launched: {', '.join(LAUNCHABLE)}")
    return schema.load(LAUNCHABLE[verb].load_config_class(), config, keys, values)


def submit(
    verb: str,
    cfg: Any,
    site: Site,
    *,
    on: Literal["slurm", "local"] = "slurm",
    after: Sequence[str] = (),
    code: Path | None = None,
    shares: Sequence[tuple[int, int]] = (),
    command: Sequence[str] = (),
    beside: bool = False,
) -> list[Job]:
    """Submit a verb with a config (of `load`) into its run folder; returns one Job, or one per share.

    after: ids of jobs that must end well first. code: a snapshot to share with other jobs; none: one is made in the
    run folder. shares: (i, n) pairs, one job array; at most as many as the site's MaxArraySize. command: instead of the
    verb itself. Checks nothing but that the folder has no job already (beside: it may): see `checks.check`.
    """
    if not beside:
        refuse_twice(cfg.out)
    launch = cfg.out.resolve() / "launch"
    copy = snapshot(code or launch / "code")
    asked = site.resources(verb)
    parts: list[tuple[int, int] | None] = [*shares] or [None]
    tasks = [_task(verb, cfg, site, asked, copy, on, part, command) for part in parts]
    executor = _executor(launch / "logs", site, asked, tasks, on, after, verb)
    with _clean_environment():
        try:
            handles = executor.submit_array(tasks)
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
            raise InputError(f"no job was taken: {' '.join(str(error).split())}") from None
    names = [share_name(*part) if part else "" for part in parts]
    jobs = [Job(h.job_id, on, verb, cfg.out.resolve(), name) for h, name in zip(handles, names, strict=True)]
    _remember(jobs, copy, asked, after)
    return jobs


def poll(jobs: Sequence[Job], poller: slurm.Poller) -> dict[str, State]:
    """State of every job by id, with one call to Slurm for all; waits as the poller says."""
    known = poller.states([j.id for j in jobs if j.on == "slurm"]) if any(j.on == "slurm" for j in jobs) else {}
    return {j.id: _state(j, known.get(j.id)) for j in jobs}


def _state(job: Job, said: str | None) -> State:
    """What Slurm says, and after that what the folder says."""
    if said is not None and slurm.active(said):
        return "running" if said in ("RUNNING", "COMPLETING") else "queued"
    end = job.end()
    if said in ("COMPLETED", None) and end is not None and not end["put_back"]:
        return "done" if end["exit"] == 0 else "cancelled" if end["reason"] == "cancelled" else "failed"
    if said is not None:
        return "cancelled" if said == "CANCELLED" else "done" if said == "COMPLETED" else "failed"
    return "running" if job.on == "local" and Path(f"/proc/{job.id}").exists() else "lost"


def cancel(jobs: Sequence[Job]) -> None:
    """End jobs, queued or running; those that ended already are passed over."""
    if ids := [j.id for j in jobs if j.on == "slurm"]:
        slurm.ask("scancel", "--quiet", *ids)
    for job in jobs:
        if job.on == "local":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(job.id), signal.SIGTERM)


def read(out: Path) -> list[Job]:
    """Jobs that were submitted into a run folder, the oldest first. Raises InputError when there are none."""
    path = out / "launch" / JOBS
    rows = files.read_json(path, f"nothing was launched into {out}; give the run folder of a launched verb")
    return [Job(r["id"], r["on"], r["verb"], out.resolve(), r["share"]) for r in rows]


def refuse_twice(out: Path) -> None:
    """Raise InputError when a job of this run folder is queued or running: two must never write into one folder."""
    if not (out / "launch" / JOBS).exists():
        return
    jobs = read(out)
    busy = [i for i, state in poll(jobs, slurm.Poller()).items() if state in ("queued", "running")]
    if busy:
        raise InputError(
            f"{out} already has a job, {', '.join(busy[:5])}; wait for it, or `python -m launch cancel {out}` first"
        )


def share_name(index: int, count: int) -> str:
    """Name of one share of an array."""
    return f"{index:04d}_of_{count:04d}"


def run_folder(out: Path, share: str) -> Path:
    """Where a share keeps its own record."""
    return out / "shares" / share if share else out


def _task(
    verb: str,
    cfg: Any,
    site: Site,
    asked: Resources,
    code: Path,
    on: str,
    share: tuple[int, int] | None,
    command: Sequence[str],
) -> Task:
    launch = cfg.out.resolve() / "launch"
    name = share_name(*share) if share else ""
    files.write_text(launch / "config.yaml", schema.dump(cfg))
    words = [*command] or [sys.executable, "-m", "hpc_neuro", verb, str(launch / "config.yaml")]
    if share:
        words.append(f"share=[{share[0]},{share[1]}]")
    if on == "local" and asked.mpi != "none" and asked.tasks > 1:
        ours = Path(sys.executable).with_name("mpiexec")  # of the wheel; a site's own is found by its name
        words = [str(ours) if ours.exists() else "mpiexec", "-n", str(asked.tasks), *words]
    scratch = {"TMPDIR": str(site.scratch)} if site.scratch else {}
    threads = {"OMP_NUM_THREADS": str(asked.cpus_per_task)}
    return Task(
        command=(*shlex.split(site.container), *words),
        folder=launch / name,
        out=run_folder(cfg.out.resolve(), name),
        cwd=Path.cwd(),
        code=code,
        environment=threads | scratch | site.environment,
        interface=site.interface,
        signal_seconds=site.signal_seconds,
        max_requeue=site.max_requeue,
    )


def _executor(
    logs: Path, site: Site, asked: Resources, tasks: Sequence[Task], on: str, after: Sequence[str], verb: str
) -> Any:
    """submitit's executor with what this site and verb ask for."""
    setup = [f"module load {m}" for m in site.modules] + list(site.setup)
    setup.append(f"export PYTHONPATH={shlex.quote(str(tasks[0].code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    if on == "local":
        executor = submitit.LocalExecutor(logs)
        executor.update_parameters(
            timeout_min=asked.minutes,
            tasks_per_node=1 if asked.mpi != "none" else asked.tasks,
            gpus_per_node=asked.tasks * asked.gpus_per_task,
            signal_delay_s=site.signal_seconds,
            setup=setup,
        )
        return executor
    if shutil.which("sbatch") is None:
        raise InputError("sbatch is not on this machine; submit from a login node of the cluster, or use --on local")
    folders = [(str(t.folder), str(t.out)) for t in tasks]
    which = "${SLURM_ARRAY_TASK_ID:-0}"
    wanted = {
        "job_name": f"{verb}:{tasks[0].out.name}",
        "time": asked.minutes,
        "nodes": asked.nodes,
        "ntasks_per_node": asked.tasks_per_node,
        "cpus_per_task": asked.cpus_per_task,
        **site.gpus(asked),
        "mem": f"{int(asked.memory_gb * 1024)}M" if asked.memory_gb else None,
        "partition": asked.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclusive": site.exclusive or None,
        "dependency": f"afterok:{':'.join(after)}" if after else None,
        "signal_delay_s": site.signal_seconds,
        "array_parallelism": site.at_once,
        "stderr_to_stdout": True,
        # bash must outlive a SIGTERM, to say how the job ended
        "setup": [
            *setup,
            f"folders=({' '.join(shlex.quote(f) for f, _ in folders)})",
            f"outs=({' '.join(shlex.quote(o) for _, o in folders)})",
            "trap : TERM USR1 USR2",
        ],
        "teardown": [
            f'{shlex.quote(sys.executable)} -m launch.job_end "${{folders[{which}]}}" "${{outs[{which}]}}" '
            f"{asked.tasks} {site.max_requeue} {site.signal_seconds} $?"
        ],
        # --wait: when one rank has ended the others have this long, then srun ends them
        "srun_args": [f"--mpi={asked.mpi}", f"--wait={max(60, site.signal_seconds)}", "--kill-on-bad-exit=0"],
        "additional_parameters": {"requeue": True, **({"kill-on-invalid-dep": "yes"} if after else {})},
    }
    executor = submitit.SlurmExecutor(logs)
    executor.update_parameters(**{k: v for k, v in wanted.items() if v is not None})
    return executor


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Without the variables of the job that this may itself be running in (a driver of many trials)."""
    prefixes = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    held = {k: v for k, v in os.environ.items() if (k.startswith(prefixes) or k in names) and k != "SLURM_CONF"}
    for name in held:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(held)


def _remember(jobs: Sequence[Job], code: Path, asked: Resources, after: Sequence[str]) -> None:
    """Append to OUT/launch/jobs.json."""
    path = jobs[0].out / "launch" / JOBS
    rows = files.read_json(path, f"remove {path}") if path.exists() else []
    facts = {
        "at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "after": list(after),
        "code": str(code),
        "resources": dataclasses.asdict(asked),
    }
    rows += [{"id": j.id, "on": j.on, "verb": j.verb, "share": j.share, **facts} for j in jobs]
    files.write_json(path, rows)
