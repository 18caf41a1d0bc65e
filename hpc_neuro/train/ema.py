"""A running average of the weights, float32: what is validated and exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


def decay_at(step: int, steps: int, window: float) -> float:
    """Weight of the old average at step 0, 1, ...: the span is `window * steps`, at first a tenth of the steps done."""
    span = max(1.0, min(window * steps, (step + 1) / 10))
    return 1 - 1 / span


class Ema:
    """The average of this rank's share of the master weights: as much of it as ZeRO leaves here."""

    def __init__(self, weights: Mapping[int, Tensor], refresh: Callable[[], None]) -> None:
        """weights: float32, changed in place by the optimizer; refresh: brings them into use (Shards.refresh)."""
        self._live, self._refresh = dict(weights), refresh
        self.average = {k: w.detach().clone() for k, w in self._live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the weights by 1 - decay."""
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average is in use inside, the weights themselves again after, bit for bit. All ranks enter together.

        After an error they are not: the ranks could not meet to renew what they use, and the run is over.
        """
        kept = {k: w.detach().clone() for k, w in self._live.items()}
        self._fill(self.average)
        yield
        self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: Mapping[int, Tensor]) -> None:
        for key, weight in self._live.items():
            weight.copy_(values[key])
        self._refresh()
