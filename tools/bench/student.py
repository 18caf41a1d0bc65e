"""Time and memory of a training step of the student against MONAI's UNETR of the same tokens, width, depth and crop.

    python -m tools.bench.student [--device cpu] [--size tiny] [--crop 64 64 64] [--batch 1] [--repeats 3] [--threads 1]

Both get the same image and target and do forward, Dice + cross entropy, backward and AdamW, in float32 on the CPU and
under bf16 autocast on a GPU. Patches are 16 x 16 x 16, UNETR's only size. Times are taken in turns in one process, the
fastest of the repeats counts; CPU seconds are what counts on a busy machine. Memory is the most a process of its own
held above what it held before it built the model: weights, gradients, Adam's moments and activations. On a GPU the
share of its matrix speed that the student's operations reach is printed too. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR
from torch import Tensor, nn

from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.cost import estimate_costs
from hpc_neuro.models.student import build_student

PATCH = (16, 16, 16)
WAYS = ("student", "monai_unetr")
"""The student, and MONAI's UNETR of the same tokens."""


def config(way: str, size: Any) -> StudentConfig:
    """The student of a way."""
    return StudentConfig(size=size, patch=PATCH)


def build(way: str, args: argparse.Namespace) -> nn.Module:
    """A network image [B, 1, Z, Y, X] -> logits of the same shape, or for the student a Prediction."""
    torch.manual_seed(0)
    dim, depth, heads = SIZES[args.size]
    if way != "monai_unetr":
        return build_student(config(way, args.size)).to(args.device).train()
    if depth != 12:
        raise SystemExit(f"MONAI's UNETR has 12 blocks, size {args.size} has {depth}; choose tiny, small or base")
    net = UNETR(1, 1, args.crop, hidden_size=dim, mlp_dim=4 * dim, num_heads=heads, proj_type="conv", qkv_bias=True)
    found: nn.Module = net.to(args.device).train()
    return found


def stepper(way: str, args: argparse.Namespace) -> Callable[[], None]:
    """One training step of a fresh network on a fixed batch."""
    net = build(way, args)
    loss = DiceCELoss(sigmoid=True)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(args.batch, 1, *args.crop, generator=generator).to(args.device)
    target = (image > 0.99).float()

    def step() -> None:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):
            found = net(image)
        logits: Tensor = found if isinstance(found, Tensor) else found.logits
        optimiser.zero_grad()
        loss(logits.float(), target).backward()
        optimiser.step()
        if args.device != "cpu":
            torch.cuda.synchronize()

    return step


def timed(step: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock and of CPU."""
    start, start_cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - start_cpu


def peak(way: str, args: argparse.Namespace) -> int:
    """Most bytes held while a network is built and trained two steps, above those held before. For a fresh process."""
    torch.set_num_threads(args.threads)
    run_twice(way, argparse.Namespace(**{**vars(args), "crop": list(PATCH)}))  # loads libraries, kernels, thread pools
    gc.collect()
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run_twice(way, args)
        return torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    held = _high_water()
    run_twice(way, args)
    return _high_water() - held


def run_twice(way: str, args: argparse.Namespace) -> None:
    """Two steps: the optimizer's state is there in the second."""
    step = stepper(way, args)
    step()
    step()


def _high_water() -> int:
    """Bytes: the most memory this process has held since the mark was last cleared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matrix_speed(device: str) -> float:
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
    steps = {way: stepper(way, args) for way in WAYS}
    for step in steps.values():
        step()  # kernels are chosen and the optimizer's state is made
    runs = [{way: timed(step) for way, step in steps.items()} for _ in range(args.repeats)]
    best = {way: min(run[way][0] for run in runs) for way in WAYS}
    cpu = {way: min(run[way][1] for run in runs) for way in WAYS}
    found: dict[str, Any] = {"device": args.device, "threads": args.threads, "size": args.size, "crop": args.crop}
    found |= {"batch": args.batch, "seconds": best, "cpu_seconds": cpu}
    found["parameters"] = {way: sum(p.numel() for p in build(way, args).parameters()) for way in WAYS}
    if args.device != "cpu":
        speed = matrix_speed(args.device)
        crop = (args.crop[0], args.crop[1], args.crop[2])
        for way in WAYS[:1]:
            work = estimate_costs(config(way, args.size), crop, args.batch).step
            found.setdefault("matrix_speed_share", {})[way] = work / best[way] / speed
    del steps
    found["peak_bytes"] = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found["peak_bytes"][way] = pool.apply(peak, (way, args))
    for name, values in (("time_ratio", best), ("cpu_time_ratio", cpu), ("memory_ratio", found["peak_bytes"])):
        found[name] = {way: values[way] / values["monai_unetr"] for way in WAYS[:1]}
    return found


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    crop = " x ".join(str(n) for n in found["crop"])
    size = f"size {found['size']}, crop {crop}, batch {found['batch']}"
    rows = [("network", "parameters", "seconds", "ratio", "CPU s", "ratio", "memory", "ratio")]
    for way in WAYS:
        time, cpu, held = (found[key].get(way, 1.0) for key in ("time_ratio", "cpu_time_ratio", "memory_ratio"))
        rows.append(
            (
                way,
                f"{found['parameters'][way] / 1e6:.2f} M",
                f"{found['seconds'][way]:.3f}",
                f"{time:.3f}",
                f"{found['cpu_seconds'][way]:.3f}",
                f"{cpu:.3f}",
                f"{found['peak_bytes'][way] / 2**20:.0f} MiB",
                f"{held:.3f}",
            )
        )
    lines = [f"{size}, {found['device']}, {found['threads']} thread(s)"]
    lines += [f"{first:<12}" + "".join(f"{cell:>11}" for cell in rest) for first, *rest in rows]
    for way, share in found.get("matrix_speed_share", {}).items():
        lines.append(f"{way}: {share:.1%} of the device's matrix speed")
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
    found = measure(args)
    print(table(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
