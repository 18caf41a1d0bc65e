"""`hpc-neuro history OUT`: everything that led to a result, compared with what is on the disk now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.run_folder import RECORD
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.history import checks
from hpc_neuro.history.checks import RunCheck
from hpc_neuro.pipeline import VERBS
from hpc_neuro.report import provenance
from hpc_neuro.report.provenance import RunRecord

HELP = """hpc-neuro history OUT [quick=true]

The chain of one result: raw files, store, teacher, cache, config, code version, jobs, checkpoint, blocks, SWC, metrics.
OUT is the folder of any run, or a file in it, such as OUT/report.html or OUT/swc/NEURON.swc. All that was recorded is
compared with what is there now: a changed, missing or unfinished piece is listed as BROKEN, and the exit code is 3.
  quick=true   compare names, sizes and small files only; raw images, cache shards and probabilities are not read"""
_OPTIONS = {"quick=true", "quick=false"}

__all__ = ["HELP", "main"]


def main(argv: Sequence[str]) -> int:
    """Print the chain. 0: whole; 3: a link is broken. Raises InputError if there is no run, ConfigError for keys."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return EXIT_DONE

    paths = [Path(argument) for argument in argv if "=" not in argument or Path(argument).exists()]
    options = {argument for argument in argv if "=" in argument and not Path(argument).exists()}
    if len(paths) != 1 or options - _OPTIONS:
        raise ConfigError(f"history takes one path and quick=true|false, not {' '.join(argv) or 'nothing'}\n{HELP}")

    results = list(_check_chain(paths[0], quick="quick=true" in options))
    for number, check in enumerate(results, start=1):
        lines = [f"{number} {check.title}", *(f"    {line}" for line in check.lines)]
        sys.stdout.write("\n".join(lines) + "\n")

    broken = [f"{check.title}: {text}" for check in results for text in check.broken]
    sys.stdout.write(_format_verdict(broken, results) + "\n")
    return EXIT_FAILURES if broken else EXIT_DONE


def _check_chain(path: Path, quick: bool) -> Iterator[RunCheck]:
    """Check every run that led to `path`, the first ones first, and `path` itself when it is a file."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give the folder of a run, or a file in it")
    folder = provenance.find_run_folder(path.absolute())
    if folder is None:
        raise InputError(f"{path} lies in no run's folder: there is no {RECORD} beside or above it")

    # The verb of the folder is not known yet; its record names it.
    runs = provenance.follow_runs({"": folder})
    for run in runs:
        for check_function in (checks.check_raw_files, _check_run):
            check = _try_check(check_function, run, quick)
            if check is not None:
                yield check

    if path.is_file():
        yield _check_file(path.absolute(), runs[-1], folder)


def _try_check(
    check_function: Callable[[RunRecord, bool], RunCheck | None], run: RunRecord, quick: bool
) -> RunCheck | None:
    """The result of a check; a record of another form than it was written in is a broken link too."""
    try:
        return check_function(run, quick)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        check = RunCheck(f"{run.verb}: {run.folder}", run, quick)
        check.fail(f"{run.folder / RECORD} is not of the form it was written in ({type(error).__name__}: {error})")
        return check


def _check_run(run: RunRecord, quick: bool) -> RunCheck:
    """Compare all that one run recorded: its config, end and outputs, and the links of its verb."""
    check = RunCheck(f"{run.verb or 'run'}: {run.folder}", run, quick)
    if run.record is None:
        check.fail(f"{run.folder} has no {RECORD}" if run.folder.exists() else f"{run.folder} does not exist")
        return check

    checks.check_record(check)
    # What an unknown verb has to leave in its folder is unknown, too.
    if run.verb not in VERBS:
        check.fail(
            f"{run.folder / RECORD} names {run.verb!r}, which is no verb of this version; its files are unchecked"
        )
        return check

    verb_check = VERBS[run.verb].history_check
    if verb_check is None:
        return check

    try:
        getattr(checks, verb_check)(check)
    except InputError as error:
        check.fail(checks.first_clause(error))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        # Readable JSON, but with other content than was written.
        check.fail(f"{check.last_file} is not of the form it was written in ({type(error).__name__}: {error})")
    return check


def _check_file(path: Path, run: RunRecord, folder: Path) -> RunCheck:
    """The file that the user named, compared with the hash that its run recorded."""
    name = path.relative_to(folder).as_posix()
    check = RunCheck(f"asked for: {path}", run)
    hashes = checks.recorded_hashes(run)

    if name in hashes:
        check.compare_file(path, hashes[name], name)
    else:
        check.skip(f"{run.verb} recorded no hash of {name}; only the run around it can be checked", "files")
    return check


def _format_verdict(broken: Sequence[str], results: Sequence[RunCheck]) -> str:
    # Links that were not compared are counted apart: they are neither whole nor broken.
    counts = f"{sum(check.passed for check in results)} links hold"
    skipped = sum(check.skipped for check in results)
    if skipped:
        counts += f", {skipped} were not compared"
    if not broken:
        return f"the chain is whole: {counts}"

    lines = "\n".join(f"    {text}" for text in broken)
    return f"{len(broken)} broken link{'s' * (len(broken) > 1)}, {counts}:\n{lines}"
