"""A running average of the weights, float32: what is validated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from pydantic import Field
from torch import Tensor, nn

from hpc_neuro.schema import config


@config
class EmaConfig:
    """Average of the weights over the last steps."""

    window: float = Field(default=0.05, ge=0, lt=1)
    """Share of `optim.steps` averaged over; 0: off. While fewer steps are done, the average spans a tenth of them."""


def decay_at(step: int, steps: int, window: float) -> float:
    """Weight of the old average at step 0, 1, ...: the span is `window * steps`, at first a tenth of the steps done."""
    span = max(1.0, min(window * steps, (step + 1) / 10))
    return 1 - 1 / span


class Ema:
    """The averaged parameters of a module whose parameters are whole on every rank (ZeRO stages 0 to 2)."""

    def __init__(self, module: nn.Module) -> None:
        self._live = dict(module.named_parameters())
        self.average = {k: p.detach().clone().float() for k, p in self._live.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the parameters by 1 - decay."""
        live = [self._live[k].detach().float() for k in self.average]
        torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module computes with the average inside, with its own weights again after; both bit for bit."""
        kept = {k: p.detach().clone() for k, p in self._live.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over a saved `average`."""
        for name, value in self.average.items():
            value.copy_(state[name])
