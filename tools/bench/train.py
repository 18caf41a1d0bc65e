"""A training step under DeepSpeed's stages against plain PyTorch DDP and FSDP2: same student, crops, AdamW and ranks.

    python -m tools.bench.train [--ranks 2] [--size tiny] [--crop 32 64 64] [--batch 1] [--repeats 5] [--rounds 2]

Every way is built in turn, `rounds` times over, as one busy second would otherwise spoil one of them; the fastest step
counts, of the rank that took longest. A step has three parts: forward; backward, with what it communicates; the step,
with what that communicates. Communication alone is an all-reduce of all gradients, timed by itself. Crops are random
numbers that are there already: reading is not part of it. Memory is what tensors hold after backward, on the fullest
rank. float32 on a CPU (gloo), bf16 on GPUs (NCCL; plain PyTorch then under autocast with float32 weights), where
the model FLOPs utilisation of each way is printed too. The last line is one JSON object with the ratio of each stage to
the faster of DDP and FSDP2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from hpc_neuro.core import distributed
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.train import memory_plan
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed.engine import Engine, join_group
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import BETAS, group_parameters
from hpc_neuro.train.setup import TrainModule
from tools.ranks import launched

WAYS = ("ddp", "fsdp2", "stage 0", "stage 1", "stage 2", "stage 3")
PARTS = ("forward", "backward", "step")
OPTIM = OptimConfig(clip=1.0)


def build(
    way: str, size: Any, dtype: torch.dtype
) -> tuple[Callable[[Any], Tensor], Callable[[Tensor], None], Any, Any]:
    """(forward: batch -> logits, backward, step, close) of a fresh network."""
    stage: Any = int(way[-1]) if way.startswith("stage") else 0

    def make() -> TrainModule:
        torch.manual_seed(0)
        return TrainModule(build_student(StudentConfig(size=size)), None, sharded=stage == 3)

    with torch.device("meta"):
        blank = make()
    depth = blank.student.vit.depth
    if way.startswith("stage"):
        wanted = group_parameters(blank.named_parameters(), OPTIM, depth, ())
        sizes = [p.numel() for p in blank.parameters()]
        engine = Engine(
            make, {}, wanted, build_deepspeed_settings(EngineConfig(stage=stage), OPTIM, dtype, 1, 1, sizes), dtype
        )
        engine.set_lr(OPTIM.lr)
        return lambda batch: engine(batch)[0], engine.backward, engine.step, engine.close
    device = distributed.device()
    net: Any = make().to(device)
    if way == "ddp":
        net = DistributedDataParallel(net)
    else:
        for block in net.student.vit.blocks:
            fully_shard(block)
        fully_shard(net)
    named = {name.removeprefix("module."): p for name, p in net.named_parameters()}  # which DDP puts before them
    sets = [
        {"params": [named[n] for n in g.names], "weight_decay": g.weight_decay}
        for g in group_parameters(named.items(), OPTIM, depth, ())
    ]
    optimizer = torch.optim.AdamW(sets, lr=OPTIM.lr, betas=BETAS)

    def forward(batch: Any) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits: Tensor = net(batch)[0]
        return logits

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(net.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward, lambda loss: torch.autograd.backward(loss), step, lambda: None


def measure(way: str, args: argparse.Namespace, dtype: torch.dtype) -> tuple[list[float], int]:
    """[s] of the parts of the fastest step, and [bytes] that tensors hold after backward."""
    before, device = _held(), distributed.device()
    forward, backward, step, close = build(way, args.size, dtype)
    image = torch.rand(args.batch, 1, *args.crop, device=device, dtype=dtype if way.startswith("stage") else None)
    none, index = torch.zeros_like(image, dtype=torch.uint8), torch.arange(args.batch)
    batch = {"image": image, "mask": none, "skeleton": none, "features": {}, "distilled": index < 0, "index": index}
    found, held = [], 0
    for _ in range(args.repeats + 1):
        dist.barrier()
        marks = [_now(device)]
        loss = forward(batch).float().square().mean()
        marks.append(_now(device))
        backward(loss)
        marks.append(_now(device))
        held = _held() - before
        marks.append(_now(device))
        step()
        end = _now(device)
        found.append([marks[1] - marks[0], marks[2] - marks[1], end - marks[3]])
        del loss
    close()
    del forward, backward, step, close
    gc.collect()
    slowest = torch.tensor([min(found[1:], key=sum)], dtype=torch.float64)
    most = torch.tensor([held])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return slowest[0].tolist(), int(most)


def communication(numel: int, repeats: int) -> float:
    """[s] of an all-reduce of so many numbers."""
    values, best = torch.zeros(numel, device=distributed.device()), float("inf")
    for _ in range(repeats):
        dist.barrier()
        begun = _now(values.device)
        dist.all_reduce(values)
        best = min(best, _now(values.device) - begun)
    return best


def rank(args: argparse.Namespace) -> int:
    """One of the processes."""
    torch.set_num_threads(1)
    join_group(EngineConfig())
    dtype = torch.bfloat16 if distributed.device().type == "cuda" else torch.float32
    times: dict[str, list[float]] = {}
    held: dict[str, int] = {}
    for _ in range(args.rounds):
        for way in WAYS:
            parts, held[way] = measure(way, args, dtype)
            times[way] = min(times.get(way, parts), parts, key=sum)
    numel = sum(p.numel() for p in build_student(StudentConfig(size=args.size)).parameters())
    alone = communication(numel, args.repeats)
    totals = {way: sum(parts) for way, parts in times.items()}
    best = min(totals["ddp"], totals["fsdp2"])
    if distributed.is_main():
        print(f"{numel / 1e6:.1f} M parameters, {args.ranks} rank(s) x {args.batch} crops of {args.crop}, {dtype}")
        print(f"an all-reduce of all gradients by itself: {1000 * alone:.0f} ms")
        print(f"{'way':<10}" + "".join(f"{p + ' ms':>13}" for p in (*PARTS, "total")) + f"{'ratio':>8}{'MiB':>8}")
        for way, parts in times.items():
            cells = "".join(f"{1000 * v:>13.1f}" for v in (*parts, totals[way]))
            print(f"{way:<10}{cells}{totals[way] / best:>8.2f}{held[way] / 2**20:>8.0f}")
        ratios = {way: round(total / best, 3) for way, total in totals.items()}
        utilised = _utilisation(args, totals)
        for way, share in utilised.items():
            print(f"{way}: model FLOPs utilisation {share:.1%}")
        parts_of = {way: dict(zip(PARTS, parts, strict=True)) for way, parts in times.items()}
        found = {"ratio": ratios, "seconds": parts_of, "all_reduce_s": alone, "held_bytes": held, "ranks": args.ranks}
        print(json.dumps(found | {"mfu": utilised}))
    dist.barrier()  # the store of rank 0 stays until nobody needs it
    return 0


def _utilisation(args: argparse.Namespace, seconds: dict[str, float]) -> dict[str, float]:
    """Share of the device's matrix speed that the student's operations come to; {} where that speed is not known."""
    peak = memory_plan.peak_flops(distributed.device())
    if peak is None:
        return {}
    _, operations = memory_plan.count_operations(StudentConfig(size=args.size), tuple(args.crop))
    return {way: round(operations * args.batch / s / peak, 4) for way, s in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _held() -> int:
    """[bytes] of all tensors there are: of the GPU, or found one by one on the host."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):  # not their wrappers, which own no memory
            for tensor in (thing.data, thing.grad if thing.is_leaf else None):
                if tensor is not None and type(tensor) is Tensor and tensor.device.type == "cpu":
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


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
        return rank(args)
    return launched("tools.bench.train", args.ranks, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
