"""What a run says: metrics.jsonl is the truth; Weights & Biases gets a copy that never blocks."""

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
from hpc_neuro.train.config import TrackerConfig

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
_CAPTION = "image, truth, probability: maximum along z, below along y"
_WAITING_ROWS = 10_000  # rows that may wait for W&B; more are dropped, they are in metrics.jsonl anyway


class MetricsFile:
    """OUT/metrics.jsonl: one JSON object per line, in step order. A full disk holds rows back, no more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []

    def resume(self, step: int, again: Collection[str] = ()) -> None:
        """Drop what is about to be made again: rows of steps after `step`, at `step` those of the kinds in `again`, and
        a line torn by a kill.
        """
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _place(line, again) <= step]
        files.write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; numbers that are not finite become null."""
        self._waiting += [json.dumps(replace_nonfinite(row), allow_nan=False) for row in rows]
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write("".join(f"{line}\n" for line in self._waiting))
        except OSError as error:
            log.warning("%s: %d rows wait to be written (%s)", self.path, len(self._waiting), error)
            if self.path.exists():
                os.truncate(self.path, size)
            return
        self._waiting = []


def replace_nonfinite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with NaN and infinities as None, as JSON has no word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


class WandbLogger:
    """A copy of the rows to Weights & Biases, from a thread of its own; trouble there is said and ends the copying."""

    def __init__(
        self,
        cfg: TrackerConfig,
        out: Path,
        run_config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """run_config: the config of the run; inputs: digests of what it is made from, as the feature cache."""
        self.cfg, self.out = cfg, out
        self._inputs = dict(inputs or {})
        self._rows: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=_WAITING_ROWS)
        self._thread: threading.Thread | None = None
        self._whole = False  # everything has been taken
        if cfg.wandb != "disabled":
            self._thread = threading.Thread(target=self._work, args=(dict(run_config),), name="wandb", daemon=True)
            self._thread.start()

    @property
    def pictures(self) -> int:
        """How many pictures are wanted at a validation."""
        return self.cfg.pictures if self._thread is not None and self._thread.is_alive() else 0

    def show(self, step: int, pictures: Sequence[NDArray[np.uint8]]) -> None:
        """Hand over pictures [H, W] of validation crops; never waits."""
        if pictures:
            self.write([{"step": step, "kind": "val", "pictures": list(pictures)}])

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Hand rows over; never waits."""
        if self._thread is None or not self._thread.is_alive():
            return
        for row in rows:
            try:
                self._rows.put_nowait(row)
            except queue.Full:
                log.warning("Weights & Biases lags %d rows behind; rows are dropped there", _WAITING_ROWS)
                return

    def close(self) -> None:
        """Let the thread finish, at most `patience` seconds."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)
            self._thread.join(self.cfg.patience)
        if self._whole:
            return
        atexit.register(_end_service)  # runs before the hook that Weights & Biases registered when it started
        if self._thread.is_alive():
            log.warning(
                "Weights & Biases did not finish within %g s and is left behind; what it has not sent is in %s, "
                "tools/sync_wandb.py sends it later",
                *(self.cfg.patience, self.out / "wandb"),
            )

    def _work(self, run_config: dict[str, Any]) -> None:
        try:
            import wandb  # 1 s of import that only this thread waits for

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
            # later jobs of the same run say more than the first one did
            run.config.update({**run_config, **collect_run_facts(self.out, self._inputs)}, allow_val_change=True)
            for kind in ("train", "val", "volumes"):
                run.define_metric(f"{kind}/*", step_metric="step")
            while (row := self._rows.get()) is not None:
                shown = row.pop("pictures", ())
                named = {f"{row['kind']}/{k}": v for k, v in row.items() if k not in ("kind", "step") and v is not None}
                named |= {f"val/crop_{i}": wandb.Image(p, caption=_CAPTION) for i, p in enumerate(shown)}
                run.log({"step": row["step"], **named})
            run.finish()
            self._whole = True
        except Exception as error:
            # No failure of a copy may stop the training: whatever it is, it is said, and this thread ends.
            log.warning("Weights & Biases stopped (%s: %s); %s goes on", type(error).__name__, error, METRICS)


def _end_service() -> None:
    """Kill the service process that Weights & Biases started here: at exit Python would wait for it without limit."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile
            parent = int((path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"wandb-core" in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)


def collect_run_facts(out: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a run is known by besides its config: code, versions, inputs, and the jobs it has had so far."""
    record = out / "run.json"
    jobs = files.read_json(record, "made by every run").get("jobs", []) if record.exists() else []
    found = {
        "code": run_folder.code_version(),
        "versions": run_folder.package_versions(),
        "inputs": dict(inputs),
        "jobs": jobs,
    }
    return {"run": found}


def get_wandb_id(out: Path) -> str:
    """The Weights & Biases run id of a folder: made once, so that a requeue continues the same run."""
    path = out / "wandb_id"
    if not path.exists():
        files.write_text(path, uuid.uuid4().hex[:8] + "\n")
    return path.read_text(encoding="utf-8").strip()


def _place(line: str, again: Collection[str]) -> float:
    """The step of a row, half a step later for kinds in `again`; infinity for a torn one, which is then dropped."""
    try:
        row = json.loads(line)
        return float(row["step"]) + 0.5 * (row["kind"] in again)
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
