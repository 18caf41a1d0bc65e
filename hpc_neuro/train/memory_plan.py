"""Plan a run on a machine that need not exist: operations, and memory per rank by ZeRO stage."""

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
"""[1/s] Dense operations in bf16 with float32 sums (V100, which has no bf16: fp16), from the makers' data sheets; the
first key that a device's name contains counts."""

_REDUCED_AT_ONCE = 500_000_000
"""[element] What DeepSpeed reduces at once at stage 0."""

_USABLE_SHARE = 0.92
"""Share of a GPU's memory that tensors can use; the driver, NCCL and the allocator's waste take the rest."""


@dataclass(frozen=True)
class RankMemory:
    """[bytes] on one rank."""

    parameters: int
    """Working weights."""
    gradients: int
    """At their most: after the backward of any pass of a step."""
    optimizer: int
    """Adam's moments, and float32 master weights where they are a separate copy."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def even_share(parameters: int, ranks: int, stage: int, value_bytes: int, has_float32_sums: bool = False) -> RankMemory:
    """What ZeRO promises: from its stage on, each kind is sharded evenly (Rajbhandari et al., SC 2020, figure 1).

    value_bytes: of a working weight and of its gradient, 4 for float32 and 2 for bf16 or fp16. has_float32_sums: see
    StepWork; gradients are then float32 and sharded from stage 1 on. DeepSpeed steps on a
    float32 copy of a rank's share of the weights even where these are float32, except at stage 0.
    """

    def shards_from(first_stage: int) -> int:
        return ranks if stage >= first_stage else 1

    master = 4 if value_bytes < 4 or stage > 0 else 0
    gradient_bytes = 4 if has_float32_sums and stage > 0 else value_bytes
    return RankMemory(
        parameters=value_bytes * parameters // shards_from(3),
        gradients=gradient_bytes * parameters // shards_from(1 if has_float32_sums else 2),
        optimizer=(8 + master) * parameters // shards_from(1),
    )


@dataclass(frozen=True)
class StepWork:
    """A step, and how it is spread; independent of the ZeRO stage."""

    parameters: int
    """Trained parameters."""
    largest: int
    """Elements of the largest of them."""
    averaged: int
    """Parameters with a running average."""
    ranks: int
    passes: int
    """Passes per step."""
    value_bytes: int
    """[bytes] of a working weight."""
    has_float32_sums: bool
    """Whether gradients of half precision are summed in float32 over passes and ranks."""
    bucket: int
    """[element] Reduced or gathered at once."""
    offload: bool
    """Whether the optimizer is in host memory."""
    events: Sequence[BackwardEvent]
    """Of a pass on one rank."""

    @property
    def sum_bytes(self) -> int:
        """[bytes] of a gradient that is summed, at stages 1 to 3."""
        return 4 if self.has_float32_sums else self.value_bytes


@dataclass(frozen=True)
class StageMemory:
    """[bytes] on one rank at one ZeRO stage, at the moment of a step that needs most."""

    stage: int
    state: RankMemory
    """What ZeRO shards."""
    average: int
    """The running average of the weights."""
    buffers: int
    """Communication, parameters gathered for the layers at work, temporaries of Adam."""
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state.total + self.average + self.buffers + self.activations


def plan_memory(work: StepWork) -> list[StageMemory]:
    """Memory by stage."""
    rows = []
    for stage in range(4):
        share = even_share(work.parameters, work.ranks, stage, work.value_bytes)
        is_offloaded = work.offload and stage > 0

        # What is offloaded is in host memory, and counts for no GPU.
        average = 0 if is_offloaded else 4 * work.averaged // (work.ranks if stage else 1)
        optimizer = 0 if is_offloaded else share.optimizer

        # See `build_deepspeed_settings`.
        inside = 2 if stage == 1 and work.has_float32_sums else stage
        # Gradients and activations peak at different moments, so the moment with the largest sum counts.
        moments_of_step = [*_trace_last_pass(inside, work), *_trace_update(inside, work, is_offloaded)]
        gradients, buffers, activations = max(moments_of_step, key=sum)

        state = RankMemory(share.parameters, gradients, optimizer)
        rows.append(StageMemory(stage, state, average, buffers, activations))
    return rows


def _trace_last_pass(stage: int, work: StepWork) -> Iterator[tuple[int, int, int]]:
    """[bytes] of (gradients, buffers, activations) through the last pass of a step, as DeepSpeed 0.19 does it.

    From stage 1 on, gradients are collected in a bucket; stages 2 and 3 empty it when it is full, in place and by two
    copies of its content; stage 2 then adds its share to that of the passes before.
    """
    n, value = work.parameters, work.value_bytes
    summed = work.sum_bytes if stage else value
    part = -(-n // work.ranks)
    bucket = work.bucket if stage else 0
    # See stage3_max_live_parameters.
    live = min(n, max(n // 4, 1 << 20)) if stage == 3 else 0

    ready = filled = emptied = 0
    for index, event in enumerate(work.events):
        # With several passes the gradients of earlier ones are there from the start.
        whole = n if work.passes > 1 else ready
        # float32 sums have their place from the first pass on.
        earlier = part if work.passes > 1 or work.has_float32_sums else 0

        kept = (whole, whole, earlier + emptied // work.ranks, part)[stage]
        yield summed * kept, summed * bucket + value * live, event.peak_bytes

        ready += event.numel
        filled += event.numel
        if stage >= 2 and (filled >= bucket or index + 1 == len(work.events)):
            kept = earlier + (emptied + filled) // work.ranks if stage == 2 else part
            copies = 2 * min(filled, bucket) if stage == 3 else 0
            yield summed * kept, summed * (bucket + copies) + value * live, event.live_bytes
            emptied += filled
            filled = 0


def _trace_update(stage: int, work: StepWork, is_offloaded: bool) -> Iterator[tuple[int, int, int]]:
    """[bytes] of (gradients, buffers, activations) in the optimizer's update, as DeepSpeed 0.19 does it.

    Stage 0 reduces at the end, by one copy of all. A sharded optimizer makes its gradients float32, and only stage 2
    releases the others; Adam takes two temporaries.
    """
    n, value = work.parameters, work.value_bytes
    part = -(-n // work.ranks)

    if stage == 0:
        copies = value + (4 if work.has_float32_sums else 0)
        yield value * n, copies * min(n, _REDUCED_AT_ONCE) * (work.ranks > 1), 0
        yield value * n, (4 * n if value < 4 else 0) + 2 * 4 * work.largest, 0
    elif not is_offloaded:
        gathered = value * work.bucket if stage == 3 else 0
        yield (4 + work.sum_bytes * (stage != 2)) * part, 2 * 4 * part + gathered, 0


def format_memory_table(rows: list[StageMemory], memory: float | None) -> Iterator[str]:
    """A table for people. memory: [bytes] of a GPU, None if none is planned."""
    kinds = ("parameters", "gradients", "optimizer", "average", "buffers", "activations", "total")
    yield "memory per rank at its most, in a step:"
    yield "                 " + "".join(f"{kind:>13}" for kind in kinds)

    fitting = [] if memory is None else [row.stage for row in rows if row.total < _USABLE_SHARE * memory]
    for row in rows:
        values = [*vars(row.state).values(), row.average, row.buffers, row.activations, row.total]
        verdict = "" if memory is None else "   fits" if row.stage in fitting else "   does not fit"
        yield f"ZeRO stage {row.stage}     " + "".join(f"{format_bytes(v):>13}" for v in values) + verdict

    if memory is None:
        return
    if fitting:
        yield f"the lowest stage that fits a GPU of {format_bytes(memory)} is {fitting[0]}: it communicates least"
    else:
        yield (
            f"no stage fits a GPU of {format_bytes(memory)}; give engine.micro_batch=1, student.checkpointing=true, a "
            "smaller crop.size or more GPUs"
        )


@functools.cache
def count_operations(student: StudentConfig, crop: Shape) -> tuple[int, float]:
    """(tokens, operations of a training step without recomputation) of one crop: three times those of forward."""
    tokens = math.prod(n // p for n, p in zip(crop, student.patch, strict=True))

    # Backward takes two products for each one of forward: for the input and for the weights.
    return tokens, 3.0 * cost.estimate_costs(student, crop, 1).total.forward


def peak_flops(device: torch.device) -> float | None:
    """[1/s] Operations of a device in bf16; None for a device that is not listed, and for a CPU."""
    return look_up_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def look_up_peak(name: str) -> float | None:
    """The entry of PEAKS for a device's name: whole words of it, as an A4000 is no A40; laptops have less."""
    if "Laptop" in name:
        return None
    return next((value for key, value in PEAKS.items() if re.search(rf"\b{key}\b", name)), None)
