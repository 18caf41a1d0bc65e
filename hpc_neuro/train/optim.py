"""Learning rates, parameter groups and the running average of the weights.

Learning rates and the decay of the average depend on the step only, so nothing of them is saved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpc_neuro.train.config import OptimConfig

BETAS = (0.9, 0.98)
"""Decay rates of Adam's running mean and variance."""

FINAL_RATE = 0.01
"""Learning rate at the last step, relative to the highest one."""

_BLOCK = re.compile(r"\.vit\.blocks\.(\d+)\.")
_EMBEDDINGS = ("pos_embed", "depth_embed", "cls_token", "reg_token")


# --- Learning rates ---


def lr_at(step: int, cfg: OptimConfig, final: float = FINAL_RATE) -> float:
    """Learning rate of step 0, 1, ... relative to `lr`: a linear rise, then a cosine down to `final`."""
    rise = cfg.warmup * cfg.steps

    # Adam's variance is a poor estimate at first, and full steps would harm a teacher's weights.
    if step < rise:
        return (step + 1) / (rise + 1)

    # The last step, and not the one after it, is at `final`.
    progress = min(1.0, (step - rise) / max(1.0, cfg.steps - 1 - rise))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    lr_scale: float
    weight_decay: float
    names: list[str] = field(default_factory=list)


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, lr_scales: Mapping[str, float]
) -> list[ParameterGroup]:
    """Trainable parameters by learning rate and weight decay, in a fixed order.

    lr_scales: learning rates relative to that of a new parameter, by name; 0 for one that does not change.
    """
    groups: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue

        # New parameters start from nothing and learn at the full rate.
        scale = lr_scales.get(name, 1.0)

        # Decay of biases, norms and embeddings has no use as a regularizer.
        has_decay = parameter.ndim >= 2 and name.rsplit(".", 1)[-1] not in _EMBEDDINGS
        key = (scale, weight_decay if has_decay and scale else 0.0)
        groups.setdefault(key, ParameterGroup(*key)).names.append(name)

    # A sorted order does not depend on the order of the parameters, so it is the same on every rank and start.
    return [groups[key] for key in sorted(groups)]


def lr_scale(name: str, cfg: OptimConfig, depth: int) -> float:
    """Relative learning rate of a transferred parameter of tokenizer or transformer, by its name."""
    # The final norm learns as the last block; what comes before the blocks learns slowest.
    blocks_after = 0 if ".vit.norm." in f".{name}" else depth
    block = _BLOCK.search(f".{name}")
    if block:
        blocks_after = depth - 1 - int(block.group(1))

    return cfg.vit_lr * cfg.layer_decay**blocks_after


# --- The running average of the weights, float32: what is validated and exported ---


def decay_at(step: int, steps: int, window: float) -> float:
    """Weight of the old average at step 0, 1, ...: the span is `window * steps`, at first a tenth of the steps done."""
    span = max(1.0, min(window * steps, (step + 1) / 10))
    return 1 - 1 / span


class Ema:
    """The average of this rank's share of the master weights, sharded as ZeRO shards them."""

    def __init__(self, weights: Mapping[int, Tensor], refresh: Callable[[], None]) -> None:
        """weights: float32, changed in place by the optimizer; refresh: brings them into use, on all ranks together."""
        self._weights = dict(weights)
        self._refresh = refresh
        self.average = {key: weight.detach().clone() for key, weight in self._weights.items()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the weights by 1 - decay."""
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def swap_in(self) -> Iterator[None]:
        """Use the average inside, and the weights again after, bit for bit. All ranks enter together.

        After an error the weights are not restored: the ranks cannot meet to refresh them, and the run is over.
        """
        saved = {key: weight.detach().clone() for key, weight in self._weights.items()}

        self._fill(self.average)
        yield
        self._fill(saved)

    @torch.no_grad()
    def _fill(self, values: Mapping[int, Tensor]) -> None:
        for key, weight in self._weights.items():
            weight.copy_(values[key])
        self._refresh()
