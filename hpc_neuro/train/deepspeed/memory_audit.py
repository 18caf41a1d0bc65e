"""What a rank holds for a training step: as it must be by arithmetic, and as it is found in DeepSpeed's tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RankMemory:
    """[bytes] on one rank."""

    parameters: int  # as the passes use them
    gradients: int  # at their most: after the backward of any pass of a step
    optimizer: int  # Adam's moments, and float32 master weights where they are another copy

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def even_share(parameters: int, ranks: int, stage: int, value_bytes: int) -> RankMemory:
    """What ZeRO promises: from its stage on, each kind is shared out evenly. (Rajbhandari et al., SC 2020, figure 1)

    value_bytes: of a weight in use and of its gradient, 4 for float32 and 2 for bf16 or fp16. DeepSpeed steps on a
    float32 copy of a rank's share of the weights even where these are float32, except in stage 0.
    """

    def over(kind: int) -> int:
        return ranks if stage >= kind else 1

    master = 4 if value_bytes < 4 or stage > 0 else 0
    return RankMemory(
        parameters=value_bytes * parameters // over(3),
        gradients=value_bytes * parameters // over(2),
        optimizer=(8 + master) * parameters // over(1),
    )


def measure_rank_memory(engine: Any) -> RankMemory:
    """Tensors of an `Engine`, each storage once; to be called after a backward, before the step."""
    zero, shards = engine.optimizer, engine.shards
    used = [p for p in engine.module.parameters() if p.requires_grad]
    weights = [t for p in used for t in (p.data, getattr(p, "ds_tensor", None)) if t is not None]
    gradients: list[Tensor] = [p.grad for p in used if p.grad is not None]
    for held in (getattr(zero, "averaged_gradients", None) or {}).values():
        gradients += [g for g in held or () if g is not None]
    partitions = getattr(zero, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    gradients += list(partitions.values())
    seen: set[int] = set()
    parameters = _bytes(weights, seen)
    state = [*shards.flats, *(m for s in shards.items for m in shards.moments(s).values())]
    optimizer = _bytes(state, seen)
    return RankMemory(parameters=parameters, gradients=_bytes(gradients, seen), optimizer=optimizer)


def _bytes(tensors: Iterable[Tensor], seen: set[int]) -> int:
    """Of storages not in `seen`, which they then are."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
