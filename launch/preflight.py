"""Everything that can be known to fail is said before the queue: config, files, space, memory, time, limits, network.

Takes seconds on a login node and writes nothing. A fault refuses the submission; all faults are said at once.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS
from launch import accounts, forecast, job_arrays, jobs, slurm
from launch.site import Resources, Site

_UP = ("idle", "mixed", "allocated", "completing", "reserved", "planned")  # sinfo's states of nodes that take jobs
_START_SECONDS = 60  # [s] what a job needs before its first step: Python, torch, opening the store


def check(
    stages: Sequence[tuple[str, Any]],
    site: Site,
    on: Literal["slurm", "local"],
    count: int = 1,
    after: Sequence[str] = (),
) -> list[str]:
    """Lines for people about what will run. Raises ConfigError with every fault found.

    stages: (verb, config), of which later ones may read what earlier ones will write. count: shares of an array.
    """
    faults: list[str] = []
    lines: list[str] = []
    made: set[Path] = set()
    for verb, cfg in stages:
        try:
            jobs.refuse_twice(cfg.out)
            if job_arrays.shares(verb, count, len(stages) == 1) > 1:
                job_arrays.refuse(verb, on)
        except (ConfigError, InputError) as error:
            faults.append(str(error))
        asked = site.resources(verb)
        found, said = forecast.of(verb, cfg, asked, site, made)
        faults += [f"{verb}: {f}" for f in found]
        lines += [f"{verb}: {line}" for line in said]
        made.add(cfg.out.resolve())
        faults += [f"{verb}: {f}" for f in tasks(verb, asked)]
        if on == "slurm":
            faults += [f"{verb}: {f}" for f in times(cfg, asked, site)]
    if on == "slurm":
        try:
            faults += [f for verb, _ in stages for f in limits(verb, site.resources(verb), site)]
            faults += [*accounts.faults(site), *_queue(stages, site, count, after)]
            if not faults:
                lines += [line for verb, _ in stages for line in remarks(site.resources(verb))]
        except InputError as error:
            faults.append(str(error))
    faults += _container(site)
    if site.interface and site.interface_on_login and not (Path("/sys/class/net") / site.interface).exists():
        there = ", ".join(sorted(p.name for p in Path("/sys/class/net").iterdir()))
        faults.append(
            f"cluster.interface: there is no {site.interface} here, only {there}; correct it, or say "
            "interface_on_login: false where only the nodes have it"
        )
    if faults:
        raise ConfigError("not submitted:\n" + "\n".join(f"  {f}" for f in dict.fromkeys(faults)))
    return list(dict.fromkeys(lines))


def _container(site: Site) -> list[str]:
    """Faults of the image that the container's words name; what is not a path is of no concern here."""
    images = [w for w in shlex.split(site.container) if w.endswith((".sif", ".sqsh", ".img"))]
    return [f"cluster.container: {w} does not exist; give the image's path" for w in images if not Path(w).exists()]


def tasks(verb: str, asked: Resources) -> list[str]:
    """Faults of how many processes a verb is given, and of how they are to find each other."""
    ranks = VERBS[verb].ranks
    if asked.tasks == 1 or ranks == "torch":
        return []
    if ranks is None:
        more = "; share volumes out with --array" if VERBS[verb].divisible else ""
        return [f"nodes, tasks_per_node: {verb} runs in one process, {asked.tasks} would do the same{more}"]
    if asked.mpi == "none":
        return [f"mpi: {asked.tasks} processes of {verb} find each other by MPI; give pmi2 (MPICH) or pmix (Open MPI)"]
    return []


def times(cfg: Any, asked: Resources, site: Site) -> list[str]:
    """Faults of the time limit against what stopping takes."""
    limit, faults = 60 * asked.minutes, []
    margin = max(site.signal_seconds, getattr(getattr(cfg, "checkpoint", None), "margin", 0.0))
    if limit < margin + _START_SECONDS:
        faults.append(
            f"minutes: {asked.minutes} min leave no time to work: a start takes {_START_SECONDS} s, stopping begins "
            f"{margin:.0f} s before the end; give more minutes, or less cluster.signal_seconds (and checkpoint.margin)"
        )
    return faults


def limits(verb: str, asked: Resources, site: Site) -> list[str]:
    """Faults of what is asked for against the partition, by scontrol and sinfo."""
    partitions = {
        f["PartitionName"]: f for f in map(slurm.fields, slurm.ask("scontrol", "show", "partition", "-o").splitlines())
    }
    name = asked.partition or next((n for n, f in partitions.items() if f.get("Default") == "YES"), None)
    if name not in partitions:
        what = f"there is no partition {name}" if name else "the cluster has no default partition"
        return [f"{verb}: {what}; set cluster.partition to one of {', '.join(partitions)}"]
    facts = partitions[name]
    faults = []
    if facts.get("State") != "UP":
        faults.append(f"partition {name} is {facts.get('State')}; choose another with cluster.partition")
    allowed = facts.get("AllowAccounts", "ALL")
    if site.account and allowed != "ALL" and site.account not in allowed.split(","):
        faults.append(f"cluster.account: {name} takes no jobs of {site.account}, only of {allowed}")
    longest = minutes(facts.get("MaxTime", "UNLIMITED"))
    if longest is not None and asked.minutes > longest:
        faults.append(
            f"minutes: {asked.minutes} is above {name}'s limit of {longest}; give less, a job is put back until done"
        )
    most = facts.get("MaxNodes", "UNLIMITED")
    nodes = min(int(facts.get("TotalNodes", "0")), int(most) if most.isdigit() else 1 << 30)
    if asked.nodes > nodes:
        faults.append(f"nodes: {asked.nodes} asked for, {name} gives at most {nodes}")
    faults += _per_node(name, asked, site)
    if asked.mpi != "none" and asked.mpi not in (kinds := slurm.ask("srun", "--mpi=list").split()):
        faults.append(f"mpi: this srun does not know {asked.mpi}; it knows {', '.join(kinds[4:])}")
    return [f"{verb}: {f}" for f in faults]


def _per_node(name: str, asked: Resources, site: Site) -> list[str]:
    """Faults of what each node must have; one node that has it all is enough."""
    rows = [row.split("|") for row in slurm.ask("sinfo", "-h", "-e", "-p", name, "-o", "%c|%m|%G|%f").splitlines()]
    cores = asked.tasks_per_node * asked.cpus_per_task
    gpus = asked.tasks_per_node * asked.gpus_per_task
    faults = []
    if cores > (most := max(int(r[0].rstrip("+")) for r in rows)):
        faults.append(
            f"{asked.tasks_per_node} tasks of {asked.cpus_per_task} cores want {cores} per node, {name} has {most}"
        )
    if (asked.memory_gb or 0) * 1024 > (memory := max(int(r[1].rstrip("+")) for r in rows)):
        faults.append(f"memory_gb: {asked.memory_gb:g} asked for, {name} has nodes of {memory / 1024:.0f} GB")
    kind, given = _kind(str(site.gpus(asked).get("gres", f"gpu:{gpus}")))
    if given != gpus:
        faults.append(
            f"cluster.gres: {site.gres} asks for {given} GPUs per node, but {asked.tasks_per_node} tasks of "
            f"{asked.gpus_per_task} want {gpus}; leave the number out of it, or change gpus_per_task"
        )
    if gpus > (held := max(_gpus(r[2], kind) for r in rows)):
        what = f"GPUs of type {kind}" if kind else "GPUs"
        faults.append(
            f"{asked.tasks_per_node} tasks of {asked.gpus_per_task} {what} want {gpus} per node, {name} has {held}"
        )
    wanted = set(filter(None, (site.constraint or "").replace("|", "&").split("&")))
    if unknown := wanted - {f for r in rows for f in r[3].split(",")}:
        faults.append(f"cluster.constraint: no node of {name} has {', '.join(sorted(unknown))}")
    return faults


def _kind(gres: str) -> tuple[str, int]:
    """(type, number) of `gpu:a100:4`, `gpu:4` or `gpu:a100`; "" for any type."""
    _, *words = gres.split(":")
    number = int(words.pop()) if words and words[-1].isdigit() else 1
    return (words[0] if words else "", number)


def _gpus(gres: str, kind: str = "") -> int:
    """Number of GPUs, of one type or any, in sinfo's `gpu:a100:4(S:0-1),shard:8`."""
    held = [_kind(part.partition("(")[0]) for part in gres.split(",") if part.startswith("gpu:")]
    return sum(number for name, number in held if kind in ("", name))


def minutes(text: str) -> int | None:
    """Slurm's `1-02:30:00` in minutes; None for UNLIMITED."""
    if not text[0].isdigit():
        return None
    days, _, clock = text.rpartition("-")
    hours, mins, _ = (int(n) for n in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + mins


def _queue(stages: Sequence[tuple[str, Any]], site: Site, count: int, after: Sequence[str]) -> list[str]:
    """Faults of how many jobs there will be, and of jobs to wait for."""
    held, faults = slurm.states(), []
    waiting = sum(slurm.active(s) for s in held.values())
    cut = [(cfg.out, job_arrays.shares(verb, count, len(stages) == 1)) for verb, cfg in stages]
    new = sum(len(job_arrays.missing(out, n)) + 1 if n > 1 else 1 for out, n in cut)
    known = slurm.configuration()
    if any(n > 1 for _, n in cut) and known["MaxArraySize"] == "0":
        faults.append("--array: this Slurm has no job arrays (MaxArraySize=0); leave it out")
    for limit, name in (
        (site.max_jobs, "cluster.max_jobs"),
        (accounts.most_jobs(site), "your account's MaxSubmitJobs"),
        (int(known["MaxJobCount"]), "Slurm's MaxJobCount"),
    ):
        if limit is not None and waiting + new > limit:
            faults.append(
                f"{new} new jobs beside {waiting} that are queued exceed {name}, {limit}; give a smaller --array"
            )
    for job in after:
        states = {s for name, s in held.items() if name == job or name.startswith(f"{job}_")}
        if not states:
            faults.append(f"--after {job}: Slurm knows no such job")
        elif bad := [s for s in sorted(states) if not slurm.active(s) and s != "COMPLETED"]:
            faults.append(f"--after {job}: it ended as {bad[0]}, so a job that waits for it would never start")
    return faults


def remarks(asked: Resources) -> list[str]:
    """How many nodes of the partition are at work, if too few, and how its jobs are told to stop."""
    words = ["scontrol", "show", "partition", "-o", *([asked.partition] if asked.partition else [])]
    found = [slurm.fields(line) for line in slurm.ask(*words).splitlines()]
    facts = next((f for f in found if asked.partition or f.get("Default") == "YES"), found[0])
    name, mode = facts["PartitionName"], facts.get("PreemptMode", "OFF")
    nodes = dict(line.split() for line in slurm.ask("sinfo", "-h", "-N", "-p", name, "-o", "%N %T").splitlines())
    up = [n for n, state in nodes.items() if state in _UP]
    lines = []
    if len(up) < asked.nodes:
        down = ", ".join(f"{n} is {state}" for n, state in nodes.items() if n not in up)
        lines.append(f"partition {name}: {len(up)} of {len(nodes)} nodes are up now ({down}); the job waits for them")
    if mode == "OFF":
        return lines
    grace = facts.get("GraceTime", "0")
    told = "preempt_send_user_signal" in slurm.configuration().get("SlurmctldParameters", "")
    how = "the stop signal" if told else "SIGTERM, as preempt_send_user_signal is not set"
    if mode != "REQUEUE":
        said = f"Slurm does not put preempted jobs back here (PreemptMode={mode}); a job told in time does it by itself"
    elif grace == "0":
        said = "preemption comes without warning (GraceTime=0); a job goes on from its last checkpoint"
    else:
        said = f"a preempted job is told by {how} and has {grace} s to save"
    return [*lines, f"partition {name}: {said}"]
