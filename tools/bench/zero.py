"""Memory of a rank at each ZeRO stage, against the even share of each kind and against the plan of `train --dry-run`.

    python -m tools.bench.zero [--ranks 2] [--size tiny] [--depth N] [--dtype fp32] [--crop 32 64 64] [--passes 1 2]
                               [--checkpointing both] [--distill z y x]

Starts that many processes on this machine (gloo on a CPU, NCCL where there is a GPU for each) and does two steps at
every stage on one crop per rank and pass, with and without activation checkpointing; with --distill also from a
teacher's features of these views. Parameters, gradients and optimizer state: bytes of DeepSpeed's tensors after every
backward, each storage once; compared with the even share for two passes, as stage 1 shards gradients with the last one
only. Peak: the most bytes of all tensors of the process at once, counted between operations (of a GPU: the peak of its
allocator), from the first forward on, initialization not counted; compared with the plan's total. After every reduction
of stages 0 to 2 gloo's threads get time to release its tensors: the count is of what the step needs, not of how soon a
thread gets its turn. Exit code 1 when a share is off by more than 5 % or a peak by more than 10 %. The last line is one
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
from hpc_neuro.core.files import format_bytes, format_count
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
from hpc_neuro.train.deepspeed.internals import measure_tensor_bytes
from hpc_neuro.train.deepspeed.settings import bucket_size, build_deepspeed_settings
from hpc_neuro.train.optim import group_parameters
from hpc_neuro.train.train_module import TrainModule
from tools.ranks import launch_ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSSES = (Dice(), CrossEntropy())

LARGEST_SHARE_ERROR, LARGEST_PEAK_ERROR = 0.05, 0.10
"""Relative errors beyond which the exit code is 1."""

TEACHER_DIM = 768
"""Channels of the teacher."""


# --- What is measured ---


def _build_module(student: StudentConfig, views: tuple[View, ...], sharded: bool) -> TrainModule:
    """The student, and with views a distiller for a teacher of ViT-B's width."""
    torch.manual_seed(0)
    net = build_student(student)
    if not views:
        return TrainModule(net, None, sharded)

    torch.manual_seed(1)
    dim, depth, _ = student.width
    mean: dict[str, Array | Tensor] = {view: torch.zeros(1, TEACHER_DIM) for view in views}
    std: dict[str, Array | Tensor] = {view: torch.ones(1, TEACHER_DIM) for view in views}
    distiller = Distill(views=views).build(
        student_dim=dim, student_depth=depth, teacher_layers=(11,), mean=mean, std=std, tube_sum=tube_sum
    )
    return TrainModule(net, distiller, sharded)


def _build_blank(student: StudentConfig, views: tuple[View, ...]) -> TrainModule:
    distiller = _build_module(student, views, sharded=False).distiller
    return TrainModule(blank_student(student), distiller, sharded=False)


def _feature_shapes(student: StudentConfig, views: tuple[View, ...], crop: Shape) -> dict[str, tuple[int, ...]]:
    grid = [n // p for n, p in zip(crop, student.patch, strict=True)]
    return dict.fromkeys(views, (1, TEACHER_DIM, *grid))


@functools.cache
def _trace_events(
    student: StudentConfig, views: tuple[View, ...], crop: Shape, dtype: torch.dtype
) -> tuple[BackwardEvent, ...]:
    shapes = _feature_shapes(student, views, crop)
    return trace_backward(_build_blank(student, views), LOSSES, crop, 1, dtype, shapes)


@contextlib.contextmanager
def _settle_collectives(live: LiveTensors) -> Iterator[None]:
    """Let DeepSpeed's collectives return only when nothing but their caller holds their tensors."""
    backend, names = comm.cdb, ("all_reduce", "reduce", "all_gather_into_tensor")
    for name in names:
        collective = getattr(backend, name)

        def run_and_settle(*args: Any, collective: Any = collective, **kwargs: Any) -> Any:
            result = collective(*args, **kwargs)
            live.settle()
            return result

        setattr(backend, name, run_and_settle)
    yield
    # The class has the originals.
    for name in names:
        delattr(backend, name)


def measure(args: argparse.Namespace, stage: Any, passes: int, checkpointing: bool) -> dict[str, Any]:
    """The most memory of any rank in two steps at one stage, the even shares, and the plan."""
    student = StudentConfig(size=args.size, depth=args.depth, checkpointing=checkpointing)
    most, sizes = _measure_steps(args, student, stage, passes)

    ranks, dtype = distributed.world_size(), DTYPES[args.dtype]
    work = memory_plan.StepWork(
        parameters=sum(sizes),
        largest=max(sizes),
        averaged=0,
        ranks=ranks,
        passes=passes,
        value_bytes=dtype.itemsize,
        has_float32_sums=dtype == torch.bfloat16,
        bucket=bucket_size(sum(sizes)),
        offload=False,
        events=_trace_events(student, tuple(args.distill), tuple(args.crop), dtype),
    )
    even = asdict(memory_plan.even_share(sum(sizes), ranks, stage, dtype.itemsize, work.has_float32_sums))
    return {
        "stage": stage,
        "passes": passes,
        "checkpointing": checkpointing,
        "numel": sum(sizes),
        "held": dict(zip(even, most[:3], strict=True)),
        "even": even,
        "peak": most[3],
        "planned": memory_plan.plan_memory(work)[stage].total,
    }


def _measure_steps(
    args: argparse.Namespace, student: StudentConfig, stage: Any, passes: int
) -> tuple[list[int], list[int]]:
    """([bytes] of parameters, gradients, optimizer and the peak of the fullest rank; elements of each parameter)."""
    dtype, optim = DTYPES[args.dtype], OptimConfig(batch=passes * distributed.world_size())
    views = tuple(args.distill)
    make = functools.partial(_build_module, student, views, sharded=stage == 3)

    with LiveTensors() as live, contextlib.ExitStack() as stack:
        blank = _build_blank(student, views)
        sizes = [p.numel() for p in blank.parameters()]
        settings = build_deepspeed_settings(EngineConfig(stage=stage), optim, dtype, 1, passes, sizes)
        groups = group_parameters(blank.named_parameters(), optim.weight_decay, {})
        engine = Engine(make, {}, groups, settings, dtype)
        engine.module.train()

        # Stage 3 communicates often, and never much at once.
        if engine.device.type == "cpu" and stage < 3:
            stack.enter_context(_settle_collectives(live))

        most, peak = torch.zeros(3, dtype=torch.int64), 0
        for _ in range(2 * passes):
            kinds, pass_peak = _measure_pass(args, student, engine, live)
            most = torch.maximum(most, torch.tensor(kinds))
            peak = max(peak, pass_peak)
        engine.close()

    on_fullest_rank = torch.cat([most, torch.tensor([peak])]).to(engine.device)
    dist.all_reduce(on_fullest_rank, op=dist.ReduceOp.MAX)
    return [int(value) for value in on_fullest_rank], sizes


def _measure_pass(
    args: argparse.Namespace, student: StudentConfig, engine: Engine, live: LiveTensors
) -> tuple[tuple[int, int, int], int]:
    """[bytes] of (parameters, gradients, optimizer) after the backward of one pass, and of its peak."""
    is_gpu = engine.device.type == "cuda"
    live.peak_bytes = live.live_bytes
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()

    batch = _make_batch(args, student, engine.device)
    logits, distillation, _ = engine(dict(vars(batch)))
    loss, _ = sum_losses(LOSSES, StudentOutput(logits, {}), batch)
    engine.backward(loss if distillation is None else loss + distillation)
    kinds = measure_tensor_bytes(engine.module, engine.optimizer, engine.state)

    # Cycles would keep tensors for as long as the collector likes.
    gc.collect()
    engine.step()
    return kinds, torch.cuda.max_memory_allocated() if is_gpu else live.peak_bytes


def _make_batch(args: argparse.Namespace, student: StudentConfig, device: torch.device) -> Batch:
    views = tuple(args.distill)
    mask = torch.zeros(1, 1, *args.crop, dtype=torch.uint8, device=device)
    shapes = _feature_shapes(student, views, tuple(args.crop))
    features = {view: torch.rand(1, *shape, device=device).half() for view, shape in shapes.items()}
    distilled = torch.full((1,), bool(views))
    image = torch.rand(mask.shape, device=device)
    return Batch(image, mask, mask.clone(), features, distilled, distilled.long())


# --- What is printed ---


def format_table(rows: list[dict[str, Any]], ranks: int) -> str:
    """A table for people."""
    parameters, count = f"{rows[0]['numel'] / 1e6:.2f} M parameters", format_count(ranks, "rank")
    lines = [f"{parameters} on {count}: memory of the fullest rank / even share"]
    titles = "".join(f"{kind:>30}" for kind in (*rows[0]["held"], "peak / planned"))
    lines.append(f"{'stage':<6}{'passes':<7}{'recomputes':<11}" + titles)

    for row in rows:
        pairs = [(row["held"][kind], even) for kind, even in row["even"].items()]
        pairs.append((row["peak"], row["planned"]))
        cells = [f"{format_bytes(a)} / {format_bytes(b)} = {a / b:.3f}" for a, b in pairs]
        settings = f"{row['stage']:<6}{row['passes']:<7}{'yes' if row['checkpointing'] else 'no':<11}"
        lines.append(settings + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def run_rank(args: argparse.Namespace) -> int:
    """Measure everything as one of the ranks."""
    torch.set_num_threads(1)
    join_group(EngineConfig())

    kinds = {"both": (False, True), "no": (False,), "yes": (True,)}[args.checkpointing]
    rows = [measure(args, stage, passes, kind) for kind in kinds for passes in args.passes for stage in range(4)]

    sharded = [row for row in rows if row["passes"] > 1]
    errors = [abs(row["held"][kind] / even - 1) for row in sharded for kind, even in row["even"].items()]
    share_error = max(errors, default=0.0)
    peak_error = max(abs(row["peak"] / row["planned"] - 1) for row in rows)

    if distributed.is_main():
        print(format_table(rows, args.ranks))
        facts = {"ranks": args.ranks, "dtype": args.dtype}
        facts |= {"worst": round(share_error, 4), "plan_off_by": round(peak_error, 4)}
        print(json.dumps({**facts, "stages": rows}))

    # The store of rank 0 stays until no rank needs it.
    dist.barrier()
    return int(share_error > LARGEST_SHARE_ERROR or peak_error > LARGEST_PEAK_ERROR)


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
        return run_rank(args)
    return launch_ranks("tools.bench.zero", args.ranks, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
