"""What a run would take on a machine that need not be there: operations, and memory per rank by ZeRO stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field

from hpc_neuro.files import human
from hpc_neuro.geometry import Shape
from hpc_neuro.models import cost
from hpc_neuro.models.student import StudentConfig
from hpc_neuro.schema import config
from hpc_neuro.train.ledger import Held, ideal

# Dense bf16 operations per second, from the makers' data sheets. The first name that a device's name contains counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX A6000": 155e12,
    "A40": 150e12,
    "A10": 125e12,
    "L4": 121e12,
}
_FREE = 0.92  # of a GPU's memory; the driver, NCCL and what the allocator cannot use take the rest


@config
class PlanConfig:
    """The machine that --dry-run plans for. It decides nothing of a run."""

    nodes: int = Field(default=1, ge=1)
    """Nodes."""
    gpus: int | None = Field(default=None, ge=1)
    """GPUs per node; none: as many ranks as this start has, on this machine."""
    memory: float = Field(default=80.0, gt=0)
    """[GB] Memory of one GPU."""

    @property
    def ranks(self) -> int | None:
        """Ranks of the machine; None where none is given."""
        return None if self.gpus is None else self.nodes * self.gpus


@dataclass(frozen=True)
class Stage:
    """[bytes] on one rank at one ZeRO stage."""

    stage: int
    held: Held
    average: int  # the running average of the weights
    buffers: int  # of communication, and parameters gathered for the layers at work
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.held.total + self.average + self.buffers + self.activations


def stages(
    parameters: int, averaged: int, ranks: int, value_bytes: int, activations: int, bucket: int, offload: bool
) -> list[Stage]:
    """Memory by stage. averaged: parameters with a running average; bucket: elements reduced or gathered at once."""
    found = []
    for stage in range(4):
        held, average = ideal(parameters, ranks, stage, value_bytes), 4 * averaged // (ranks if stage else 1)
        if offload and stage:
            held, average = Held(held.parameters, held.gradients, 0), 0
        live = parameters // 4 if stage == 3 else 0
        buffers = value_bytes * (live + (2 * bucket if stage and ranks > 1 else 0))
        found.append(Stage(stage, held, average, buffers, activations))
    return found


def lines(rows: list[Stage], memory: float | None) -> Iterator[str]:
    """A table for people; memory: [bytes] of a GPU, None where there is none to fit into."""
    kinds = ("parameters", "gradients", "optimizer", "average", "buffers", "activations", "total")
    yield "memory per rank  " + "".join(f"{kind:>13}" for kind in kinds)
    for row in rows:
        values = [*vars(row.held).values(), row.average, row.buffers, row.activations, row.total]
        fits = "" if memory is None else "   fits" if row.total < _FREE * memory else "   does not fit"
        yield f"ZeRO stage {row.stage}     " + "".join(f"{human(v):>13}" for v in values) + fits
    if memory is not None:
        fit = [row.stage for row in rows if row.total < _FREE * memory]
        yield (
            f"the lowest stage that fits a GPU of {human(memory)} is {fit[0]}: it communicates least"
            if fit
            else f"no stage fits a GPU of {human(memory)}; give engine.micro_batch=1, student.checkpointing=true, a "
            "smaller crop.size or more GPUs"
        )


def operations(student: StudentConfig, crop: Shape) -> tuple[int, float]:
    """(tokens, operations of a training step without recomputation) of one crop: three times those of forward."""
    tokens = math.prod(n // p for n, p in zip(crop, student.patch, strict=True))
    return tokens, 3 * sum(part.forward for part in cost.costs(student, crop, 1))


def peak(device: torch.device) -> float | None:
    """Operations per second that a GPU can do in bf16; None for one that is not in the list, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((value for key, value in PEAKS.items() if key in name), None)
