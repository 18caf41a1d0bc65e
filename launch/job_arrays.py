"""Volumes shared out among the tasks of job arrays, and a last job that gathers what they made.

Each share (i, n) takes every n-th volume from the i-th and keeps its own record in
OUT/shares/NAME; pieces go straight into OUT, where the last job, the same verb without a share, finds them finished.
Shares that ended well are not sent again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hpc_neuro.core import files
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.pipeline import VERBS
from launch import job_end, jobs, slurm
from launch.site import Site


def submit(
    verb: str,
    cfg: Any,
    site: Site,
    on: Literal["slurm", "local"],
    after: Sequence[str],
    code: Path | None,
    count: int,
    command: Sequence[str] = (),
) -> list[jobs.Job]:
    """One job for count 1; else one per missing share, in arrays as long as the site takes, and the one that gathers.

    command: what shares run instead of the verb, `share=[i,n]` appended. Raises ConfigError for a verb that cannot be
    shared out.
    """
    if count == 1:
        return jobs.submit(verb, cfg, site, on=on, after=after, code=code)
    refuse(verb, on)
    jobs.refuse_twice(cfg.out)
    sent: list[jobs.Job] = []
    for part in chunks(missing(cfg.out, count), int(slurm.configuration()["MaxArraySize"])):
        sent += jobs.submit(verb, cfg, site, after=after, code=code, shares=part, command=command, beside=True)
    waits = [*after, *dict.fromkeys(job.id.partition("_")[0] for job in sent)]
    if command:
        return sent
    return sent + jobs.submit(verb, cfg, site, after=waits, code=code, beside=True)


def shares(verb: str, count: int, alone: bool) -> int:
    """How many shares a verb is cut into: in a chain, those that cannot be shared out stay whole."""
    return count if alone or VERBS[verb].divisible else 1


def refuse(verb: str, on: str) -> None:
    """Raise ConfigError where there can be no array."""
    if not VERBS[verb].divisible:
        divisible = ", ".join(name for name, row in VERBS.items() if row.divisible)
        raise ConfigError(f"--array: {verb} is one piece of work and cannot be shared out; only {divisible} can")
    if on != "slurm":
        raise ConfigError("--array: only Slurm has arrays; leave it out, or use --on slurm")


def missing(out: Path, count: int) -> list[tuple[int, int]]:
    """Shares of `count` that have not ended well."""
    return [(i, count) for i in range(count) if not _done(out / "launch" / jobs.share_name(i, count))]


def _done(folder: Path) -> bool:
    path = folder / job_end.ENDS
    return path.exists() and files.read_json(path, f"remove {path}")[-1]["exit"] == 0


def chunks(parts: Sequence[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Cut into arrays of `size` tasks at most, as even as can be; `size` is Slurm's MaxArraySize."""
    if not parts:
        return []
    number = -(-len(parts) // size)
    cuts = [round(i * len(parts) / number) for i in range(number + 1)]
    return [list(parts[a:b]) for a, b in itertools.pairwise(cuts)]


def last(sent: Sequence[jobs.Job]) -> list[str]:
    """What the next verb waits for."""
    return [sent[-1].id]


def text(sent: Sequence[jobs.Job]) -> str:
    """`job 12`, or `40 tasks in arrays 12, 13, then job 14`."""
    shares = [job for job in sent if job.share]
    arrays = ", ".join(dict.fromkeys(job.id.partition("_")[0] for job in shares))
    end = f"job {sent[-1].id}" if not sent[-1].share else ""
    return ", then ".join(filter(None, [f"{len(shares)} tasks in arrays {arrays}" if shares else "", end]))
