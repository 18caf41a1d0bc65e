"""Batches brought to the device one ahead, on a stream of their own."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from hpc_neuro.core.types import Batch


class OnDevice:
    """Takes batches from the host and hands them out on the device.

    `fetch` after a backward has been queued copies the next batch while the GPU computes. What the host decides by
    (`index`, `distilled`) stays on the host: asking the device would wait for it.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._next: Batch | None = None

    def fetch(self) -> None:
        """Begin to bring over the next batch, when none is on its way and there is one left."""
        if self._next is None and (read := next(self._batches, None)) is not None:
            with contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side):
                moved = read.to(self._device)
            self._next = dataclasses.replace(moved, index=read.index, distilled=read.distilled)

    def take(self) -> Batch:
        """The next batch, for the stream that is current. Raises StopIteration after the last."""
        self.fetch()
        if self._next is None:
            raise StopIteration
        batch, self._next = self._next, None
        if self._side is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._side)
            for tensor in (batch.image, batch.mask, batch.skeleton, *batch.features.values()):
                tensor.record_stream(current)  # its memory is not given out again before this stream is through with it
        return batch
