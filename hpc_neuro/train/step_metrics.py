"""Per-step numbers: kept on the device, brought to the host together, averaged over ranks and passes."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.core.types import copy_to_device


class DivergedError(ConfigError):
    """The loss or its gradient is no longer finite: these settings do not train."""


class Meter:
    """Collects the terms of every step since the last `collect_rows`, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._clear()

    def _clear(self) -> None:
        # Per step [2, names]: weighted sums of the terms, and the weights.
        self._sums: list[Tensor] = []
        self._facts: list[dict[str, Any]] = []
        self._norms: list[Tensor | float] = []
        self._begin = time.monotonic()
        self._waited = 0.0

    @contextmanager
    def measure_wait(self) -> Iterator[None]:
        """Count the time spent inside as waiting for data."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - begin

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time spent inside (validation, saving) as training time."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._begin += time.monotonic() - begin

    def new_step(self) -> None:
        """Begin a step."""
        self._sums.append(torch.zeros(2, max(1, len(self._names)), dtype=torch.float64, device=self._device))

    def add(self, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
        """Add the terms of one pass, each a mean over `weights` samples; the same names in every pass."""
        if not self._names:
            self._names = list(terms)
            self._sums[-1] = torch.zeros(2, len(terms), dtype=torch.float64, device=self._device)

        values = []
        for name in self._names:
            value = terms[name].detach().double()
            # A term of no sample is nan, and must not turn the sum into nan.
            values.append(value.nan_to_num(0.0) if weights[name] == 0 else value)

        weight = copy_to_device(torch.tensor([weights[n] for n in self._names], dtype=torch.float64), self._device)
        self._sums[-1] += torch.stack([torch.stack(values).to(self._device) * weight, weight])

    def end_step(self, norm: Tensor | float, facts: Mapping[str, Any]) -> None:
        """End a step. norm: of the gradient; facts: what the host knows already (step, lr)."""
        self._norms.append(norm)
        self._facts.append(dict(facts))

    def collect_rows(self, crops_per_step: int, steps_left: int, check_norm: bool) -> list[dict[str, Any]]:
        """One row per step since the last call; the last row has also speed, waiting and memory. All ranks call this.

        Raises DivergedError at the first step whose loss, or with `check_norm` whose gradient, is not finite.
        """
        if not self._facts:
            return []

        # One reduction for all steps is cheaper than one a step, and the host waits for the device once.
        sums = torch.stack(self._sums)  # [steps, 2, names]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        # 0 / 0 is nan: no sample had that term.
        means = (sums[:, 0] / sums[:, 1]).tolist()

        rows = []
        for facts, values, norm in zip(self._facts, means, map(float, self._norms), strict=True):
            terms = dict(zip(self._names, values, strict=True))
            if not math.isfinite(terms["loss"]) or (check_norm and not math.isfinite(norm)):
                raise DivergedError(
                    f"step {facts['step']}: the loss is {terms['loss']:.4g} and its gradient {norm:.4g}; train in "
                    "another `out` with a lower optim.lr, a longer optim.warmup or a smaller optim.clip"
                )

            rows.append({**facts, **terms, "grad_norm": norm})

        # Speed is a mean over the steps, so one row has it.
        rows[-1] |= self._measure_speed(len(rows), crops_per_step, steps_left)
        self._clear()
        return rows

    def _measure_speed(self, steps: int, crops_per_step: int, steps_left: int) -> dict[str, Any]:
        seconds = max(time.monotonic() - self._begin, 1e-9)

        # One rank that runs out of memory ends the run, so the largest counts.
        memory = _gather_from_ranks(int(_peak_memory(self._device)))
        return {
            "crops_per_s": crops_per_step * steps / seconds,
            "data_wait_share": distributed.reduce_scalar(self._waited / seconds, "max", torch.device("cpu")),
            "memory_bytes": max(memory),
            "memory_bytes_by_rank": memory,
            "eta_s": seconds / steps * steps_left,
        }


def _gather_from_ranks(value: int) -> list[int]:
    """A number of every rank, on all ranks."""
    values = torch.zeros(distributed.world_size(), dtype=torch.int64)
    values[distributed.rank()] = value

    # A sum gathers, since every other rank has zero there.
    if len(values) > 1:
        dist.all_reduce(values)
    return [int(v) for v in values]


def _peak_memory(device: torch.device) -> float:
    """[bytes] Most memory this rank held so far: of the GPU, or resident on the host."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))

    # Linux counts resident memory in KiB.
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
