"""What can be known to fail is refused before the queue: config, files, space, memory, time, limits, network.

Takes seconds on a login node and writes nothing. Any fault refuses the submission; all faults are named at once.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.files import format_count
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS
from launch import forecast, slurm, status, submit
from launch.executors.cluster import QUEUES
from launch.site import Resources, Site, require_plain_path
from launch.status import Place

Stage = tuple[str, Any]
"""(verb, its config)."""

_UP_STATES = ("idle", "mixed", "allocated", "completing", "reserved", "planned")
"""sinfo's states of nodes that take jobs."""
_START_SECONDS = 60
"""[s] What a job needs before its first step: Python, torch, opening the store."""


def check(
    stages: Sequence[Stage],
    site: Site,
    on: Place,
    count: int = 1,
    after: Sequence[str] = (),
    is_here: bool = True,
) -> list[str]:
    """Check a submission and return lines for people about what will run. Raises ConfigError with every fault.

    stages: of which later ones may read what earlier ones will write. count: shares of an array. after: ids of jobs to
    wait for. is_here: whether this is a machine of the cluster; elsewhere nothing is asked of it, and a line says so.
    """
    faults: list[str] = []
    lines: list[str] = []
    written: set[Path] = set()

    for verb, cfg in stages:
        resources = site.resources(verb)
        # Collect everything: a user should not have to submit once per fault.
        faults += _find_folder_faults(verb, cfg, site, on, is_here, submit.count_shares(verb, count, len(stages) == 1))
        verb_faults, verb_lines = forecast.forecast_verb(verb, cfg, resources, site, written)
        verb_faults += find_task_faults(verb, resources)
        if on != "local":
            verb_faults += find_time_faults(cfg, resources, site)

        faults += [f"{verb}: {fault}" for fault in verb_faults]
        lines += [f"{verb}: {line}" for line in verb_lines]
        # Verbs after this one will find its folder when they start.
        written.add(cfg.out.resolve())

    # The cluster is asked last: it takes longest.
    if on == "slurm" and is_here:
        try:
            faults += _find_cluster_faults(stages, site, count, after)
            if not faults:
                lines += [line for verb, _ in stages for line in describe_partition(site.resources(verb))]
        except InputError as error:
            faults.append(str(error))

    if is_here:
        faults += find_container_faults(site) + _find_interface_faults(site)
    if on in QUEUES:
        faults += [fault for verb, _ in stages for fault in _find_queue_options_faults(on, verb, site)]
    if on != "local":
        lines += _describe_unchecked(on, is_here)

    if faults:
        raise ConfigError("not submitted:\n" + "\n".join(f"  {fault}" for fault in dict.fromkeys(faults)))

    return list(dict.fromkeys(lines))


# ----------------------------------------------------------------------------------------- without asking the cluster


def _find_queue_options_faults(on: str, verb: str, site: Site) -> list[str]:
    """What PBS or LSF cannot give a verb."""
    try:
        QUEUES[on](site, Path(), verb)
    except ConfigError as error:
        return [str(error)]
    return []


def _describe_unchecked(on: str, is_here: bool) -> Iterator[str]:
    """A sentence on what only the cluster could say."""
    if not is_here:
        yield (
            f"{on} does not answer on this machine, so these are not checked: the queue or partition, the account, "
            "limits of time and jobs, cores, memory and GPUs of the nodes, the network interface, the container, and "
            "whether a job is in the run folder already"
        )
    elif on in QUEUES:
        yield (
            f"{on} is not asked beforehand: it checks the queue, the account, limits, cores, memory and GPUs of the "
            "nodes when the job is submitted"
        )


def _find_folder_faults(verb: str, cfg: Any, site: Site, on: Place, is_here: bool, shares: int) -> list[str]:
    """Faults of the run folder, and of dividing the verb into shares."""
    faults = []

    try:
        require_plain_path("out", cfg.out)
        if is_here:
            status.require_idle(cfg.out)
        if shares > 1:
            submit.require_divisible(verb, on, site, shares)
    except (ConfigError, InputError) as error:
        faults.append(str(error))

    return faults


def find_task_faults(verb: str, resources: Resources) -> list[str]:
    """Faults of the number of processes of a verb, and of how they find each other."""
    tasks, row = resources.tasks, VERBS[verb]
    # torch.distributed gets its variables from the supervisor; MPI needs help from srun.
    if tasks == 1 or row.ranks == "torch":
        return []

    if row.ranks is None:
        advice = "; share volumes out with --array" if row.divisible else ""
        return [f"nodes, tasks_per_node: {verb} runs in one process, {tasks} would do the same{advice}"]

    if resources.mpi == "none":
        return [f"mpi: {tasks} processes of {verb} find each other by MPI; give pmi2 (MPICH) or pmix (Open MPI)"]

    return []


def find_time_faults(cfg: Any, resources: Resources, site: Site) -> list[str]:
    """Faults of the time limit of one start against what starting and stopping take."""
    checkpoint = getattr(cfg, "checkpoint", None)
    # Training has a clock of its own besides the signal; the earlier of the two stops it.
    margin = max(site.signal_seconds, getattr(checkpoint, "margin", 0.0))
    if 60 * resources.minutes >= margin + _START_SECONDS:
        return []

    return [
        f"minutes: {resources.minutes} min leave no time to work: a start takes {_START_SECONDS} s, stopping begins "
        f"{margin:.0f} s before the end; give more minutes, or less cluster.signal_seconds (and checkpoint.margin)"
    ]


def find_container_faults(site: Site) -> list[str]:
    """Faults of the image files that the container's words name."""
    # Words that are no image files are commands or options, which cannot be checked here.
    images = [word for word in shlex.split(site.container) if word.endswith((".sif", ".sqsh", ".img"))]
    return [
        f"cluster.container: {image} does not exist; give the image's path"
        for image in images
        if not Path(image).exists()
    ]


def _find_interface_faults(site: Site) -> list[str]:
    # NCCL and gloo fail after minutes with an obscure message when the interface is absent.
    folder = Path("/sys/class/net")
    if not site.interface or not site.interface_on_login or (folder / site.interface).exists():
        return []

    interfaces = ", ".join(sorted(path.name for path in folder.iterdir()))
    return [
        f"cluster.interface: there is no {site.interface} here, only {interfaces}; correct it, or say "
        "interface_on_login: false where only the nodes have it"
    ]


# ------------------------------------------------------------------------------------------------ against the cluster


def _find_cluster_faults(stages: Sequence[Stage], site: Site, count: int, after: Sequence[str]) -> list[str]:
    """Faults of what is asked for against the cluster. Raises InputError when Slurm does not answer."""
    faults = []
    for verb, _ in stages:
        faults += [f"{verb}: {fault}" for fault in find_partition_faults(site.resources(verb), site)]

    faults += find_account_faults(site)

    states = slurm.read_job_states()
    faults += _find_queue_faults(stages, site, count, states)
    for job in after:
        faults += _find_dependency_faults(job, states)

    return faults


def find_partition_faults(resources: Resources, site: Site) -> list[str]:
    """Faults of the resources of a verb against the partition, by scontrol and sinfo."""
    # Without a partition nothing else can be checked.
    partitions = slurm.read_partitions()
    name = slurm.choose_partition(partitions, resources.partition)
    if name is None:
        wanted = resources.partition
        problem = f"there is no partition {wanted}" if wanted else "the cluster has no default partition"
        return [f"{problem}; set cluster.partition to one of {', '.join(partitions)}"]

    partition, faults = partitions[name], []
    if partition.get("State") != "UP":
        faults.append(f"partition {name} is {partition.get('State')}; choose another with cluster.partition")

    allowed = partition.get("AllowAccounts", "ALL")
    if site.account and allowed != "ALL" and site.account not in allowed.split(","):
        faults.append(f"cluster.account: {name} takes no jobs of {site.account}, only of {allowed}")

    longest = slurm.parse_minutes(partition.get("MaxTime", "UNLIMITED"))
    if longest is not None and resources.minutes > longest:
        faults.append(
            f"minutes: {resources.minutes} is above {name}'s limit of {longest}; give less, a job is put back until "
            "done"
        )

    # MaxNodes limits one job, TotalNodes the partition.
    max_nodes = partition.get("MaxNodes", "UNLIMITED")
    nodes = int(partition.get("TotalNodes", "0"))
    nodes = min(nodes, int(max_nodes)) if max_nodes.isdecimal() else nodes
    if resources.nodes > nodes:
        faults.append(f"nodes: {resources.nodes} asked for, {name} gives at most {nodes}")

    return faults + _find_node_faults(name, resources, site) + _find_mpi_faults(resources)


def _find_mpi_faults(resources: Resources) -> list[str]:
    if resources.mpi == "none":
        return []

    # The first words are `MPI plugin types are...`.
    plugins = slurm.run_command("srun", "--mpi=list").split()
    if resources.mpi in plugins:
        return []

    return [f"mpi: this srun does not know {resources.mpi}; it knows {', '.join(plugins[4:])}"]


def _find_node_faults(partition: str, resources: Resources, site: Site) -> list[str]:
    """Faults of what each node must have; each is measured at the node that has most of it."""
    kinds, faults = slurm.read_node_kinds(partition), []
    tasks = resources.tasks_per_node

    cores, most_cores = tasks * resources.cpus_per_task, max(kind.cores for kind in kinds)
    if cores > most_cores:
        faults.append(
            f"{tasks} tasks of {resources.cpus_per_task} cores want {cores} per node, {partition} has {most_cores}"
        )

    memory_mb, most_memory_mb = (resources.memory_gb or 0) * 1024, max(kind.memory_mb for kind in kinds)
    if memory_mb > most_memory_mb:
        faults.append(
            f"memory_gb: {resources.memory_gb:g} asked for, {partition} has nodes of {most_memory_mb / 1024:.0f} GB"
        )

    faults += _find_gpu_faults(partition, kinds, resources, site)

    # Operators between features are & and |; each feature must exist somewhere.
    required = set(filter(None, re.split("[|&]", site.constraint or "")))
    unknown = required.difference(*(kind.features for kind in kinds))
    if unknown:
        faults.append(f"cluster.constraint: no node of {partition} has {', '.join(sorted(unknown))}")

    return faults


def _find_gpu_faults(partition: str, kinds: Sequence[slurm.NodeKind], resources: Resources, site: Site) -> list[str]:
    tasks, gpus, faults = resources.tasks_per_node, resources.gpus_per_node, []

    # A number in cluster.gres must agree with what the tasks take.
    gpu_type, requested = slurm.parse_gres(str(site.gpu_options(resources).get("gres", f"gpu:{gpus}")))
    if requested != gpus:
        faults.append(
            f"cluster.gres: {site.gres} asks for {requested} GPUs per node, but {tasks} tasks of "
            f"{resources.gpus_per_task} want {gpus}; leave the number out of it, or change gpus_per_task"
        )

    most_gpus = max(slurm.count_gpus(kind.gres, gpu_type) for kind in kinds)
    if gpus > most_gpus:
        name = f"GPUs of type {gpu_type}" if gpu_type else "GPUs"
        faults.append(
            f"{tasks} tasks of {resources.gpus_per_task} {name} want {gpus} per node, {partition} has {most_gpus}"
        )

    return faults


def find_account_faults(site: Site) -> list[str]:
    """Faults of cluster.account and cluster.qos, where Slurm enforces associations."""
    associations = slurm.read_associations()
    if associations is None:
        return []

    usable = [a for a in associations if site.account in (None, a.account)]
    if not usable:
        accounts = ", ".join(a.account for a in associations) or "none"
        return [
            f"cluster.account: there is no account {site.account or 'for you'}; yours are {accounts}, see "
            "`sacctmgr show assoc user=$USER`"
        ]

    # A quality of service may be open in one account only.
    services = dict.fromkeys(qos for a in usable for qos in a.qos)
    if site.qos and site.qos not in services:
        user = f"account {site.account}" if site.account else "you"
        return [f"cluster.qos: {site.qos} is not open to {user}; open are {', '.join(services) or 'none'}"]

    return []


def find_max_jobs(site: Site) -> int | None:
    """How many jobs the account may have queued; None: no limit is known."""
    limits = [a.max_jobs for a in slurm.read_associations() or () if site.account in (None, a.account)]
    # One account without a limit means that no limit applies.
    finite = [limit for limit in limits if limit is not None]
    return max(finite) if finite and len(finite) == len(limits) else None


def _find_queue_faults(stages: Sequence[Stage], site: Site, count: int, states: Mapping[str, str]) -> list[str]:
    """Faults of how many jobs there will be."""
    faults = []
    configuration = slurm.read_configuration()
    shares = [(cfg.out, submit.count_shares(verb, count, len(stages) == 1)) for verb, cfg in stages]
    if any(number > 1 for _, number in shares) and configuration["MaxArraySize"] == "0":
        faults.append("--array: this Slurm has no job arrays (MaxArraySize=0); leave it out")

    # The job that gathers comes after the shares.
    new = sum(len(submit.find_missing_shares(out, number)) + 1 if number > 1 else 1 for out, number in shares)
    # Limits count every task of an array.
    waiting = sum(map(slurm.is_active, states.values()))
    limits = {
        "cluster.max_jobs": site.max_jobs,
        "your account's MaxSubmitJobs": find_max_jobs(site),
        "Slurm's MaxJobCount": int(configuration["MaxJobCount"]),
    }

    for name, limit in limits.items():
        if limit is not None and waiting + new > limit:
            jobs = format_count(new, "new job")
            faults.append(
                f"{jobs} beside {waiting} that are queued would exceed {name}, {limit}; give a smaller --array"
            )

    return faults


def _find_dependency_faults(job: str, states: Mapping[str, str]) -> list[str]:
    """Faults of a job, or of an array, to wait for."""
    # An array is known by its tasks.
    own_states = {state for name, state in states.items() if name == job or name.startswith(f"{job}_")}
    if not own_states:
        return [f"--after {job}: Slurm knows no such job"]

    failed = sorted(state for state in own_states if not slurm.is_active(state) and state != "COMPLETED")
    if failed:
        return [f"--after {job}: it ended as {failed[0]}, so a job that waits for it would never start"]

    return []


def describe_partition(resources: Resources) -> list[str]:
    """How many nodes of the partition are up, if too few, and how its jobs are preempted."""
    partitions = slurm.read_partitions()
    name = slurm.choose_partition(partitions, resources.partition) or next(iter(partitions))
    lines = [*_describe_nodes(name, resources), *_describe_preemption(partitions[name])]
    return [f"partition {name}: {line}" for line in lines]


def _describe_nodes(partition: str, resources: Resources) -> Iterator[str]:
    nodes = slurm.read_node_states(partition)
    down = [f"{node} is {state}" for node, state in nodes.items() if state not in _UP_STATES]
    up = len(nodes) - len(down)
    if up < resources.nodes:
        yield f"{up} of {len(nodes)} nodes are up now ({', '.join(down)}); the job waits for them"


def _describe_preemption(partition: dict[str, str]) -> Iterator[str]:
    mode, grace = partition.get("PreemptMode", "OFF"), partition.get("GraceTime", "0")
    if mode == "OFF":
        return

    if mode != "REQUEUE":
        yield f"Slurm does not put preempted jobs back here (PreemptMode={mode}); a job told in time does it by itself"
        return

    if grace == "0":
        yield "preemption comes without warning (GraceTime=0); a job goes on from its last checkpoint"
        return

    # Without this parameter Slurm preempts with SIGTERM, whatever signal the job asked for.
    parameters = slurm.read_configuration().get("SlurmctldParameters", "")
    sends_warning = "preempt_send_user_signal" in parameters
    warning = "the stop signal" if sends_warning else "SIGTERM, as preempt_send_user_signal is not set"
    yield f"a preempted job is told by {warning} and has {grace} s to save"
