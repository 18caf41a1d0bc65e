"""The run folder: resolved config, record of what ran, log, progress. Floor 0; every verb uses it."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, TypeVar

import yaml
from tqdm import tqdm

from hpc_neuro.core import files, schema
from hpc_neuro.core.distributed import is_main

T = TypeVar("T")
log = logging.getLogger(__name__)
_PACKAGES = ("torch", "deepspeed", "timm", "h5py", "mpi4py", "numpy", "wandb", "submitit", "tensorstore")
VERSION_FILE = "CODE_VERSION"  # says, in a copy of the code without git, what it is a copy of
_SHARES = "shares"  # folder of the records of an array's tasks
_SECONDS_PER_LINE = 10.0  # a log gets one progress line this often


class Run:
    """One verb at work in its folder."""

    def __init__(self, out: Path, record: dict[str, Any], complete: bool) -> None:
        self.out = out
        self.record = record
        self.complete = complete

    def finish(
        self, summary: Mapping[str, Any] | None = None, failures: Sequence[str] = (), outputs: Iterable[Path] = ()
    ) -> None:
        """Mark the run complete (or finished with `failures`, which a second start tries again).

        `outputs` are the files in the folder that others build on; `hpc-neuro history` checks them by their SHA-256.
        """
        self.record["summary"] = dict(summary or {})
        self.record["outputs"] = {p.relative_to(self.out).as_posix(): files.sha256(p) for p in outputs}
        self.record["failures"] = list(failures)
        self.record["exit"] = 3 if failures else 0


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
    """Enter a run folder: write config.yaml, log to log.txt, and on the way out write run.json.

    `inputs` are files (hashed) or ready digests; `sources` says of which file a ready digest is. `may_change` lists
    dotted keys that may differ from the config already in `out`. Raises ConfigError when `out` belongs to another
    config or its inputs changed. Only the main rank writes; `main` says which that is where the ranks are MPI's.
    `whole=False` says that something is missing again from a run that was once complete, which then starts once more.
    """
    main = is_main() if main is None else main
    # what decides the result; `out` itself may move
    resolved = {k: v for k, v in schema.to_plain(cfg).items() if k != "out"}
    hashes = {k: _digest(v) for k, v in inputs.items()} if main else {}
    behind = {k: v for k, v in inputs.items() if isinstance(v, Path)} | dict(sources or {})
    old = _previous(verb, out, resolved, hashes, may_change)
    if main:
        _check_shares(out, resolved, hashes, may_change)
    if whole and old.get("exit") == 0 and not differences(resolved, old["config"]):
        log.info("%s: %s is already complete (%s)", verb, out, old["end"])
        yield Run(out, old, complete=True)
        return
    record: dict[str, Any] = {
        "verb": verb,
        "code": code_version(),
        "versions": package_versions(),
        "host": platform.node(),
        "command": sys.argv,
        "folder": str(out.resolve()),
        "cwd": str(Path.cwd()),
        "inputs": hashes,
        "sources": {k: str(v.resolve()) for k, v in behind.items()},
        "config": resolved,
        "starts": [*old.get("starts", []), _now()],
        "jobs": [*old.get("jobs", []), _job()],
        "ends": old.get("ends", []),  # why each Slurm job before this start ended; written by launch
        "end": None,
        "exit": None,
    }
    run = Run(out, record, complete=False)
    if not main:
        yield run
        return
    out.mkdir(parents=True, exist_ok=True)
    files.remove_parts(out)
    files.write_json(out / "run.json", record)
    files.write_text(out / "config.yaml", schema.dump(cfg))
    handler = logging.FileHandler(out / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger("hpc_neuro").addHandler(handler)
    try:
        yield run
    except BaseException as error:
        record["exit"] = getattr(error, "code", None) or f"{type(error).__name__}: {error}"
        log.debug("stopped", exc_info=True)
        raise
    finally:
        record["end"] = _now()
        logging.getLogger("hpc_neuro").removeHandler(handler)
        handler.close()
        files.write_json(out / "run.json", record)


def track_progress(items: Iterable[T], label: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Pass `items` through with a bar on a terminal, or a plain line each few seconds in a log. Main rank only."""
    if not is_main():
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, unit=unit, dynamic_ncols=True, leave=False)
    else:
        total = len(items) if total is None and isinstance(items, Sized) else total
        begun = said = time.monotonic()
        for done, item in enumerate(items, start=1):
            yield item
            now = time.monotonic()
            if now - said > _SECONDS_PER_LINE:
                said, rate = now, done / (now - begun)
                left = f", {(total - done) / rate:.0f} s left" if total else ""
                log.info("%s: %d/%s %s, %.2f %s/s%s", label, done, total or "?", unit, rate, unit, left)


def take_share(items: Sequence[T], share: tuple[int, int] | None) -> list[T]:
    """Every n-th item from the i-th of `share` (i, n); all of them for None. Raises ConfigError unless 0 <= i < n."""
    if share is None:
        return list(items)
    index, count = share
    if not 0 <= index < count:
        raise schema.ConfigError(f"share: [{index}, {count}] is none of 0 to {count - 1} of {count}")
    return list(items[index::count])


def share_folder(out: Path, share: tuple[int, int] | None) -> Path:
    """Where the record of one share is kept; `out` itself for None."""
    return out if share is None else out / _SHARES / f"{share[0]:04d}_of_{share[1]:04d}"


def input_name(what: str, share: tuple[int, int] | None) -> str:
    """The name of an input that each share has its own of."""
    return what if share is None else f"{what} of share {share[0]} of {share[1]}"


def natural_key(text: str) -> list[tuple[int, str]]:
    """Sort key under which OP_2 stands before OP_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


@functools.cache
def code_version() -> str:
    """Package version, with the git commit (and `+changed`) when run from a checkout."""
    version = importlib.metadata.version("hpc_neuro")
    root = Path(__file__).resolve().parents[2]
    if (root / VERSION_FILE).exists():
        return (root / VERSION_FILE).read_text(encoding="utf-8").strip()
    if not (root / ".git").exists():
        return version
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
        return f"{version} {commit.stdout.strip()}{'+changed' if changed.stdout.strip() else ''}"
    return version


@functools.cache
def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _previous(
    verb: str, out: Path, resolved: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]
) -> dict[str, Any]:
    """The record already in `out`, checked to be of the same run; {} for a fresh folder."""
    path = out / "run.json"
    if not path.exists():
        if (theirs := out / "config.yaml").exists():  # of a run it would come after run.json
            raise schema.ConfigError(
                f"{theirs} is of no run and would be overwritten; give another `out`, or move it away"
            )
        return {}
    old: dict[str, Any] = files.read_json(path, f"remove {out} to start again")
    if old.get("verb") != verb:
        raise schema.ConfigError(f"{out} holds a `{old.get('verb')}` run; give `{verb}` another `out`")
    if other := differences(resolved, old["config"], may_change):
        raise schema.ConfigError(
            f"{out} was made with another config; choose another `out`, or remove it. Different:\n  "
            + "\n  ".join(other)
        )
    if changed := _changed(hashes, old):
        raise schema.ConfigError(f"the input {', '.join(changed)} changed since {out} was made; choose another `out`")
    return old


def _check_shares(out: Path, resolved: dict[str, Any], hashes: Mapping[str, str], may_change: Sequence[str]) -> None:
    """Raises ConfigError where shares of the run in `out`, or the other shares beside this one, are of another run."""
    root = out.parent.parent if out.parent.name == _SHARES else out
    own = {k: v for k, v in resolved.items() if k != "share"}
    for path in sorted((root / _SHARES).glob("*/run.json")):
        if path.parent == out:
            continue
        record = files.read_json(path, f"remove {path.parent}")
        theirs = {k: v for k, v in record["config"].items() if k != "share"}
        other = differences(own, theirs, may_change) + [f"the input {k}" for k in _changed(hashes, record)]
        if other:
            raise schema.ConfigError(
                f"the share in {path.parent} was made otherwise; give all shares, and the run that gathers them, the "
                "same settings and inputs, or another `out`. Different:\n  " + "\n  ".join(other)
            )


def differences(new: Any, old: Any, may_change: Sequence[str] = ()) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`, but for those that begin with one of `may_change`."""
    return [d for d in _differences(new, old) if not d.startswith(tuple(may_change))]


def _differences(new: Any, old: Any, prefix: str = "") -> list[str]:
    if isinstance(new, dict) and isinstance(old, dict):
        keys = list(dict.fromkeys([*new, *old]))
        return [d for k in keys for d in _differences(new.get(k), old.get(k), f"{prefix}{k}.")]
    return [] if new == old else [f"{prefix.rstrip('.')}: {_short(old)} -> {_short(new)}"]


def _changed(hashes: Mapping[str, str], record: Mapping[str, Any]) -> list[str]:
    """The inputs that a record names with another digest."""
    return [k for k, v in hashes.items() if record.get("inputs", {}).get(k, v) != v]


def _short(value: Any) -> str:
    text = " ".join(str(yaml.safe_dump(value, default_flow_style=True)).replace("\n...", "").split())
    return text if len(text) < 80 else text[:77] + "..."


def _job() -> str:
    """Where this start runs, for people: the host, and the Slurm job if it is one."""
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    job = "_".join(os.environ[n] for n in names) if all(n in os.environ for n in names) else os.getenv("SLURM_JOB_ID")
    return f"Slurm job {job} on {platform.node()}" if job else platform.node()


def _digest(source: Path | str) -> str:
    return files.sha256(source) if isinstance(source, Path) else source


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
