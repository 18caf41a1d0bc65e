"""Bytes of parameters, gradients and optimizer state per rank and ZeRO stage, against the even share of each.

    python -m tools.bench_zero [--ranks 2] [--size tiny] [--dtype fp32] [--worst 0.05]

Starts that many processes on this machine (gloo on a CPU, NCCL where there is a GPU for each) and lets every stage do
two steps of two passes on one crop per rank. What DeepSpeed holds is measured after every backward, each storage once.
Exit code 1 when a figure is further from the even share than `--worst`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from hpc_neuro import distributed
from hpc_neuro.files import human
from hpc_neuro.models.student import SIZES, StudentConfig, build_student
from hpc_neuro.train.assemble import TrainModule
from hpc_neuro.train.engine import Engine, join_group
from hpc_neuro.train.engine_config import EngineConfig, deepspeed_json
from hpc_neuro.train.ledger import found, ideal
from hpc_neuro.train.schedule import OptimConfig, groups

PASSES = 2  # stage 1 shares gradients out only with the last one: between passes it holds them whole
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(size: Any, stage: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The most that any rank holds after any backward of two steps at one stage, and what the even share is."""
    with torch.device("meta"):
        blank = TrainModule(build_student(StudentConfig(size=size)), None, sharded=False)
    parameters = sum(p.numel() for p in blank.parameters())
    optim = OptimConfig(batch=PASSES * distributed.world_size())
    settings = deepspeed_json(EngineConfig(stage=stage), optim, dtype, 1, PASSES, parameters)
    wanted = groups(blank.named_parameters(), optim, blank.student.vit.depth, ())

    def make() -> TrainModule:
        torch.manual_seed(0)
        return TrainModule(build_student(StudentConfig(size=size)), None, sharded=stage == 3)

    engine = Engine(make, {}, wanted, settings, dtype)
    image = torch.rand(1, 1, *(2 * p for p in StudentConfig().patch), device=engine.device, dtype=dtype)
    none = torch.zeros_like(image, dtype=torch.uint8)
    index = torch.zeros(1, dtype=torch.int64)
    batch = {"image": image, "mask": none, "skeleton": none, "features": {}, "distilled": index > 0, "index": index}
    most = torch.zeros(3, dtype=torch.int64, device=engine.device)
    for _ in range(2 * PASSES):
        engine.backward(engine(batch)[0].float().square().mean())
        most = torch.maximum(most, torch.tensor(list(asdict(found(engine)).values()), device=engine.device))
        engine.step()
    engine.close()
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    even = asdict(ideal(parameters, distributed.world_size(), stage, dtype.itemsize))
    return {"stage": stage, "held": dict(zip(even, most.tolist(), strict=True)), "even": even, "numel": parameters}


def table(rows: list[dict[str, Any]], ranks: int) -> str:
    """For people."""
    lines = [f"{rows[0]['numel'] / 1e6:.2f} M parameters on {ranks} rank(s): held by the fullest rank / even share"]
    lines.append(f"{'stage':<8}" + "".join(f"{kind:>30}" for kind in rows[0]["held"]))
    for row in rows:
        cells = [f"{human(row['held'][k])} / {human(v)} = {row['held'][k] / v:.3f}" for k, v in row["even"].items()]
        lines.append(f"{row['stage']:<8}" + "".join(f"{cell:>30}" for cell in cells))
    return "\n".join(lines)


def rank(args: argparse.Namespace) -> int:
    """One of the processes."""
    torch.set_num_threads(1)
    join_group(EngineConfig())
    rows = [measure(args.size, stage, DTYPES[args.dtype]) for stage in range(4)]
    worst = max(abs(row["held"][k] / v - 1) for row in rows for k, v in row["even"].items())
    if distributed.is_main():
        print(table(rows, args.ranks))
        print(json.dumps({"ranks": args.ranks, "dtype": args.dtype, "worst": round(worst, 4), "stages": rows}))
    return int(worst > args.worst)


def main() -> int:
    """Start the ranks, or be one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--worst", type=float, default=0.05)
    args = parser.parse_args()
    if "RANK" in os.environ:
        return rank(args)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(args.ranks)}
    command = [sys.executable, "-m", "tools.bench_zero", *sys.argv[1:]]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(args.ranks)]
    return max(process.wait() for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
