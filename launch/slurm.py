"""Questions to Slurm and its answers as values: jobs, partitions, nodes, accounts, configuration.

One call answers for all jobs, and `Poller` repeats it ever more rarely while nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hpc_neuro.core.schema import InputError

_ACTIVE_STATES = frozenset({"PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "PREEMPTED"})
_ARRAY_ID = re.compile(r"(\d+)_\[([^\]%]*)")
_JOB_LINE = re.compile(r"(?P<job>\d[^|\s]*)\|(?P<state>[A-Z_]+)")
_INDEX_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")
_MAX_INDEX = 1 << 22
"""Largest index of an array; Slurm's own limit (MaxArraySize) is 4,000,001."""
_UNLISTED = "*"
"""Stands for the array indices that squeue left out of a shortened list."""
_MAX_FAILURES = 5
"""Calls in a row without an answer after which a poller gives up."""

# What a job inherits from the job that submits it: a driver may itself run inside an allocation.
_JOB_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI")
_JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def run_command(*words: str, timeout: float = 30.0) -> str:
    """Run a Slurm command and return its output.

    timeout: [s]. Raises InputError with the command's own message when it fails, is absent or does not answer.
    """
    if shutil.which(words[0]) is None:
        raise InputError(
            f"{words[0]} is not on this machine; submit from a login node of the cluster, or use --on local"
        )

    # A login node must not hang when the controller does.
    command = " ".join(words)

    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"`{command}` did not answer in {timeout:.0f} s; is the Slurm controller up?") from None

    # Slurm is installed but not configured, as on a workstation.
    if "Could not establish a configuration source" in result.stderr:
        raise InputError(
            f"`{words[0]}` is here but knows no cluster; set SLURM_CONF to a slurm.conf, submit from a login node, or "
            "use --on local"
        )
    if result.returncode:
        raise InputError(f"`{command}` failed: {' '.join(result.stderr.split()) or result.returncode}")

    return result.stdout


def require_controller(seconds: float = 5.0) -> None:
    """Raise InputError when there is no Slurm here, or no controller that answers within `seconds`."""
    try:
        run_command("scontrol", "ping", timeout=seconds)
    except InputError as error:
        # `scontrol ping` exits with 1 and prints nothing to standard error when the controller is down.
        message = str(error)
        if message.endswith("failed: 1"):
            message = message.removesuffix("failed: 1").strip() + ": the Slurm controller is down"
        raise InputError(message) from None


@functools.cache
def read_configuration() -> dict[str, str]:
    """Read `scontrol show config`, by name."""
    pairs = (line.partition("=") for line in run_command("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def list_job_variables(environment: Mapping[str, str]) -> list[str]:
    """Names of an environment's variables that belong to the job it runs in."""
    return [
        name
        for name in environment
        if (name.startswith(_JOB_PREFIXES) or name in _JOB_VARIABLES) and name != "SLURM_CONF"
    ]


@contextlib.contextmanager
def hide_own_job() -> Iterator[None]:
    """Take the variables of the job that this process runs in out of its environment, for what it submits.

    sbatch reads SBATCH_* and SLURM_* as options, and a trial would take itself for a rank of its driver's job.
    """
    hidden = {name: os.environ.pop(name) for name in list_job_variables(os.environ)}

    try:
        yield
    finally:
        os.environ.update(hidden)


# ---------------------------------------------------------------------------------------------------------- jobs


def read_job(job: str) -> dict[str, str]:
    """Read what scontrol knows of a job, by field; {} when it does not know the job, or does not answer."""
    try:
        lines = run_command("scontrol", "show", "job", "-o", job, timeout=20.0).splitlines()
    except InputError:
        return {}
    return parse_fields(lines[0]) if lines else {}


def parse_fields(line: str) -> dict[str, str]:
    """Parse one line of `scontrol show -o` into field -> value; the first of equal fields counts."""
    fields: dict[str, str] = {}

    for part in line.split():
        name, equals, value = part.partition("=")
        if equals:
            fields.setdefault(name, value)

    return fields


@contextlib.contextmanager
def explain_answer(command: str, line: str) -> Iterator[None]:
    """Turn a line of an answer that cannot be parsed into an InputError that shows it."""
    try:
        yield
    except ValueError:
        raise InputError(
            f"{command} answered {line[:200]!r}, which is of another form than Slurm's; ask the administrators"
        ) from None


def read_job_states() -> dict[str, str]:
    """Read the state of every job of this user that Slurm still knows, array tasks one by one (ARRAY_INDEX)."""
    # --array: one line per task; without it squeue shortens long lists of indices, `12_[1-3,5,...]`.
    options = ("--noheader", "--array", "--user", getpass.getuser(), "--states", "all", "--format", "%i|%T")
    states: dict[str, str] = {}

    for line in run_command("squeue", *options).splitlines():
        # What is no answer must not count as a job that Slurm does not know.
        answer = _JOB_LINE.fullmatch(line.strip())
        if answer is None:
            raise InputError(f"squeue answered {line[:200]!r}, where JOB|STATE is expected; ask the administrators")
        # One line may stand for several tasks of an array that wait.
        for task in expand_array_id(answer["job"]):
            states[task] = answer["state"]

    return states


def expand_array_id(job: str) -> list[str]:
    """Expand `12_[0-2,5%4]` into 12_0 12_1 12_2 12_5; an id without brackets is itself.

    A list that squeue has shortened (`12_[1,3,...]`) ends with `12_*`, which stands for the indices left out.
    """
    match = _ARRAY_ID.match(job)
    # A single job, or a task that squeue lists by itself.
    if match is None:
        return [job]

    # Without its end, the list was cut by the width of squeue's column.
    array, ranges = match.groups()
    tasks, is_complete = [], "]" in job or "%" in job

    for part in ranges.split(","):
        bounds = _INDEX_RANGE.fullmatch(part)
        # `...`, a number that was cut, or one that no array has.
        if bounds is None or int(bounds[2] or bounds[1]) > _MAX_INDEX or bounds[3] == "0":
            is_complete = False
            continue
        low, high, step = bounds.groups()
        tasks += [f"{array}_{index}" for index in range(int(low), int(high or low) + 1, int(step or 1))]

    return tasks if is_complete else [*tasks, f"{array}_{_UNLISTED}"]


def find_state(states: Mapping[str, str], job: str) -> str | None:
    """State of a job among those of `read_job_states`; None when Slurm does not know it (any more)."""
    # Tasks that have ended are listed one by one, so this concerns tasks that wait; an array of which none has begun
    # may be listed by its own number.
    array = job.partition("_")[0]
    return states.get(job, states.get(f"{array}_{_UNLISTED}", states.get(array)) if "_" in job else None)


def is_active(state: str) -> bool:
    """Whether a job in this state runs or will run."""
    return state in _ACTIVE_STATES


class Poller:
    """Asks for all jobs at once; the pause grows while nothing changes and when Slurm does not answer."""

    def __init__(
        self,
        first: float = 2.0,
        longest: float = 60.0,
        read: Callable[[], dict[str, str]] = read_job_states,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """first, longest: [s] bounds of the pause."""
        self.first, self.longest, self.pause = first, longest, 0.0
        self.sleep, self._read = sleep, read
        self._last: dict[str, str] = {}
        self.failures, self._has_answer = 0, False

    def poll(self, jobs: Sequence[str]) -> dict[str, str]:
        """State of these jobs, after the pause; one that Slurm does not know (any more) is missing.

        Raises InputError when Slurm does not answer the first call, and after six calls in a row without an answer.
        """
        if self.pause:
            self.sleep(self.pause)

        # A controller that restarts is silent for a while: the last known states serve meanwhile. Without any, jobs
        # that run would count as lost.
        try:
            all_states = self._read()
        except InputError:
            self.failures += 1
            if self.failures > _MAX_FAILURES or not self._has_answer:
                raise
            self.pause = min(self.longest, 2 * max(self.pause, self.first))
            return {job: state for job, state in self._last.items() if job in set(jobs)}

        self.failures, self._has_answer = 0, True
        states = {job: state for job in jobs if (state := find_state(all_states, job)) is not None}
        # Ask often while things happen, ever more rarely while nothing does.
        has_changed = states != self._last or not self.pause
        self.pause = self.first if has_changed else min(self.longest, 1.5 * self.pause)
        self._last = states
        return states


# ------------------------------------------------------------------------------- partitions, nodes and accounts


def read_partitions() -> dict[str, dict[str, str]]:
    """Read the fields of every partition, by its name."""
    lines = run_command("scontrol", "show", "partition", "-o").splitlines()
    partitions = [parse_fields(line) for line in lines]
    return {fields["PartitionName"]: fields for fields in partitions}


def choose_partition(partitions: Mapping[str, Mapping[str, str]], name: str | None) -> str | None:
    """The partition of this name, or the cluster's default for None; None when there is no such one."""
    if name is None:
        return next((key for key, fields in partitions.items() if fields.get("Default") == "YES"), None)
    return name if name in partitions else None


@dataclass(frozen=True)
class NodeKind:
    """What alike nodes of a partition have."""

    cores: int
    memory_mb: int
    gres: str
    features: frozenset[str]


def read_node_kinds(partition: str) -> list[NodeKind]:
    """Read the kinds of nodes of a partition."""
    lines = run_command("sinfo", "-h", "-e", "-p", partition, "-o", "%c|%m|%G|%f").splitlines()
    kinds = []

    for line in lines:
        with explain_answer("sinfo", line):
            cores, memory, gres, features = line.split("|")
            # `4+`: at least so many, where sinfo puts unlike nodes on one line.
            size = int(cores.rstrip("+")), int(memory.rstrip("+"))
        kinds.append(NodeKind(*size, gres, frozenset(features.split(","))))

    return kinds


def read_node_states(partition: str) -> dict[str, str]:
    """Read the state of every node of a partition."""
    lines = run_command("sinfo", "-h", "-N", "-p", partition, "-o", "%N %T").splitlines()
    states = {}
    for line in lines:
        with explain_answer("sinfo", line):
            node, state = line.split(maxsplit=1)
        states[node] = state
    return states


def parse_gres(gres: str) -> tuple[str, int]:
    """Parse `gpu:a100:4`, `gpu:4` or `gpu:a100` into (type, number); "" stands for any type."""
    _, *words = gres.split(":")
    # The type may be absent, and so may the number.
    number = int(words.pop()) if words and words[-1].isdecimal() else 1
    return (words[0] if words else "", number)


def count_gpus(gres: str, gpu_type: str = "") -> int:
    """Number of GPUs, of one type or any, in sinfo's `gpu:a100:4(S:0-1),shard:8`."""
    gpus = [parse_gres(part.partition("(")[0]) for part in gres.split(",") if part.startswith("gpu:")]
    return sum(number for name, number in gpus if gpu_type in ("", name))


def parse_minutes(limit: str) -> int | None:
    """Parse Slurm's `1-02:30:00` into minutes; None for UNLIMITED."""
    if not limit[0].isdecimal():
        return None
    # Days are optional, hours are not.
    days, _, clock = limit.rpartition("-")
    hours, minutes, _ = (int(number) for number in clock.split(":"))
    return int(days or 0) * 1440 + hours * 60 + minutes


@dataclass(frozen=True)
class Association:
    """What Slurm lets a user do in one account."""

    account: str
    qos: tuple[str, ...]
    max_jobs: int | None
    """MaxSubmitJobs; None: no limit."""

    @classmethod
    def parse(cls, line: str) -> Association:
        """Parse `account|qos,qos|limit` of sacctmgr."""
        with explain_answer("sacctmgr", line):
            account, qos, limit = line.split("|")
            return cls(account, tuple(filter(None, qos.split(","))), int(limit) if limit else None)


def read_associations() -> tuple[Association, ...] | None:
    """Read the associations of this user; None where Slurm does not enforce them and takes every account."""
    # Where associations are not enforced, there may be no accounting daemon to ask.
    enforced = read_configuration().get("AccountingStorageEnforce", "none").split(",")
    if not {"associations", "limits", "qos", "safe"} & set(enforced):
        return None

    words = ("sacctmgr", "-nP", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos,maxsubmit")
    return tuple(Association.parse(line) for line in run_command(*words).splitlines())
