"""Time and memory of a training step of the student against MONAI's UNETR of the same tokens, width, depth and crop.

    python -m tools.bench.student [--device cpu] [--size tiny] [--crop 64 64 64] [--batch 1] [--repeats 3] [--threads 1]

Both get the same image and target and do forward, Dice + cross entropy, backward and AdamW, in float32 on the CPU and
under bf16 autocast on a GPU. Patches are 16 x 16 x 16, UNETR's only size. Times are taken in turns in one process, the
fastest of the repeats counts; CPU seconds are what counts on a busy machine. Memory is the most that a process of its
own held above what it held before it built the model: weights, gradients, Adam's moments and activations. On a GPU the
share of its matrix speed that the student's operations reach is printed too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR
from torch import Tensor, nn

from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.cost import estimate_costs
from hpc_neuro.models.student import build_student
from tools.bench.process_memory import read_peak_memory, reset_peak_memory

PATCH = (16, 16, 16)
NETWORKS = ("student", "monai_unetr")
"""The student, and MONAI's UNETR of the same tokens."""


def configure_student(size: Any) -> StudentConfig:
    """The student of a size, with patches as UNETR has them."""
    return StudentConfig(size=size, patch=PATCH)


def build_network(network: str, args: argparse.Namespace) -> nn.Module:
    """A network image [B, 1, Z, Y, X] -> logits of the same shape, or for the student a Prediction."""
    torch.manual_seed(0)
    dim, depth, heads = SIZES[args.size]
    if network != "monai_unetr":
        return build_student(configure_student(args.size)).to(args.device).train()

    if depth != 12:
        raise SystemExit(f"MONAI's UNETR has 12 blocks, size {args.size} has {depth}; choose tiny, small or base")
    net = UNETR(1, 1, args.crop, hidden_size=dim, mlp_dim=4 * dim, num_heads=heads, proj_type="conv", qkv_bias=True)
    trainable: nn.Module = net.to(args.device).train()
    return trainable


def make_step(network: str, args: argparse.Namespace) -> Callable[[], None]:
    """One training step of a fresh network on a fixed batch."""
    net = build_network(network, args)
    loss = DiceCELoss(sigmoid=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    generator = torch.Generator().manual_seed(0)
    image = torch.rand(args.batch, 1, *args.crop, generator=generator).to(args.device)
    target = (image > 0.99).float()

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            output = net(image)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        optimizer.zero_grad()
        loss(logits.float(), target).backward()
        optimizer.step()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return step


def time_step(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - start_cpu


def measure_peak(network: str, args: argparse.Namespace) -> int:
    """Most bytes held while a network is built and trained two steps, above those held before. For a fresh process."""
    torch.set_num_threads(args.threads)
    # A first run loads libraries, kernels and thread pools.
    run_two_steps(network, argparse.Namespace(**{**vars(args), "crop": list(PATCH)}))
    gc.collect()

    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_two_steps(network, args)
        return torch.cuda.max_memory_allocated() - before

    reset_peak_memory()
    before = read_peak_memory()
    run_two_steps(network, args)
    return read_peak_memory() - before


def run_two_steps(network: str, args: argparse.Namespace) -> None:
    """Two steps: the optimizer's state is there in the second."""
    step = make_step(network, args)
    step()
    step()


def measure_matrix_speed(device: str) -> float:
    """Operations per second of a large bf16 matrix product on the device."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    best = math.inf
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * 8192**3 / best


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    torch.set_num_threads(args.threads)
    steps = {network: make_step(network, args) for network in NETWORKS}
    # In a first step kernels are chosen and the optimizer's state is made.
    for step in steps.values():
        step()

    runs = [{network: time_step(step) for network, step in steps.items()} for _ in range(args.repeats)]
    best = {network: min(run[network][0] for run in runs) for network in NETWORKS}
    cpu = {network: min(run[network][1] for run in runs) for network in NETWORKS}
    figures: dict[str, Any] = {"device": args.device, "threads": args.threads, "size": args.size, "crop": args.crop}
    figures |= {"batch": args.batch, "seconds": best, "cpu_seconds": cpu}
    figures["parameters"] = {
        network: sum(p.numel() for p in build_network(network, args).parameters()) for network in NETWORKS
    }
    if args.device != "cpu":
        operations = estimate_costs(configure_student(args.size), tuple(args.crop), args.batch).step
        speed = measure_matrix_speed(args.device)
        figures["matrix_speed_share"] = {"student": operations / best["student"] / speed}

    # On a GPU the networks would take memory from the processes that measure it.
    del steps
    figures["peak_bytes"] = {}
    for network in NETWORKS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            figures["peak_bytes"][network] = pool.apply(measure_peak, (network, args))
    for name, values in (("time_ratio", best), ("cpu_time_ratio", cpu), ("memory_ratio", figures["peak_bytes"])):
        figures[name] = {"student": values["student"] / values["monai_unetr"]}
    return figures


def format_table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    crop = " x ".join(str(n) for n in figures["crop"])
    size = f"size {figures['size']}, crop {crop}, batch {figures['batch']}"
    rows = [("network", "parameters", "seconds", "ratio", "CPU s", "ratio", "memory", "ratio")]
    for network in NETWORKS:
        time, cpu, memory = (figures[key].get(network, 1.0) for key in ("time_ratio", "cpu_time_ratio", "memory_ratio"))
        rows.append(
            (
                network,
                f"{figures['parameters'][network] / 1e6:.2f} M",
                f"{figures['seconds'][network]:.3f}",
                f"{time:.3f}",
                f"{figures['cpu_seconds'][network]:.3f}",
                f"{cpu:.3f}",
                f"{figures['peak_bytes'][network] / 2**20:.0f} MiB",
                f"{memory:.3f}",
            )
        )

    lines = [f"{size}, {figures['device']}, {figures['threads']} thread(s)"]
    lines += [f"{first:<12}" + "".join(f"{cell:>11}" for cell in rest) for first, *rest in rows]
    for network, share in figures.get("matrix_speed_share", {}).items():
        lines.append(f"{network}: {share:.1%} of the device's matrix speed")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--size", default="tiny", choices=["tiny", "small", "base"], help="width and heads")
    parser.add_argument("--crop", type=int, nargs=3, default=[64, 64, 64], help="voxels z y x, multiples of 16")
    parser.add_argument("--batch", type=int, default=1, help="crops per step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each network; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()

    if any(n < 16 or n % 16 for n in args.crop):
        parser.error(f"--crop {args.crop}: want multiples of 16")

    figures = measure(args)
    print(format_table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
