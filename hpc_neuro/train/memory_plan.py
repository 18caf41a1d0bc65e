"""What a run would take on a machine that need not be there: operations, and memory per rank by ZeRO stage."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.geometry import Shape
from hpc_neuro.models import cost
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.train.activation_memory import BackwardEvent
from hpc_neuro.train.deepspeed.memory_audit import RankMemory, even_share

# Dense operations per second in bf16 with float32 sums (V100, which has no bf16: fp16), from the makers' data sheets.
# The first that a device's name contains counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "A30": 165e12,
    "V100": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX A6000": 154.8e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
_REDUCED = 500_000_000  # elements that DeepSpeed reduces at once at stage 0
_FREE = 0.92  # of a GPU's memory; the driver, NCCL and what the allocator cannot use take the rest


@dataclass(frozen=True)
class StepWork:
    """What a step needs that no stage changes, and how it is spread."""

    parameters: int  # that are trained
    largest: int  # elements of the largest of them
    averaged: int  # parameters with a running average
    ranks: int
    passes: int  # per step
    value_bytes: int  # of a weight in use
    bucket: int  # elements reduced or gathered at once
    offload: bool  # of the optimizer
    events: Sequence[BackwardEvent]  # of a pass on one rank


@dataclass(frozen=True)
class StageMemory:
    """[bytes] on one rank at one ZeRO stage, at the moment of a step at which it holds most."""

    stage: int
    held: RankMemory
    average: int  # the running average of the weights
    buffers: int  # of communication, parameters gathered for the layers at work, temporaries of Adam
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.held.total + self.average + self.buffers + self.activations


def plan_memory(work: StepWork) -> list[StageMemory]:
    """Memory by stage."""
    found = []
    for stage in range(4):
        even = even_share(work.parameters, work.ranks, stage, work.value_bytes)
        spared = work.offload and stage > 0
        average = 0 if spared else 4 * work.averaged // (work.ranks if stage else 1)
        optimizer = 0 if spared else even.optimizer
        gradients, buffers, activations = max(_holdings(stage, work, spared), key=sum)
        held = RankMemory(even.parameters, gradients, optimizer)
        found.append(StageMemory(stage, held, average, buffers, activations))
    return found


def _holdings(stage: int, work: StepWork, spared: bool) -> Iterator[tuple[int, int, int]]:
    """[bytes] of (gradients, buffers, activations) through the last pass of a step and the step itself.

    As DeepSpeed 0.19 does it. From stage 1 on, gradients are gathered in a bucket; stages 2 and 3 empty it when it is
    full, in place and by two copies of what is in it; stage 2 then adds its share to that of the passes before. Stage 0
    reduces in the end, by one copy of all. The step of a shared optimizer makes its gradients float32, and of these
    three stages only 2 lets go of the others; Adam takes two temporaries.
    """
    n, value = work.parameters, work.value_bytes
    part = -(-n // work.ranks)
    bucket = work.bucket if stage else 0
    live = min(n, max(n // 4, 1 << 20)) if stage == 3 else 0  # see stage3_max_live_parameters
    ready = filled = emptied = 0
    for index, moment in enumerate(work.events):
        whole = n if work.passes > 1 else ready
        before = part if work.passes > 1 else 0
        kept = (whole, whole, before + emptied // work.ranks, part)[stage]
        yield value * kept, value * (bucket + live), moment.most
        ready, filled = ready + moment.numel, filled + moment.numel
        if stage >= 2 and (filled >= bucket or index + 1 == len(work.events)):
            kept = before + (emptied + filled) // work.ranks if stage == 2 else part
            yield value * kept, value * (bucket + live + (stage == 3) * 2 * min(filled, bucket)), moment.now
            emptied, filled = emptied + filled, 0
    if stage == 0:
        yield value * n, value * min(n, _REDUCED) * (work.ranks > 1), 0
        yield value * n, (4 * n if value < 4 else 0) + 2 * 4 * work.largest, 0
    elif not spared:
        yield (4 + value * (stage != 2)) * part, 2 * 4 * part + (value * bucket if stage == 3 else 0), 0


def format_memory_table(rows: list[StageMemory], memory: float | None) -> Iterator[str]:
    """A table for people; memory: [bytes] of a GPU, None where there is none to fit into."""
    kinds = ("parameters", "gradients", "optimizer", "average", "buffers", "activations", "total")
    yield "memory per rank at its most, in a step:"
    yield "                 " + "".join(f"{kind:>13}" for kind in kinds)
    for row in rows:
        values = [*vars(row.held).values(), row.average, row.buffers, row.activations, row.total]
        fits = "" if memory is None else "   fits" if row.total < _FREE * memory else "   does not fit"
        yield f"ZeRO stage {row.stage}     " + "".join(f"{format_bytes(v):>13}" for v in values) + fits
    if memory is not None:
        fit = [row.stage for row in rows if row.total < _FREE * memory]
        yield (
            f"the lowest stage that fits a GPU of {format_bytes(memory)} is {fit[0]}: it communicates least"
            if fit
            else f"no stage fits a GPU of {format_bytes(memory)}; give engine.micro_batch=1, "
            "student.checkpointing=true, a smaller crop.size or more GPUs"
        )


@functools.cache
def count_operations(student: StudentConfig, crop: Shape) -> tuple[int, float]:
    """(tokens, operations of a training step without recomputation) of one crop: three times those of forward."""
    tokens = math.prod(n // p for n, p in zip(crop, student.patch, strict=True))
    return tokens, 3 * sum(part.forward for part in cost.costs(student, crop, 1))


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that a device can do in bf16; None for one that is not in the list, and for a CPU."""
    return look_up_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def look_up_peak(name: str) -> float | None:
    """The entry of PEAKS that a device's name means: whole words of it, as an A4000 is no A40; laptops have less."""
    held = (value for key, value in PEAKS.items() if re.search(rf"\b{key}\b", name))
    return None if "Laptop" in name else next(held, None)
