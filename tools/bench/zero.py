"""What a rank holds at each ZeRO stage, against the even share of each kind and against the plan of `train --dry-run`.

    python -m tools.bench.zero [--ranks 2] [--size tiny] [--depth N] [--dtype fp32] [--crop 32 64 64] [--passes 1 2]
                               [--checkpointing both] [--distill z y x]

Starts that many processes on this machine (gloo on a CPU, NCCL where there is a GPU for each) and lets every stage do
two steps on one crop per rank and pass, with and without activation checkpointing; with --distill also from a teacher's
features of these views. Parameters, gradients and optimizer state: bytes of DeepSpeed's tensors after every backward,
each storage once; against the even share with two passes, as stage 1 shares out gradients with the last one only.
Peak: the most bytes that all tensors of the process held at once, counted between operations (of a GPU: the peak of its
allocator), from the first forward on, initialisation not counted; against the plan's total. After every reduction of
stages 0 to 2 gloo's threads are given time to let go of its tensors: what is counted is what the step needs, not how
soon a thread gets its turn. Exit code 1 when a share is further off than 5 % or a peak than 10 %. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor

from hpc_neuro.core import distributed
from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.types import Array, Batch, StudentOutput
from hpc_neuro.losses import CrossEntropy, Dice, Distill, View, sum_losses
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.student import blank_student, build_student
from hpc_neuro.models.tubular import tube_sum
from hpc_neuro.train import memory_plan
from hpc_neuro.train.activation_memory import BackwardEvent, LiveTensors, trace_backward
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed.engine import Engine, join_group
from hpc_neuro.train.deepspeed.memory_audit import even_share, measure_rank_memory
from hpc_neuro.train.deepspeed.settings import bucket_size, build_deepspeed_settings
from hpc_neuro.train.optim import group_parameters
from hpc_neuro.train.setup import TrainModule
from tools.ranks import launched

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARE, PEAK = 0.05, 0.10  # how far off at most
TEACHER = 768  # channels
LOSSES = (Dice(), CrossEntropy())


def _module(student: StudentConfig, views: tuple[View, ...], sharded: bool) -> TrainModule:
    """The student, and with views what distils a teacher of ViT-B's width into it."""
    torch.manual_seed(0)
    net = build_student(student)
    if not views:
        return TrainModule(net, None, sharded)
    torch.manual_seed(1)
    dim, depth, _ = student.width
    mean: dict[str, Array | Tensor] = {v: torch.zeros(1, TEACHER) for v in views}
    std: dict[str, Array | Tensor] = {v: torch.ones(1, TEACHER) for v in views}
    cfg = Distill(views=views)
    distiller = cfg.build(
        student_dim=dim, student_depth=depth, teacher_layers=(11,), mean=mean, std=std, tube_sum=tube_sum
    )
    return TrainModule(net, distiller, sharded)


def _blank(student: StudentConfig, views: tuple[View, ...]) -> TrainModule:
    return TrainModule(blank_student(student), _module(student, views, sharded=False).distiller, sharded=False)


def _features(student: StudentConfig, views: tuple[View, ...], crop: Shape) -> dict[str, tuple[int, ...]]:
    return {v: (1, TEACHER, *(n // p for n, p in zip(crop, student.patch, strict=True))) for v in views}


@functools.cache
def _moments(
    student: StudentConfig, views: tuple[View, ...], crop: Shape, dtype: torch.dtype
) -> tuple[BackwardEvent, ...]:
    return trace_backward(_blank(student, views), LOSSES, crop, 1, dtype, _features(student, views, crop))


@contextlib.contextmanager
def _settling(alive: LiveTensors) -> Iterator[None]:
    """DeepSpeed's collectives return only when nothing but their caller holds their tensors."""
    backend, names = comm.cdb, ("all_reduce", "reduce", "all_gather_into_tensor")
    for name in names:
        plain = getattr(backend, name)

        def settled(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            alive.settle()
            return found

        setattr(backend, name, settled)
    yield
    for name in names:
        delattr(backend, name)  # its class has them


def measure(args: argparse.Namespace, stage: Any, passes: int, checkpointing: bool) -> dict[str, Any]:
    """The most that any rank holds in two steps at one stage, the even shares, and what is planned."""
    dtype, ranks = DTYPES[args.dtype], distributed.world_size()
    student = StudentConfig(size=args.size, depth=args.depth, checkpointing=checkpointing)
    optim = OptimConfig(batch=passes * ranks)

    views, crop = tuple(args.distill), tuple(args.crop)
    make = functools.partial(_module, student, views, sharded=stage == 3)
    with LiveTensors() as alive, contextlib.ExitStack() as stack:
        blank = _blank(student, views)
        sizes = [p.numel() for p in blank.parameters()]
        settings = build_deepspeed_settings(EngineConfig(stage=stage), optim, dtype, 1, passes, sizes)
        engine = Engine(
            make, {}, group_parameters(blank.named_parameters(), optim, student.width[1], ()), settings, dtype
        )
        engine.module.train()
        if engine.device.type == "cpu" and stage < 3:  # stage 3 communicates often, and never much at once
            stack.enter_context(_settling(alive))
        most = torch.zeros(3, dtype=torch.int64)
        peak, cuda = 0, engine.device.type == "cuda"
        for _ in range(2 * passes):
            alive.most = alive.now
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            mask = torch.zeros(1, 1, *args.crop, dtype=torch.uint8, device=engine.device)
            cached = {
                view: torch.rand(1, *shape, device=engine.device).half()
                for view, shape in _features(student, views, crop).items()
            }
            flags = torch.full((1,), bool(views))
            image = torch.rand(mask.shape, device=engine.device)
            batch = Batch(image, mask, mask.clone(), cached, flags, flags.long())
            logits, distillation, _ = engine(dict(vars(batch)))
            loss, _ = sum_losses(LOSSES, StudentOutput(logits, {}), batch)
            engine.backward(loss if distillation is None else loss + distillation)
            most = torch.maximum(most, torch.tensor(list(asdict(measure_rank_memory(engine)).values())))
            gc.collect()  # cycles would hold tensors for as long as the collector likes
            engine.step()
            peak = max(peak, torch.cuda.max_memory_allocated() if cuda else alive.most)
        engine.close()
    value_bytes, bucket = dtype.itemsize, bucket_size(sum(sizes))
    work = memory_plan.StepWork(
        parameters=sum(sizes),
        largest=max(sizes),
        averaged=0,
        ranks=ranks,
        passes=passes,
        value_bytes=value_bytes,
        bucket=bucket,
        offload=False,
        events=_moments(student, views, crop, dtype),
    )
    planned = memory_plan.plan_memory(work)[stage]
    held = torch.cat([most, torch.tensor([peak])]).to(engine.device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    even = asdict(even_share(sum(sizes), ranks, stage, value_bytes))
    shares = dict(zip(even, held.tolist()[:3], strict=True))
    return {
        **{"stage": stage, "passes": passes, "checkpointing": checkpointing, "numel": sum(sizes)},
        **{"held": shares, "even": even, "peak": int(held[3]), "planned": planned.total},
    }


def table(rows: list[dict[str, Any]], ranks: int) -> str:
    """For people."""
    lines = [f"{rows[0]['numel'] / 1e6:.2f} M parameters on {ranks} rank(s): held by the fullest rank / even share"]
    titles = "".join(f"{kind:>30}" for kind in (*rows[0]["held"], "peak / planned"))
    lines.append(f"{'stage':<6}{'passes':<7}{'recomputes':<11}" + titles)
    for row in rows:
        cells = [
            f"{format_bytes(row['held'][k])} / {format_bytes(v)} = {row['held'][k] / v:.3f}"
            for k, v in row["even"].items()
        ]
        cells.append(
            f"{format_bytes(row['peak'])} / {format_bytes(row['planned'])} = {row['peak'] / row['planned']:.3f}"
        )
        how = f"{row['stage']:<6}{row['passes']:<7}{'yes' if row['checkpointing'] else 'no':<11}"
        lines.append(how + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def rank(args: argparse.Namespace) -> int:
    """One of the processes."""
    torch.set_num_threads(1)
    join_group(EngineConfig())
    kinds = {"both": (False, True), "no": (False,), "yes": (True,)}[args.checkpointing]
    rows = [measure(args, s, passes, c) for c in kinds for passes in args.passes for s in range(4)]
    shared = [row for row in rows if row["passes"] > 1]
    worst = max((abs(row["held"][k] / v - 1) for row in shared for k, v in row["even"].items()), default=0.0)
    off = max(abs(row["peak"] / row["planned"] - 1) for row in rows)
    if distributed.is_main():
        print(table(rows, args.ranks))
        facts = {"ranks": args.ranks, "dtype": args.dtype, "worst": round(worst, 4), "plan_off_by": round(off, 4)}
        print(json.dumps({**facts, "stages": rows}))
    dist.barrier()  # the store of rank 0 stays until nobody needs it
    return int(worst > SHARE or off > PEAK)


def main() -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--depth", type=int, help="transformer blocks; none: the size's own")
    parser.add_argument("--crop", type=int, nargs=3, default=[32, 64, 64])
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--distill", choices=["z", "y", "x"], nargs="*", default=[])
    parser.add_argument("--checkpointing", choices=["both", "no", "yes"], default="both")
    args = parser.parse_args()
    if "RANK" in os.environ:
        return rank(args)
    return launched("tools.bench.zero", args.ranks, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
