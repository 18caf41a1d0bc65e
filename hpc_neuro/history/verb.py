"""`hpc-neuro history OUT`: from the raw files to the metrics, on standard output."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.history.checks import examine, recorded
from hpc_neuro.history.run_check import Stage, raw_files
from hpc_neuro.report import provenance

HELP = """hpc-neuro history OUT [quick=true]

The chain of one result: raw files, store, teacher, cache, config, code version, jobs, checkpoint, blocks, SWC, metrics.
OUT is the folder of any run, or a file in it, such as OUT/report.html or OUT/swc/NEURON.swc. All that was recorded is
compared with what is there now: a changed, missing or unfinished piece is named as BROKEN, and the exit code is 3.
  quick=true   compare names, sizes and small files only; raw images, cache shards and probabilities are not read"""


def main(argv: Sequence[str]) -> int:
    """Print the chain. 0: whole; 3: a link is broken. Raises InputError where there is no run, ConfigError for keys."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(HELP + "\n")
        return 0
    paths = [Path(a) for a in argv if "=" not in a or Path(a).exists()]
    options = {a for a in argv if "=" in a and not Path(a).exists()}
    if len(paths) != 1 or options - {"quick=true", "quick=false"}:
        raise ConfigError(f"history takes one path and quick=true|false, not {' '.join(argv) or 'nothing'}\n{HELP}")
    path = paths[0].absolute()
    if not path.exists():
        raise InputError(f"{paths[0]} does not exist; give the folder of a run, or a file in it")
    folder = provenance.find_run_folder(path)
    if folder is None:
        raise InputError(f"{paths[0]} lies in no run's folder: there is no run.json beside or above it")
    links, quick = provenance.follow_runs({"": folder}), "quick=true" in options
    stages = [s for link in links for check in (raw_files, examine) if (s := _checked(check, link, quick)) is not None]
    if path.is_file():
        stages.append(_file(path, folder, links[-1]))
    for number, stage in enumerate(stages, start=1):
        sys.stdout.write("\n".join([f"{number} {stage.title}", *(f"    {line}" for line in stage.lines)]) + "\n")
    broken = [f"{stage.title}: {text}" for stage in stages for text in stage.broken]
    sys.stdout.write(_verdict(broken, sum(s.held for s in stages), sum(s.unknown for s in stages)) + "\n")
    return 3 if broken else 0


def _checked(
    check: Callable[[provenance.RunRecord, bool], Stage | None], link: provenance.RunRecord, quick: bool
) -> Stage | None:
    """What a check finds; a record that is not of the form it was written in is a broken link too."""
    try:
        return check(link, quick)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        stage = Stage(f"{link.name}: {link.path}")
        stage.bad(f"{link.path / 'run.json'} is not of the form it was written in ({type(error).__name__}: {error})")
        return stage


def _verdict(broken: list[str], held: int, unknown: int) -> str:
    hold = f"{held} links hold" + (f", {unknown} were not compared" if unknown else "")
    if not broken:
        return f"the chain is whole: {hold}"
    return f"{len(broken)} broken link{'s' * (len(broken) > 1)}, {hold}:\n" + "\n".join(f"    {b}" for b in broken)


def _file(path: Path, folder: Path, link: provenance.RunRecord) -> Stage:
    """The file that was asked for, among those its run is known to have written."""
    name = path.relative_to(folder).as_posix()
    stage = Stage(f"asked for: {path}")
    known = recorded(link)
    if name in known:
        stage.compare(path, known[name], name)
    else:
        stage.unsure(f"{link.name} recorded no hash of {name}; only the run around it can be checked", "files")
    return stage
