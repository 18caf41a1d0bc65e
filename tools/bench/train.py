"""A training step under DeepSpeed's stages against plain PyTorch DDP and FSDP2: same student, crops, AdamW and ranks.

    python -m tools.bench.train [--ranks 2] [--size tiny] [--crop 32 64 64] [--batch 1] [--repeats 5] [--rounds 2]

Every variant is built in turn, `rounds` times over, as one busy second would otherwise spoil one of them; the fastest
step counts, of the rank that took longest. A step has three parts: forward; backward, with what it communicates; the
update, with what that communicates. Communication alone is an all-reduce of all gradients, timed by itself. Crops are
random numbers in memory: reading is not part of it. Memory is what tensors occupy after backward, on the fullest rank.
float32 on a CPU (gloo), bf16 on GPUs (NCCL; plain PyTorch then under autocast with float32 weights), where the model
FLOPs utilization of each variant is printed too. The last line is one JSON object with the ratio of each stage to the
faster of DDP and FSDP2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpc_neuro.core import distributed
from hpc_neuro.core.files import format_count
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.train import memory_plan
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed.engine import Engine, join_group
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import BETAS, group_parameters
from hpc_neuro.train.train_module import TrainModule
from tools.ranks import launch_ranks

VARIANTS = ("ddp", "fsdp2", "stage 0", "stage 1", "stage 2", "stage 3")
PARTS = ("forward", "backward", "step")
OPTIM = OptimConfig(clip=1.0)


# --- The variants ---


@dataclass(frozen=True)
class Trainer:
    """A fresh network that can be trained."""

    forward: Callable[[Any], Tensor]
    """Batch -> logits."""
    backward: Callable[[Tensor], None]
    step: Callable[[], Any]
    close: Callable[[], None]


def build_trainer(variant: str, size: Any, dtype: torch.dtype) -> Trainer:
    """Build a variant."""
    if variant.startswith("stage"):
        return _build_deepspeed(int(variant[-1]), size, dtype)
    return _build_plain(variant, size, dtype)


def _make_module(size: Any, sharded: bool) -> TrainModule:
    torch.manual_seed(0)
    return TrainModule(build_student(StudentConfig(size=size)), None, sharded)


def _build_deepspeed(stage: Any, size: Any, dtype: torch.dtype) -> Trainer:
    with torch.device("meta"):
        blank = _make_module(size, sharded=stage == 3)
    groups = group_parameters(blank.named_parameters(), OPTIM.weight_decay, {})
    sizes = [p.numel() for p in blank.parameters()]
    settings = build_deepspeed_settings(EngineConfig(stage=stage), OPTIM, dtype, 1, 1, sizes)

    engine = Engine(lambda: _make_module(size, sharded=stage == 3), {}, groups, settings, dtype)
    engine.set_lr(OPTIM.lr)
    return Trainer(lambda batch: engine(batch)[0], engine.backward, engine.step, engine.close)


def _build_plain(variant: str, size: Any, dtype: torch.dtype) -> Trainer:
    device = distributed.device()
    net: Any = _make_module(size, sharded=False).to(device)
    if variant == "ddp":
        net = DistributedDataParallel(net)
    else:
        for block in net.student.vit.blocks:
            fully_shard(block)
        fully_shard(net)

    # DDP puts a prefix before the names.
    parameters = {name.removeprefix("module."): p for name, p in net.named_parameters()}
    groups = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay}
        for group in group_parameters(parameters.items(), OPTIM.weight_decay, {})
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=BETAS)

    def forward(batch: Any) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits: Tensor = net(batch)[0]
        return logits

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Trainer(forward, lambda loss: torch.autograd.backward(loss), step, lambda: None)


# --- Measuring ---


def measure_variant(variant: str, args: argparse.Namespace, dtype: torch.dtype) -> tuple[list[float], int]:
    """[s] of the parts of the fastest step, and [bytes] of tensors after backward."""
    bytes_before = _count_tensor_bytes()
    trainer = build_trainer(variant, args.size, dtype)
    batch = _make_batch(args, dtype if variant.startswith("stage") else None)

    steps, peak_bytes = [], 0
    for _ in range(args.repeats + 1):
        seconds, tensor_bytes = _time_step(trainer, batch)
        steps.append(seconds)
        peak_bytes = tensor_bytes - bytes_before
    trainer.close()
    del trainer
    gc.collect()

    # The first step allocates.
    slowest = torch.tensor([min(steps[1:], key=sum)], dtype=torch.float64)
    most = torch.tensor([peak_bytes])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return slowest[0].tolist(), int(most)


def _make_batch(args: argparse.Namespace, dtype: torch.dtype | None) -> dict[str, Any]:
    image = torch.rand(args.batch, 1, *args.crop, device=distributed.device(), dtype=dtype)
    empty, index = torch.zeros_like(image, dtype=torch.uint8), torch.arange(args.batch)
    return {
        "image": image,
        "mask": empty,
        "skeleton": empty,
        "features": {},
        "distilled": index < 0,
        "index": index,
    }


def _time_step(trainer: Trainer, batch: dict[str, Any]) -> tuple[list[float], int]:
    """([s] of forward, backward and step, [bytes] of tensors after backward)."""
    device = distributed.device()
    dist.barrier()

    start = _read_clock(device)
    loss = trainer.forward(batch).float().square().mean()
    forward_end = _read_clock(device)
    trainer.backward(loss)
    backward_end = _read_clock(device)

    tensor_bytes = _count_tensor_bytes()

    step_start = _read_clock(device)
    trainer.step()
    step_end = _read_clock(device)
    return [forward_end - start, backward_end - forward_end, step_end - step_start], tensor_bytes


def time_all_reduce(numel: int, repeats: int) -> float:
    """[s] of an all-reduce of `numel` numbers, the fastest one."""
    values = torch.zeros(numel, device=distributed.device())
    fastest = float("inf")
    for _ in range(repeats):
        dist.barrier()
        start = _read_clock(values.device)
        dist.all_reduce(values)
        fastest = min(fastest, _read_clock(values.device) - start)
    return fastest


def _read_clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _count_tensor_bytes() -> int:
    """[bytes] of all tensors: of the GPU, or found one by one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()

    gc.collect()
    storages = {}
    for item in gc.get_objects():
        # Wrappers of tensors own no memory.
        if type(item) not in (Tensor, torch.nn.Parameter):
            continue
        for tensor in (item.data, item.grad if item.is_leaf else None):
            if tensor is not None and type(tensor) is Tensor and tensor.device.type == "cpu":
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


# --- Printing ---


def run_rank(args: argparse.Namespace) -> int:
    """Measure everything as one of the ranks."""
    torch.set_num_threads(1)
    join_group(EngineConfig())
    dtype = torch.bfloat16 if distributed.device().type == "cuda" else torch.float32

    times: dict[str, list[float]] = {}
    tensor_bytes: dict[str, int] = {}
    for _ in range(args.rounds):
        for variant in VARIANTS:
            parts, tensor_bytes[variant] = measure_variant(variant, args, dtype)
            times[variant] = min(times.get(variant, parts), parts, key=sum)

    numel = sum(p.numel() for p in build_student(StudentConfig(size=args.size)).parameters())
    all_reduce_seconds = time_all_reduce(numel, args.repeats)
    if distributed.is_main():
        ranks = format_count(args.ranks, "rank")
        print(f"{numel / 1e6:.1f} M parameters, {ranks} x {args.batch} crops of {args.crop}, {dtype}")
        print(f"an all-reduce of all gradients by itself: {1000 * all_reduce_seconds:.0f} ms")
        print_results(args, times, tensor_bytes, all_reduce_seconds)

    # The store of rank 0 stays until no rank needs it.
    dist.barrier()
    return 0


def print_results(
    args: argparse.Namespace, times: dict[str, list[float]], tensor_bytes: dict[str, int], all_reduce_seconds: float
) -> None:
    """A table for people, and one JSON object."""
    totals = {variant: sum(parts) for variant, parts in times.items()}
    best = min(totals["ddp"], totals["fsdp2"])

    print(f"{'variant':<10}" + "".join(f"{p + ' ms':>13}" for p in (*PARTS, "total")) + f"{'ratio':>8}{'MiB':>8}")
    for variant, parts in times.items():
        cells = "".join(f"{1000 * v:>13.1f}" for v in (*parts, totals[variant]))
        print(f"{variant:<10}{cells}{totals[variant] / best:>8.2f}{tensor_bytes[variant] / 2**20:>8.0f}")

    utilization = _compute_utilization(args, totals)
    for variant, share in utilization.items():
        print(f"{variant}: model FLOPs utilization {share:.1%}")

    results = {
        "ratio": {variant: round(total / best, 3) for variant, total in totals.items()},
        "seconds": {variant: dict(zip(PARTS, parts, strict=True)) for variant, parts in times.items()},
        "all_reduce_s": all_reduce_seconds,
        "held_bytes": tensor_bytes,
        "ranks": args.ranks,
        "mfu": utilization,
    }
    print(json.dumps(results))


def _compute_utilization(args: argparse.Namespace, seconds: dict[str, float]) -> dict[str, float]:
    """Share of the device's peak that the student's operations use; {} where the peak is not known."""
    peak = memory_plan.peak_flops(distributed.device())
    if peak is None:
        return {}
    _, operations = memory_plan.count_operations(StudentConfig(size=args.size), tuple(args.crop))
    return {variant: round(operations * args.batch / s / peak, 4) for variant, s in seconds.items()}


def main() -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--crop", type=int, nargs=3, default=[32, 64, 64])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    if "RANK" in os.environ:
        return run_rank(args)
    return launch_ranks("tools.bench.train", args.ranks, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
