"""Logging of a run: metrics.jsonl is the record; Weights & Biases gets a copy that never blocks training."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import queue
import signal
import threading
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.metric_rows import parse_row, read_lines
from hpc_neuro.core.schema import InputError
from hpc_neuro.train.config import TrackerConfig

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""Name of the file of metrics in a run folder."""

_CAPTION = "image, truth, probability: maximum along z, below along y"

_QUEUE_ROWS = 10_000
"""Rows that may wait for Weights & Biases; further ones are dropped there, and are in metrics.jsonl anyway."""


# --- metrics.jsonl ---


class MetricsFile:
    """OUT/metrics.jsonl: one JSON object per line, in step order. A full disk delays rows, and loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def resume(self, step: int, again: Collection[str] = ()) -> None:
        """Drop the rows that will be written again: of steps after `step`, and of `step` those of the kinds in `again`.

        Unreadable lines at the end were torn by a kill, and go too. Raises InputError for one before a row that stays.
        """
        if not self.path.exists():
            return

        lines = read_lines(self.path)
        positions = [_position_of_row(line, again) for line in lines]

        # A kill tears the last lines only. A bad line before a good one has another cause, and is not dropped silently.
        last_kept = max((i for i, position in enumerate(positions) if position <= step), default=-1)
        for number, position in enumerate(positions[: last_kept + 1], start=1):
            if math.isnan(position):
                raise InputError(
                    f"line {number} of {self.path} is no row of metrics; remove that line, then give the same command "
                    "again"
                )

        kept = [line.decode() for line, position in zip(lines, positions, strict=True) if position <= step]
        files.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; numbers that are not finite become null."""
        self._waiting += [json.dumps(replace_nonfinite(row), allow_nan=False) for row in rows]

        # The size before tells where to cut after a failure.
        size = self.path.stat().st_size if self.path.exists() else 0

        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write("".join(f"{line}\n" for line in self._waiting))
        except OSError as error:
            log.warning("%s: %d rows wait to be written (%s)", self.path, len(self._waiting), error)
            # Half a line must not stay.
            if self.path.exists():
                os.truncate(self.path, size)
            return
        self._waiting = []


def replace_nonfinite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with nan and infinities as None, because JSON cannot express them."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}


def _position_of_row(line: bytes, again: Collection[str]) -> float:
    """The step of a row, half a step later for kinds in `again`; nan for a line that is no row."""
    row = parse_row(line)
    return math.nan if row is None else row["step"] + 0.5 * (row.get("kind") in again)


# --- Weights & Biases ---


class WandbLogger:
    """Copies rows to Weights & Biases from a thread of its own; a failure there is logged and ends the copying."""

    def __init__(
        self,
        cfg: TrackerConfig,
        out: Path,
        run_config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """run_config: the config of the run; inputs: digests of its inputs, such as the feature cache."""
        self.cfg = cfg
        self.out = out
        self._inputs = dict(inputs or {})
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=_QUEUE_ROWS)
        self._thread: threading.Thread | None = None
        self._is_finished = False

        # A daemon does not keep the process alive when the network hangs.
        if cfg.wandb != "disabled":
            self._thread = threading.Thread(target=self._copy_rows, args=(dict(run_config),), name="wandb", daemon=True)
            self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether rows are being copied."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pictures(self) -> int:
        """How many pictures a validation should draw."""
        return self.cfg.pictures if self.is_running else 0

    def show(self, step: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Copy pictures [H, W] of validation crops; never waits."""
        if pictures:
            self.write([{"step": step, "kind": "val", "pictures": list(pictures)}])

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Copy rows; never waits."""
        if not self.is_running:
            return

        for row in rows:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                log.warning("Weights & Biases lags %d rows behind; rows are dropped there", _QUEUE_ROWS)
                return

    def close(self) -> None:
        """Let the thread finish, for at most `patience` seconds."""
        if self._thread is None:
            return

        # None marks the end.
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
            self._thread.join(self.cfg.patience)
        if self._is_finished:
            return

        # Registered last, so it runs before the hook that Weights & Biases registered when it started.
        atexit.register(_kill_wandb_service)
        if self._thread.is_alive():
            log.warning(
                "Weights & Biases did not finish within %g s and is left behind; what it has not sent is in %s, "
                "tools/sync_wandb.py sends it later",
                *(self.cfg.patience, self.out / "wandb"),
            )

    def _copy_rows(self, run_config: dict[str, Any]) -> None:
        # No failure of a copy may stop the training: whatever it is, it is logged, and this thread ends.
        try:
            run = self._start_run(run_config)
            while (row := self._rows.get()) is not None:
                run.log(_name_values(row))
            run.finish()
            self._is_finished = True
        except Exception as error:
            log.warning("Weights & Biases stopped (%s: %s); %s goes on", type(error).__name__, error, METRICS)

    def _start_run(self, run_config: dict[str, Any]) -> Any:
        # Takes a second to import, for which only this thread waits.
        import wandb

        run = wandb.init(
            id=get_wandb_id(self.out),
            project=self.cfg.project,
            name=self.cfg.name or self.out.resolve().name,
            group=self.cfg.group,
            dir=str(self.out),
            mode=self.cfg.wandb,
            resume="allow" if self.cfg.wandb == "online" else None,
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        # Later jobs of the same run know more than the first one did.
        run.config.update({**run_config, **collect_run_facts(self.out, self._inputs)}, allow_val_change=True)

        # Validations are rarer than steps, so every kind has the step as its axis.
        for kind in ("train", "val", "volumes"):
            run.define_metric(f"{kind}/*", step_metric="step")
        return run


def _name_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as Weights & Biases takes it: keys behind the kind, pictures as images."""
    import wandb

    named: dict[str, Any] = {"step": row["step"]}

    for key, value in row.items():
        if key not in ("kind", "step", "pictures") and value is not None:
            named[f"{row['kind']}/{key}"] = value
    for index, picture in enumerate(row.get("pictures", ())):
        named[f"val/crop_{index}"] = wandb.Image(picture, caption=_CAPTION)
    return named


def _kill_wandb_service() -> None:
    """Kill the service process that Weights & Biases started here: at exit Python would wait for it without limit."""
    for path in Path("/proc").glob("[0-9]*"):
        # A process may end meanwhile.
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb-core" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


def collect_run_facts(out: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What identifies a run besides its config: code, versions, inputs, and the jobs it has had so far."""
    has_record = (out / run_folder.RECORD).exists()
    jobs = run_folder.read_record(out, f"remove {out} to start again").get("jobs", []) if has_record else []

    facts = {
        "code": run_folder.code_version(),
        "versions": run_folder.package_versions(),
        "inputs": dict(inputs),
        "jobs": jobs,
    }
    return {"run": facts}


def get_wandb_id(out: Path) -> str:
    """The Weights & Biases run id of a folder: created once, so that a requeue continues the same run."""
    path = out / "wandb_id"
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="utf-8").strip()
