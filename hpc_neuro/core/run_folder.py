"""The folder of one run of a verb: its resolved config, its record, its log.

OUT/config.yaml   the resolved config
OUT/run.json      code version, versions, host, command, input hashes, starts, end, exit code, summary, output hashes
OUT/log.txt       the log of every start
OUT/run.lock      who works in the folder, while somebody does (see folder_lock.py)
OUT/shares/       the records of the tasks of a job array, one folder each
"""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, NotRequired, TypeVar

from pydantic import ConfigDict, with_config
from tqdm import tqdm
from typing_extensions import TypedDict

from hpc_neuro.core import files, folder_lock, schema, yaml_text
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.distributed import count_gpus, is_main
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.pipeline import VERBS

T = TypeVar("T")
log = logging.getLogger(__name__)

RECORD = "run.json"
"""Name of the record in a run folder."""
CONFIG = "config.yaml"
"""Name of the resolved config in a run folder."""
SHARES = "shares"
"""Folder in a run folder with the records of the tasks of a job array."""
_AGREED = ".agreed"
"""Folder beside the shares of a run with what they have in common."""
_AGREED_CONFIG = "config.json"
"""File in that folder with the settings."""
REMAKE = f"remove it and the {CONFIG} beside it, and run that stage again"
"""What to do about a record that cannot be read."""
VERSION_FILE = "CODE_VERSION"
"""File in a copy of the code without git that names the version it is a copy of."""
_PACKAGES = ("torch", "deepspeed", "timm", "h5py", "mpi4py", "numpy", "wandb", "submitit", "tensorstore")
_DEEPEST_OUTPUT = 3
"""Folders between an output and its run: OUT/weights/best/student.yaml."""
_SECONDS_PER_LINE = 10.0
"""[s] Time between progress lines in a log."""
_SHORT_TEXT = 80
"""Characters of a value in the list of differences."""


@with_config(ConfigDict(extra="allow"))
class _RecordForm(TypedDict):
    """What run.json holds at least; an old record may lack what later versions write."""

    verb: str
    config: dict[str, Any]
    inputs: NotRequired[dict[str, str]]
    sources: NotRequired[dict[str, str]]
    outputs: NotRequired[dict[str, str]]
    sizes: NotRequired[dict[str, int]]
    damaged: NotRequired[list[str]]
    summary: NotRequired[dict[str, Any]]
    failures: NotRequired[list[str]]
    starts: NotRequired[list[str]]
    gpus: NotRequired[list[int]]
    stops: NotRequired[list[str | None]]
    jobs: NotRequired[list[str]]
    ends: NotRequired[list[dict[str, Any]]]
    command: NotRequired[list[str]]
    host: NotRequired[str]
    folder: NotRequired[str]
    cwd: NotRequired[str]
    code: NotRequired[str]
    end: NotRequired[str | None]
    exit: NotRequired[int | str | None]


def read_record(out: Path, hint: str) -> dict[str, Any]:
    """The record of the run in `out`. Raises InputError, which ends with `hint`."""
    return dict(files.read_json(out / RECORD, hint, _RecordForm))


class Run:
    """One start of a verb in its folder."""

    def __init__(self, out: Path, record: dict[str, Any], complete: bool, damaged: Sequence[str] = ()) -> None:
        """complete: the run was finished before; there is nothing left to do.

        damaged: outputs of a finished run that are missing or not as they were written, relative to `out`.
        """
        self.out = out
        self.record = record
        self.complete = complete
        self.damaged = tuple(damaged)

    def finish(
        self,
        summary: Mapping[str, Any] | None = None,
        failures: Sequence[str] = (),
        outputs: Iterable[Path] = (),
        large_outputs: Iterable[Path] = (),
    ) -> None:
        """Mark the run complete, or finished with `failures`, which the next start tries again.

        outputs: files in the folder that later runs read; the next start and `hpc-neuro history` compare their SHA-256.
        large_outputs: files that are too large to be read at every start, which compares their sizes.
        """
        names = {path: path.relative_to(self.out).as_posix() for path in (*outputs, *large_outputs)}
        self.record["summary"] = dict(summary or {})
        self.record["outputs"] = {names[path]: files.sha256(path) for path in outputs}
        self.record["sizes"] = {name: path.stat().st_size for path, name in names.items()}
        self.record["failures"] = list(failures)
        self.record["damaged"] = []
        self.record["exit"] = EXIT_FAILURES if failures else EXIT_DONE


@contextlib.contextmanager
def start(
    verb: str,
    cfg: Any,
    out: Path,
    inputs: Mapping[str, Path | str],
    may_change: Sequence[str] = (),
    main: bool | None = None,
    whole: bool = True,
    sources: Mapping[str, Path] | None = None,
) -> Iterator[Run]:
    """Enter a run folder: write config.yaml and run.json, log to log.txt, and complete run.json on the way out.

    inputs: name -> file (which is hashed) or digest. sources: name -> file that a digest belongs to. may_change: dotted
    keys that may differ from the config already in `out`. main: whether this rank writes; None: by the torch ranks
    (verbs whose ranks are MPI's decide it themselves). whole: False when results of a complete run are missing, so that
    it runs again. Raises ConfigError when `out` belongs to another config, or when its inputs changed.
    """
    main = is_main() if main is None else main
    # `out` is left out of the comparison: a run folder may move.
    resolved = {key: value for key, value in schema.to_plain(cfg).items() if key != "out"}
    # One rank hashes; the others would read the same bytes again.
    hashes = {name: _digest(source) for name, source in inputs.items()} if main else {}

    # All ranks check the folder, so that all of them stop.
    previous = _read_previous(verb, out, resolved, hashes, may_change)
    if main:
        _check_shares(out, resolved, hashes, may_change)

    # Only the run that is to write keeps others out.
    damaged = list_damaged(out, previous)
    if whole and not damaged and _is_complete(previous, resolved):
        log.info("%s: %s is already complete (%s)", verb, out, previous.get("end") or "its record has no time")
        yield Run(out, previous, complete=True)
        return

    for line in damaged.values():
        log.warning("%s: %s; it is made again", verb, line)

    input_files = {name: source for name, source in inputs.items() if isinstance(source, Path)} | dict(sources or {})
    run = Run(out, _new_record(verb, out, resolved, hashes, input_files, previous, damaged), False, list(damaged))
    if main:
        with _keep_others_out(out), _record_and_log(run, cfg):
            yield run
    else:
        yield run


@contextlib.contextmanager
def _keep_others_out(out: Path) -> Iterator[None]:
    """Hold the folder of a run. Shares of a run have folders of their own, and may work beside one another."""
    is_share = out.parent.name == SHARES
    others = [out.parent.parent] if is_share else [path.parent for path in (out / SHARES).glob(f"*/{folder_lock.LOCK}")]
    for other in others:
        folder_lock.require_idle(other)
    with folder_lock.hold_folder(out):
        yield


def _is_complete(record: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    # A setting that may change, such as the number of steps, starts a complete run again.
    return record.get("exit") == EXIT_DONE and not differences(config, record["config"])


def require_unchanged(path: Path) -> None:
    """Raise InputError for an output of a finished run that does not have the SHA-256 which the run recorded.

    A file that no run has recorded passes.
    """
    for folder in list(path.absolute().parents)[:_DEEPEST_OUTPUT]:
        if not (folder / RECORD).is_file():
            continue
        record = read_record(folder, REMAKE)
        digest = record.get("outputs", {}).get(path.absolute().relative_to(folder).as_posix())
        # While a run is at work, its outputs are those of the run before it, or not complete.
        if record.get("exit") == EXIT_DONE and digest not in (None, files.sha256(path)):
            raise InputError(
                f"{path} has other bytes than `{record['verb']}` wrote: it is damaged, or was edited; the same "
                f"`hpc-neuro {record['verb']}` again writes it anew"
            )
        return


def list_damaged(out: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Name -> what is wrong, for the outputs of a finished run that are missing or not as they were written.

    Small files are compared by their SHA-256, large ones by their size.
    """
    hashes, faults = record.get("outputs", {}), {}
    # Records of earlier versions have no sizes.
    for name in {**record.get("sizes", {}), **hashes}:
        path = out / name
        if not path.is_file():
            faults[name] = f"{path} is missing"
        elif path.stat().st_size != record.get("sizes", {}).get(name, path.stat().st_size):
            faults[name] = f"{path} has {path.stat().st_size} bytes, but was written with {record['sizes'][name]}"
        elif name in hashes and files.sha256(path) != hashes[name]:
            faults[name] = f"{path} has other bytes than were written"

    # A start that was to make them again was stopped.
    return {**{name: f"{out / name} was damaged" for name in record.get("damaged", [])}, **faults}


@contextlib.contextmanager
def _record_and_log(run: Run, cfg: Any) -> Iterator[None]:
    """Write config.yaml and run.json, log to log.txt, and write run.json again at the end, whatever ends the run."""
    run.out.mkdir(parents=True, exist_ok=True)
    files.remove_parts(run.out)
    files.write_json(run.out / RECORD, run.record)
    files.write_text(run.out / CONFIG, schema.dump(cfg))

    # The verb's own messages and those of the modules it calls, until the run ends.
    # Names of files may hold bytes that are no UTF-8.
    handler = logging.FileHandler(run.out / "log.txt", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("hpc_neuro").addHandler(handler)
    try:
        yield
    except BaseException as error:
        # SystemExit has a code.
        run.record["exit"] = getattr(error, "code", None) or f"{type(error).__name__}: {error}"
        log.debug("stopped", exc_info=True)
        raise
    finally:
        run.record["end"] = _now()
        logging.getLogger("hpc_neuro").removeHandler(handler)
        handler.close()
        files.write_json(run.out / RECORD, run.record)


def _new_record(
    verb: str,
    out: Path,
    resolved: dict[str, Any],
    hashes: Mapping[str, str],
    input_files: Mapping[str, Path],
    previous: Mapping[str, Any],
    damaged: Iterable[str],
) -> dict[str, Any]:
    """The content of run.json at the start of a run; `previous` is the record of the starts before it."""
    return {
        "verb": verb,
        "code": code_version(),
        "versions": package_versions(),
        "host": platform.node(),
        "command": sys.argv,
        "folder": str(out.resolve()),
        "cwd": str(Path.cwd()),
        "inputs": dict(hashes),
        "sources": {name: str(path.resolve()) for name, path in input_files.items()},
        "config": resolved,
        "starts": [*previous.get("starts", []), _now()],
        # When each start before this one ended; None after a kill.
        "stops": [*previous.get("stops", []), previous.get("end")] if previous else [],
        # Of each start; only verbs that run on several ranks compute on GPUs.
        "gpus": [*previous.get("gpus", []), count_gpus() if verb in VERBS and VERBS[verb].ranks else 0],
        "jobs": [*previous.get("jobs", []), _job_name()],
        # Why each Slurm job before this start ended; written by `launch`.
        "ends": previous.get("ends", []),
        # Until the run is complete again, also after a kill.
        "damaged": list(damaged),
        "end": None,
        "exit": None,
    }


# --- The run that is already in the folder ---


def require_verb(verb: str, out: Path) -> dict[str, Any]:
    """The record in `out`, {} without one. Raises ConfigError if it is of another verb."""
    if not (out / RECORD).exists():
        return {}
    record = read_record(out, f"remove {out} to start again")
    if record["verb"] != verb:
        raise ConfigError(f"{out} holds a `{record['verb']}` run; give `{verb}` another `out`")
    return record


def _read_previous(
    verb: str, out: Path, resolved: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]
) -> dict[str, Any]:
    """The record in `out`, {} for a new folder. Raises ConfigError if it is of another run."""
    path = out / RECORD
    if not path.exists():
        # A run writes run.json before config.yaml.
        if (out / CONFIG).exists():
            raise ConfigError(
                f"{out / CONFIG} is of no run and would be overwritten; give another `out`, or move it away"
            )
        return {}

    record = require_verb(verb, out)
    different = differences(resolved, record["config"], may_change)
    if different:
        raise ConfigError(
            f"{out} was made with another config; choose another `out`, or remove it. Different:\n  "
            + "\n  ".join(different)
        )

    # The same config over other data is another run.
    changed = _other_inputs(hashes, record)
    if changed:
        raise ConfigError(f"the input {', '.join(changed)} changed since {out} was made; choose another `out`")
    return record


def _check_shares(out: Path, resolved: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]) -> None:
    """Raise ConfigError if shares of the run in `out`, or the other shares beside this one, are of another run."""
    own = {key: value for key, value in resolved.items() if key != "share"}
    if out.parent.name != SHARES:
        _compare_with_shares(out, out, own, hashes, may_change)
        return

    # A share reads what all agreed on: if each read the records of all others, an array would read n * n of them.
    agreed = _AgreedFacts(out.parent / _AGREED)
    if agreed.contain(own, hashes, may_change):
        return

    # What was agreed on may be of shares that have been removed since.
    recorded = _compare_with_shares(out.parent.parent, out, own, hashes, may_change)
    if not agreed.add(own, {**recorded, **hashes}, may_change):
        raise ConfigError(
            f"another share of {out.parent.parent} started at the same time with other settings or inputs; give all "
            "shares the same ones, or another `out`"
        )


def _compare_with_shares(
    root: Path, out: Path, own: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]
) -> dict[str, str]:
    """The inputs that the shares of the run in `root` recorded, but that in `out`.

    Raises ConfigError if any of them is of another run.
    """
    inputs = dict[str, str]()
    for path in sorted((root / SHARES).glob(f"*/{RECORD}")):
        if path.parent == out:
            continue
        record = read_record(path.parent, f"remove {path.parent}")
        other = {key: value for key, value in record["config"].items() if key != "share"}

        different = differences(own, other, may_change)
        different += [f"the input {name}" for name in _other_inputs(hashes, record)]
        if different:
            raise ConfigError(
                f"the share in {path.parent} was made with other settings or inputs; give all shares, and the run that "
                "gathers them, the same ones, or another `out`. Different:\n  " + "\n  ".join(different)
            )
        inputs |= record.get("inputs", {})
    return inputs


class _AgreedFacts:
    """The settings and inputs that the shares of a run have in common: a file for the settings and one for each input.

    The share that comes first to a fact writes it, and the others read it. Shares have different inputs, so there is no
    one file of all.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def contain(self, config: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]) -> bool:
        """Whether the settings are agreed on, and no input is agreed on with another digest; new inputs are added."""
        agreed = self._read(_AGREED_CONFIG)
        if agreed is None or differences(config, agreed, may_change):
            return False

        # A share that is refused leaves nothing behind.
        missing = dict[str, str]()
        for name, digest in hashes.items():
            fact = self._read(_name_fact(name))
            if fact is None:
                missing[_name_fact(name)] = digest
            elif fact != digest:
                return False
        return all(self._write_first(name, digest) == digest for name, digest in missing.items())

    def add(self, config: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]) -> bool:
        """Write what no share disagrees with; False when another share wrote something else in between."""
        facts = {_name_fact(name): digest for name, digest in hashes.items()}
        stale = [name for name, digest in facts.items() if self._read(name) != digest]
        agreed = self._read(_AGREED_CONFIG)
        if agreed is None or differences(config, agreed, may_change):
            stale.append(_AGREED_CONFIG)

        for name in stale:
            (self._folder / name).unlink(missing_ok=True)
            self._write_first(name, facts.get(name, config))
        return self.contain(config, hashes, may_change)

    def _read(self, name: str) -> Any:
        """A fact; None where no share has written it, or it was damaged since."""
        with contextlib.suppress(InputError):
            return files.read_json(self._folder / name, "")
        return None

    def _write_first(self, name: str, value: Any) -> Any:
        """Write a fact that no share has written; the fact that holds."""
        is_first = files.create_once(self._folder / name, json.dumps(value))
        return value if is_first else self._read(name)


def _name_fact(name: str) -> str:
    """The file of an input, whose own name may hold any character."""
    return f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:32]}.json"


def differences(new: Any, old: Any, may_change: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`, except those that start with one of `may_change`."""
    return [line for line in _list_differences(new, old) if not line.startswith(tuple(may_change))]


def _list_differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        keys = dict.fromkeys([*new, *old])
        return [line for key in keys for line in _list_differences(new.get(key), old.get(key), f"{prefix}{key}.")]
    return [] if new == old else [f"{prefix.rstrip('.')}: {_shorten(old)} -> {_shorten(new)}"]


def _other_inputs(hashes: Mapping[str, str], record: Mapping[str, Any]) -> list[str]:
    """The inputs that a record names with another digest."""
    recorded = record.get("inputs", {})
    return [name for name, digest in hashes.items() if recorded.get(name, digest) != digest]


def _shorten(value: Any) -> str:
    """A value as YAML on one line, cut if it is long."""
    text = " ".join(yaml_text.dump_line(value).split())
    return text if len(text) < _SHORT_TEXT else text[: _SHORT_TEXT - 3] + "..."


# --- Shares of a job array ---


def take_share(items: Sequence[T], share: tuple[int, int] | None) -> list[T]:
    """Every n-th item from the i-th of `share` (i, n); all items for None. Raises ConfigError unless 0 <= i < n."""
    if share is None:
        return list(items)
    # Every n-th, not n-th parts: volumes that were listed together are often of one size.
    index, count = share
    if not 0 <= index < count:
        raise ConfigError(f"share: [{index}, {count}] has index {index}; expected 0 to {count - 1} of {count} shares")
    return list(items[index::count])


def share_folder(out: Path, share: tuple[int, int] | None) -> Path:
    """Folder of the record of one share; `out` itself for None."""
    return out if share is None else out / SHARES / f"{share[0]:04d}_of_{share[1]:04d}"


def input_name(name: str, share: tuple[int, int] | None) -> str:
    """Name in a record of an input that differs from share to share."""
    return name if share is None else f"{name} of share {share[0]} of {share[1]}"


# --- Progress ---


def track_progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Yield `items` and show progress: a bar on a terminal, a line every few seconds in a log. Main rank only."""
    if not is_main():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, unit=unit, dynamic_ncols=True, leave=False)
    else:
        if total is None and isinstance(items, Sized):
            total = len(items)
        yield from _log_progress(items, label, total, unit)


def _log_progress(items: Iterable[T], label: str, total: int | None, unit: str) -> Iterator[T]:
    # A line every few seconds, and none for short loops, keeps logs of long jobs readable.
    begin = last_line = time.monotonic()

    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last_line > _SECONDS_PER_LINE:
            last_line = now
            rate = done / (now - begin)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            log.info("%s: %d/%s %s, %.2f %s/s%s", label, done, total or "?", unit, rate, unit, left)


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which OP_2 comes before OP_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


# --- Versions and places ---


@functools.cache
def code_version() -> str:
    """Package version, with the git commit (and `+changed`) when the package runs from a checkout."""
    # A copy that `launch` made has no git; a file in it says what it is a copy of.
    version = importlib.metadata.version("hpc_neuro")
    root = Path(__file__).resolve().parents[2]

    if (root / VERSION_FILE).exists():
        return (root / VERSION_FILE).read_text(encoding="utf-8").strip()
    if not (root / ".git").exists():
        return version

    # git refuses a checkout of another owner (in a container) unless it is called safe.
    # Without its optional locks, git changes nothing: one that is killed would leave a lock that blocks the checkout.
    git = ["git", "--no-optional-locks", "-c", f"safe.directory={root}", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return f"{version} {commit.stdout.strip()}{'+changed' if status.stdout.strip() else ''}"
    return version


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide results."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _job_name() -> str:
    """Where this start runs: the host, and the Slurm job if there is one."""
    array = [os.getenv("SLURM_ARRAY_JOB_ID"), os.getenv("SLURM_ARRAY_TASK_ID")]
    job = "_".join(str(part) for part in array) if all(array) else os.getenv("SLURM_JOB_ID")
    return f"Slurm job {job} on {platform.node()}" if job else platform.node()


def _digest(source: Path | str) -> str:
    return files.sha256(source) if isinstance(source, Path) else source


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
