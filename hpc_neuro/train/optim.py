"""Learning rates: functions of the step and of a parameter's name, nothing remembered."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from torch import nn

from hpc_neuro.train.config import OptimConfig

BETAS = (0.9, 0.98)
"""Decay rates of Adam's running mean and variance."""

_BLOCK = re.compile(r"\.vit\.blocks\.(\d+)\.")


def lr_at(step: int, cfg: OptimConfig) -> float:
    """Learning rate of step 0, 1, ... relative to `lr`: linear rise, then a cosine down to `final`."""
    rise = cfg.warmup * cfg.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, cfg.steps - 1 - rise))
    return cfg.final + (1 - cfg.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    lr_scale: float
    weight_decay: float
    names: list[str] = field(default_factory=list)  # of parameters


def group_parameters(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig, depth: int, transferred: Collection[str]
) -> list[ParameterGroup]:
    """Trainable parameters by learning rate and weight decay, in a fixed order.

    depth: number of transformer blocks; transferred: names of the parameters that have a teacher's weights to keep.
    """
    found: dict[tuple[float, float], ParameterGroup] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale = lr_scale(name, cfg, depth) if name in transferred else 1.0
        plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in ("pos_embed", "depth_embed", "cls_token", "reg_token")
        key = (scale, 0.0 if plain else cfg.weight_decay)
        group = found.setdefault(key, ParameterGroup(*key))
        group.names.append(name)
    return [found[key] for key in sorted(found)]


def lr_scale(name: str, cfg: OptimConfig, depth: int) -> float:
    """Relative learning rate of a transferred parameter of tokenizer or transformer, by its name."""
    block = _BLOCK.search(f".{name}")
    outside = 0 if ".vit.norm." in f".{name}" else depth  # what comes before the blocks learns slowest
    below = depth - 1 - int(block.group(1)) if block else outside
    return cfg.vit_lr * cfg.layer_decay**below
