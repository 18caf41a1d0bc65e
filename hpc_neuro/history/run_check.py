"""One run of the chain, and what is true of every run: its config, its record, the files it was made from and wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.schema import InputError
from hpc_neuro.report.provenance import RunRecord

_SHOWN = 12  # of a digest's characters
_MANY = 12  # more of a kind are summed up in one line


class Stage:
    """Lines for people; a link either holds or is broken."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.lines: list[str] = []
        self.broken: list[str] = []
        self.held = 0
        self.unknown = 0  # links that could not be compared
        self.last: Path | str = title  # the JSON file read last
        self._kinds: dict[str, int] = {}

    def say(self, text: str, kind: str = "") -> None:
        """A line; of those of one `kind`, the first few."""
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if not kind or self._kinds[kind] <= _MANY:
            self.lines.append(text)
        elif self._kinds[kind] == _MANY + 1:
            self.lines.append(f"... and more {kind}")

    def unsure(self, text: str, kind: str) -> None:
        """A link that is not compared, and why."""
        self.unknown += 1
        self.say(text, kind)

    def bad(self, text: str) -> None:
        """A broken link."""
        self.broken.append(text)
        self.lines.append(f"BROKEN: {text}")

    def equal(self, what: str, now: object, then: object) -> bool:
        """A digest, or any value, that must be what was recorded."""
        if now == then:
            self.held += 1
            return True
        self.bad(f"{what} is {short(now)} now, but was {short(then)}")
        return False

    def compare(self, path: Path, then: str, name: str, kind: str = "files") -> None:
        """A file whose SHA-256 must be `then`."""
        if not path.exists():
            self.bad(f"{name} is missing: {path} does not exist")
        elif (now := files.sha256(path)) != then:
            self.bad(f"{name} was changed: {path} has SHA-256 {short(now)}, but {short(then)} was recorded")
        else:
            self.held += 1
            self.say(f"{name}  {short(then)}  {path}", kind)

    def read(self, path: Path) -> Any:
        """A JSON file of the chain; None, and broken, when it is missing or damaged."""
        self.last = path
        try:
            return files.read_json(path, "make it again")
        except InputError as error:
            self.bad(str(error).partition(";")[0])
            return None


def short(value: object) -> str:
    """The beginning of a digest; other values as they are."""
    text = str(value)
    return text[:_SHOWN] if len(text) == 64 else text


def raw_files(link: RunRecord, quick: bool) -> Stage | None:
    """The files that came from outside, as `prepare` or `infer` recorded them; None when this run took none."""
    record = link.record or {}
    if link.name not in ("prepare", "infer"):
        return None
    inputs = record.get("inputs", {})
    raw = {k: v for k, v in inputs.items() if k.startswith("image ") or k.endswith((".image", ".swc"))}
    if not raw:
        return None
    stage, sources = Stage(f"raw data of {link.path}: {len(raw)} files"), record.get("sources", {})
    for name, then in run_folder.track_progress(
        sorted(raw.items(), key=lambda i: run_folder.natural_key(i[0])), "raw files", unit="file"
    ):
        if name not in sources:
            stage.unsure(f"{name}  {short(then)}  (where it lay is not recorded, so it is not compared)", "raw files")
            continue
        path = link.locate(sources[name])
        if quick and path.exists():
            stage.unsure(f"{name}  {short(then)}  {path} (not read)", "raw files")
        else:
            stage.compare(path, then, name, "raw files")
    return stage


def common(link: RunRecord) -> Stage:
    """Code, config, jobs, end, and the outputs by their hashes."""
    stage = Stage(f"{link.name}: {link.path}")
    if link.record is None:
        gone = "has no run.json" if link.path.exists() else "does not exist"
        stage.title = f"{link.name or 'run'}: {link.path}"
        stage.bad(f"{link.path} {gone}")
        return stage
    record, jobs = link.record, link.record.get("jobs") or [link.record.get("host", "an unknown host")]
    stage.say(f"code {record.get('code')}, config {short(files.sha256_json(record.get('config')))}")
    stage.say(
        f"started {', '.join(record.get('starts', []))}, ended {record.get('end')}, "
        f"job{'s' * (len(jobs) > 1)}: {', '.join(map(str, jobs))}"
    )
    if record.get("exit") == 0:
        stage.held += 1
    else:
        failures = "; ".join(map(str, record.get("failures", []))) or "it was stopped or is at work"
        stage.bad(f"the run is not complete (exit {record.get('exit')}): {failures}")
    _config(stage, link)
    for name, then in record.get("outputs", {}).items():
        stage.compare(link.path / name, then, name)
    return stage


def _config(stage: Stage, link: RunRecord) -> None:
    """config.yaml must say what the record says; `out` may have moved."""
    path = link.path / "config.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        stage.bad(f"config.yaml is missing: {path} does not exist")
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stage.bad(f"{path} cannot be read as YAML ({' '.join(str(error).split())})")
        return
    held = {k: v for k, v in found.items() if k != "out"} if isinstance(found, dict) else found
    then: Mapping[str, Any] = (link.record or {}).get("config", {})
    if held == then:
        stage.held += 1
    else:
        keys = [k for k in {**then, **held} if held.get(k) != then.get(k)] if isinstance(held, dict) else ["all of it"]
        stage.bad(f"config.yaml was changed after the run: {', '.join(keys)}")
