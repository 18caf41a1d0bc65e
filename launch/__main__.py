"""The command line: `python -m launch VERB [CONFIG] [key=value ...] --on local|slurm --cluster SITE`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_neuro.core.schema import ConfigError, InputError

USAGE = """python -m launch VERB [CONFIG.yaml] [key=value ...] [options]      one verb as a job in its run folder
python -m launch --chain VERB,VERB,... [FOLDER] out=ROOT [VERB.key=value ...] [options]
                                                                    several, each waits for the one before
python -m launch status|cancel OUT...                               jobs of run folders
python -m launch logs OUT [--follow]                                what all ranks said

Keys that begin with `cluster.` change the site: cluster.train.nodes=4 cluster.partition=gpu.
Exit codes: 0 done or submitted, 1 a watched job failed, 2 refused before the queue, with every reason.
"""
_FOLDER_VERBS = ("status", "cancel", "logs")
_OTHERS = {"sweep": "launch.sweep.cli"}  # command -> module with main(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see USAGE."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in _OTHERS:
            return int(importlib.import_module(_OTHERS[words[0]]).main(words[1:]))
        return _folders(words) if words and words[0] in _FOLDER_VERBS else _submit(words)
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"launch: {error}\n")
        return 2


def _submit(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("launch", usage=USAGE)
    parser.add_argument("words", nargs="*", metavar="VERB, CONFIG, key=value")
    parser.add_argument("--on", choices=("local", "slurm"), default="slurm", help="this machine, or the cluster")
    parser.add_argument(
        "--cluster", metavar="SITE", help="YAML file with the site's facts, or a name in configs/cluster"
    )
    parser.add_argument("--chain", metavar="VERB,...", help="several verbs, each waits for the one before")
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="wait until this job ended well")
    parser.add_argument("--array", type=int, default=1, metavar="N", help="share the volumes among N tasks of an array")
    parser.add_argument("--watch", action="store_true", help="follow logs and progress of all tasks until they end")
    parser.add_argument("--dry-run", action="store_true", help="check everything, submit nothing")
    args = parser.parse_intermixed_args(words)
    if not args.words and not args.chain:
        sys.stdout.write(USAGE)
        return 2
    return _launch(args)


def _launch(args: Any) -> int:
    from launch import chain, job_arrays, jobs, preflight, slurm, status
    from launch.site import load_site

    if args.on == "slurm":
        slurm.reach()
    words = [w for w in args.words if not w.startswith("cluster.")]
    site = load_site(args.cluster, [w[8:] for w in args.words if w.startswith("cluster.")])
    verb = None if args.chain else words.pop(0)
    config = Path(words.pop(0)) if words and "=" not in words[0] else None
    if verb is None:
        stages = chain.plan(args.chain.split(","), config, words)
    else:
        stages = [(verb, jobs.load(verb, config, words))]
    for line in preflight.check(stages, site, args.on, args.array, args.after):
        sys.stdout.write(line + "\n")
    if args.dry_run:
        return 0
    submitted: list[jobs.Job] = []
    after, code = list(args.after), stages[0][1].out / "launch" / "code"
    for name, cfg in stages:
        count = job_arrays.shares(name, args.array, len(stages) == 1)
        new = job_arrays.submit(name, cfg, site, args.on, after, code, count)
        submitted += new
        after = job_arrays.last(new)
        sys.stdout.write(f"{name}: {job_arrays.text(new)} into {cfg.out}\n")
        if args.on == "local" and status.follow(new, slurm.Poller(0.2, 2.0)):
            return 1  # without a queue, the next one has to wait here
    if args.on == "slurm" and args.watch:
        return status.follow(submitted, slurm.Poller())
    return 0


def _folders(words: Sequence[str]) -> int:
    from launch import jobs, slurm, status

    parser = argparse.ArgumentParser(f"launch {words[0]}")
    parser.add_argument("out", nargs="+", type=Path, help="run folders")
    if words[0] == "logs":
        parser.add_argument("--follow", action="store_true", help="until the jobs end")
    args = parser.parse_args(words[1:])
    found = [job for out in args.out for job in jobs.read(out)]
    if words[0] == "cancel":
        jobs.cancel(found)
    elif words[0] == "logs":
        return status.follow(found, slurm.Poller()) if args.follow else _logs(found)
    return _status(found)


def _status(found: Sequence[Any]) -> int:
    from launch import jobs, slurm, status

    now = jobs.poll(found, slurm.Poller())
    for job in found:
        sys.stdout.write(f"{job.out} [{job.verb}{job.share and ' ' + job.share}] {status.line_of(job, now[job.id])}\n")
    return 0


def _logs(found: Sequence[Any]) -> int:
    from launch import status

    for job in found:
        sys.stdout.writelines(line + "\n" for line in status.Tails(job).new())
    return 0


if __name__ == "__main__":
    sys.exit(main())
