"""The command line: `python -m launch VERB [CONFIG] [key=value ...] --on local|slurm|pbs|lsf --cluster SITE`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.schema import ConfigError, InputError

if TYPE_CHECKING:
    from launch.site import Site
    from launch.status import LaunchedJob

USAGE = """python -m launch VERB [CONFIG.yaml] [key=value ...] [options]      one verb as a job in its run folder
python -m launch infer IMAGE... model=M out=OUT [options]           paths as in hpc-neuro infer
python -m launch --chain VERB,VERB,... [FOLDER] out=ROOT [VERB.key=value ...] [options]
                                                                    several, each waits for the one before
python -m launch sweep CONFIG.yaml [key=value ...] [options]        many trainings of one study
python -m launch status|cancel OUT...                               jobs of run folders
python -m launch logs OUT [--follow]                                logs of all ranks

Keys that begin with `cluster.` change the site: cluster.train.nodes=4 cluster.partition=gpu.
Exit codes: 0 done or submitted, 1 a watched job failed, 2 refused before the queue, with every reason.
"""
_FOLDER_COMMANDS = ("status", "cancel", "logs")
_OTHER_COMMANDS = {"sweep": "launch.sweep.cli"}
"""Command -> module with `main(arguments)`."""
_SITE_PREFIX = "cluster."
_EXIT_JOB_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; see USAGE."""
    # Every error that a user can cause is one sentence and exit code 2.
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""

    try:
        if command in _OTHER_COMMANDS:
            return int(importlib.import_module(_OTHER_COMMANDS[command]).main(words[1:]))
        return _run_folder_command(words) if command in _FOLDER_COMMANDS else _run_submit_command(words)
    except (ConfigError, InputError) as error:
        sys.stderr.write(f"launch: {error}\n")
        return EXIT_BAD_INPUT
    except Exception as error:
        # A place that cannot be used; anything else is a bug, and keeps its traceback.
        sentence = files.explain_error(error)
        if sentence is None:
            raise
        sys.stderr.write(f"launch: {sentence}\n")
        return EXIT_BAD_INPUT


def _run_submit_command(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("launch", usage=USAGE)
    parser.add_argument("words", nargs="*", metavar="VERB, CONFIG, key=value")
    parser.add_argument(
        "--on", choices=("local", "slurm", "pbs", "lsf"), default="slurm", help="this machine, or the cluster"
    )
    parser.add_argument(
        "--cluster", metavar="SITE", help="YAML file with the site's facts, or a name in configs/cluster"
    )
    parser.add_argument("--chain", metavar="VERB,...", help="several verbs, each waits for the one before")
    parser.add_argument("--after", action="append", default=[], metavar="JOB", help="wait until this job ended well")
    parser.add_argument(
        "--array",
        type=int,
        default=1,
        metavar="N",
        help="share the volumes among N tasks of an array (PBS, LSF: N jobs)",
    )
    parser.add_argument("--watch", action="store_true", help="follow logs and progress of all tasks until they end")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the scripts, submit nothing; also without a cluster",
    )
    args = parser.parse_intermixed_args(words)

    has_verb = any(not word.startswith(_SITE_PREFIX) for word in args.words)
    if not has_verb and not args.chain:
        sys.stdout.write(USAGE)
        return EXIT_BAD_INPUT

    if args.array < 1:
        raise ConfigError(f"--array {args.array}: give the number of tasks, 1 or more")

    return _check_and_submit(args)


def _check_and_submit(args: argparse.Namespace) -> int:
    from launch import preflight, slurm, submit
    from launch.site import load_site

    # Fail within seconds where there is no cluster, before anything else is checked.
    is_here = _is_on_cluster(args.on) if args.dry_run else True
    if args.on == "slurm" and is_here:
        slurm.require_controller()
    if is_here:
        submit.require_program(args.on)

    # Keys of the site may stand anywhere among the others.
    words = [word for word in args.words if not word.startswith(_SITE_PREFIX)]
    site_keys = [word.removeprefix(_SITE_PREFIX) for word in args.words if word.startswith(_SITE_PREFIX)]
    site = load_site(args.cluster, site_keys)
    stages = _plan_stages(args.chain, words)

    for line in preflight.check(stages, site, args.on, args.array, args.after, is_here):
        sys.stdout.write(line + "\n")

    return _print_scripts(stages, site, args) if args.dry_run else _submit_stages(stages, site, args)


def _is_on_cluster(on: str) -> bool:
    """Whether the scheduler can be asked from this machine."""
    from launch import slurm, submit

    try:
        submit.require_program(on)
        if on == "slurm":
            slurm.require_controller()
    except InputError:
        return False
    return True


def _print_scripts(stages: Sequence[tuple[str, Any]], site: Site, args: argparse.Namespace) -> int:
    """Print the batch script of each verb, without the values of secrets."""
    from launch import submit
    from launch.site import hide_secrets

    for verb, cfg in stages if args.on != "local" else ():
        submission = submit.Submission(
            verb, cfg, hide_secrets(site), args.on, cfg.out.resolve() / "launch" / "code", ()
        )
        sys.stdout.write(f"\nscript of {verb}:\n{submission.write_script().rstrip()}\n")
    return EXIT_DONE


def _plan_stages(verbs: str | None, words: list[str]) -> list[tuple[str, Any]]:
    """The verbs to submit with their configs: those of a chain, else the first of `words`."""
    from launch import chain, submit

    if verbs:
        config = Path(words.pop(0)) if words and "=" not in words[0] else None
        return chain.plan_chain(verbs.split(","), config, words)

    verb, *words = words
    config, keys, values = submit.require_launchable(verb).sort_words(words)
    return [(verb, submit.load_config(verb, config, keys, values))]


def _submit_stages(stages: Sequence[tuple[str, Any]], site: Site, args: argparse.Namespace) -> int:
    """Submit verbs, each to wait for the one before."""
    from launch import slurm, status, submit

    jobs: list[LaunchedJob] = []
    after = list(args.after)
    # All verbs of a chain run one snapshot of the code.
    code = stages[0][1].out / "launch" / "code"

    for verb, cfg in stages:
        count = submit.count_shares(verb, args.array, len(stages) == 1)
        new_jobs = submit.submit_verb(verb, cfg, site, args.on, after, code, count)
        sys.stdout.write(f"{verb}: {submit.describe_jobs(new_jobs)} into {cfg.out}\n")
        jobs += new_jobs
        after = [new_jobs[-1].id]

        # Without a queue, the next verb has to wait here.
        if args.on == "local" and status.follow_jobs(new_jobs, slurm.Poller(0.2, 2.0)):
            return _EXIT_JOB_FAILED

    if args.on != "local" and args.watch:
        return status.follow_jobs(jobs, slurm.Poller())

    return EXIT_DONE


def _run_folder_command(words: Sequence[str]) -> int:
    from launch import slurm, status

    command = words[0]
    parser = argparse.ArgumentParser(f"launch {command}")
    parser.add_argument("out", nargs="+", type=Path, help="run folders")
    if command == "logs":
        parser.add_argument("--follow", action="store_true", help="until the jobs end")

    args = parser.parse_args(words[1:])

    # Several run folders are shown together, with one question to Slurm.
    jobs = [job for out in args.out for job in status.read_jobs(out)]
    if command == "logs" and args.follow:
        return status.follow_jobs(jobs, slurm.Poller())
    if command == "logs":
        return _print_logs(jobs)

    if command == "cancel":
        status.cancel_jobs(jobs)

    return _print_states(jobs)


def _print_states(jobs: Sequence[LaunchedJob]) -> int:
    from launch import slurm, status

    states = status.poll_jobs(jobs, slurm.Poller())
    for job in jobs:
        sys.stdout.write(f"{job.out} [{job.title}] {status.describe_job(job, states[job.id])}\n")
    return EXIT_DONE


def _print_logs(jobs: Sequence[LaunchedJob]) -> int:
    from launch import status

    for job in jobs:
        sys.stdout.writelines(line + "\n" for line in status.LogReader(job).read_new_lines())
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
