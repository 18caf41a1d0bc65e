"""Traces of some steps: where their time goes, and on a GPU what its memory held; one file per rank."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from hpc_neuro.core import distributed, files

log = logging.getLogger(__name__)
_MOST_EVENTS = 200_000
"""Allocations that a memory snapshot holds."""


class StepProfiler:
    """Profiles the steps first to last, both included; with None, none.

    FOLDER/steps_A_B_rank_R.json.gz      torch's profiler, for https://ui.perfetto.dev
    FOLDER/steps_A_B_rank_R.pickle       memory of a GPU, for https://pytorch.org/memory_viz
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, device: torch.device) -> None:
        self._steps, self._folder, self._device = steps, folder, device
        self._profile: Any = None
        self._first = self._last = 0

    def begin_step(self, step: int) -> None:
        """A step begins. The first one in the range starts the trace; a resumed run may begin within it."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)

        self._first = step
        self._profile = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def end_step(self, step: int) -> None:
        """A step has ended; after the last one of the range the trace is written."""
        self._last = step
        if self._profile is not None and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write the trace of the steps so far, if there is one."""
        if self._profile is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._profile.stop()

        base = self._folder / f"steps_{self._first}_{self._last}_rank_{distributed.rank()}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with files.atomic(base.with_suffix(".json.gz")) as part:
            # The ending tells the profiler to compress.
            written = part.with_name(f"{part.name}.json.gz")
            self._profile.export_chrome_trace(str(written))
            written.replace(part)
        if self._device.type == "cuda":
            with files.atomic(base.with_suffix(".pickle")) as part:
                torch.cuda.memory._dump_snapshot(str(part))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)

        self._profile = None
        log.info("train: wrote the trace of steps %d to %d to %s", self._first, self._last, self._folder)
