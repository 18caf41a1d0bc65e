"""Learning rates: functions of the step and of a parameter's name, nothing remembered."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from pydantic import Field
from torch import nn

from hpc_neuro.core.schema import config

_BLOCK = re.compile(r"\.vit\.blocks\.(\d+)\.")


@config
class OptimConfig:
    """AdamW, its schedule, and how many crops make a step."""

    steps: int = Field(default=2000, ge=1)
    """Optimizer steps in all; may be raised to continue a finished run."""
    batch: int = Field(default=4, ge=1)
    """Crops per step over all ranks; smaller passes are accumulated (engine.micro_batch)."""
    lr: float = Field(default=2e-3, gt=0)
    """Highest learning rate: that of the convolutional path, the decoder and the heads."""
    vit_lr: float = Field(default=0.3, gt=0)
    """Learning rate of the last transformer block when its weights were transferred, relative to `lr`."""
    layer_decay: float = Field(default=0.9, gt=0, le=1)
    """Each transferred block before the last learns this much slower than the next one; 1: all alike."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from zero."""
    final: float = Field(default=0.01, ge=0, le=1)
    """Learning rate at the last step, relative to `lr`; a cosine leads there."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of matrices and kernels; biases, norms and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of Adam's running mean and variance."""
    clip: float = Field(default=1.0, ge=0)
    """Longest gradient (2-norm over all parameters); longer ones are scaled down to it; 0: never."""


def lr_at(step: int, cfg: OptimConfig) -> float:
    """Learning rate of step 0, 1, ... relative to `lr`: linear rise, then a cosine down to `final`."""
    rise = cfg.warmup * cfg.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    done = min(1.0, (step - rise) / max(1.0, cfg.steps - 1 - rise))
    return cfg.final + (1 - cfg.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Group:
    """Parameters that share a learning rate and a weight decay."""

    lr_scale: float
    weight_decay: float
    names: list[str] = field(default_factory=list)  # of parameters


def groups(
    named: Iterable[tuple[str, nn.Parameter]], cfg: OptimConfig, depth: int, transferred: Collection[str]
) -> list[Group]:
    """Trainable parameters by learning rate and weight decay, in a fixed order.

    depth: number of transformer blocks; transferred: names of the parameters that have a teacher's weights to keep.
    """
    found: dict[tuple[float, float], Group] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        scale = lr_scale(name, cfg, depth) if name in transferred else 1.0
        plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in ("pos_embed", "depth_embed", "cls_token", "reg_token")
        key = (scale, 0.0 if plain else cfg.weight_decay)
        group = found.setdefault(key, Group(*key))
        group.names.append(name)
    return [found[key] for key in sorted(found)]


def lr_scale(name: str, cfg: OptimConfig, depth: int) -> float:
    """Relative learning rate of a transferred parameter of tokenizer or transformer, by its name."""
    block = _BLOCK.search(f".{name}")
    outside = 0 if ".vit.norm." in f".{name}" else depth  # what comes before the blocks learns slowest
    below = depth - 1 - int(block.group(1)) if block else outside
    return cfg.vit_lr * cfg.layer_decay**below
