"""Time and memory of the tube convolution against the straightforward way: sample all taps, then convolve.

    python -m tools.bench.tubular [--device cpu] [--channels 32] [--taps 9] [--repeats 3] [--threads 1]

Both ways get the same inputs and do forward and backward for values, offsets and weight. Times are taken in turns in
one process, the fastest of the repeats counts; CPU seconds are what counts on a busy machine. Peak memory is what one
forward and backward needs above its inputs, each measured in a process of its own. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.tubular import tube_conv
from tools.bench.process_memory import read_peak_memory, reset_peak_memory

SMALL: Shape = (48, 64, 56)
LARGE: Shape = (128, 96, 96)
Inputs = tuple[Tensor, Tensor, Tensor]
"""Values [B, C, Z, Y, X], offsets [B, 2(K-1), Z, Y, X] and weight [O, C, K]."""


def convolve_all_taps(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Tubes along z by `grid_sample` of all K taps at once, interleaved along z, then a strided convolution."""
    batch, size = len(x), x.shape[2:]
    taps, half = weight.shape[2], weight.shape[2] // 2

    steps = offsets.view(batch, 2, taps - 1, *size)
    zero = torch.zeros_like(steps[:, :, :1])
    before = steps[:, :, :half].flip(2).cumsum(2).flip(2)
    move = torch.cat([before, zero, steps[:, :, half:].cumsum(2)], 2)  # [B, 2, K, Z, Y, X]

    z, y, x_ = torch.meshgrid(*(torch.arange(n, dtype=x.dtype, device=x.device) for n in size), indexing="ij")
    along = torch.arange(-half, taps - half, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
    last, middle = x_ + move[:, 1], y + move[:, 0]
    points = torch.stack([last, middle, (z + along).expand_as(last)], -1)  # [B, K, Z, Y, X, 3]
    scale = torch.tensor([2 / max(n - 1, 1) for n in reversed(size)], dtype=x.dtype, device=x.device)

    # The taps of a voxel follow one another along z, so that a convolution of stride K takes them together.
    grid = (points * scale - 1).transpose(1, 2).reshape(batch, -1, *size[1:], 3)
    samples = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return F.conv3d(samples, weight[..., None, None], stride=(taps, 1, 1))


def convolve_tubes(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """The same by `tube_conv`."""
    return tube_conv(x, offsets, weight, None, 0)


METHODS = {"all_taps": convolve_all_taps, "tubes": convolve_tubes}


def make_inputs(shape: Shape, channels: int, taps: int, device: str) -> Inputs:
    """Seeded values [1, C, *shape], offsets within one voxel per step, weight [C, C, K]; all want gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, *shape, generator=generator)
    offsets = torch.tanh(torch.randn(1, 2 * (taps - 1), *shape, generator=generator))
    weight = torch.randn(channels, channels, taps, generator=generator) / math.sqrt(channels * taps)

    return (
        x.to(device).requires_grad_(),
        offsets.to(device).requires_grad_(),
        weight.to(device).requires_grad_(),
    )


def time_step(method: str, inputs: Inputs) -> tuple[float, float]:
    """Seconds by the clock and of CPU of one forward and backward; the gradients are thrown away."""
    for tensor in inputs:
        tensor.grad = None
    wait_for_device(inputs[0])

    start, start_cpu = time.perf_counter(), time.process_time()
    out = METHODS[method](*inputs)
    torch.autograd.backward(out, torch.ones_like(out))
    wait_for_device(inputs[0])
    return time.perf_counter() - start, time.process_time() - start_cpu


def wait_for_device(tensor: Tensor) -> None:
    """Return when the device of a tensor has nothing left to do."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def measure_peak(method: str, shape: Shape, args: argparse.Namespace) -> tuple[int, float]:
    """Bytes above the inputs that one forward and backward needs, and its seconds. For a fresh process."""
    torch.set_num_threads(args.threads)
    # A first run loads kernels and thread pools.
    time_step(method, make_inputs((4, 4, 4), args.channels, args.taps, args.device))

    inputs = make_inputs(shape, args.channels, args.taps, args.device)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, _ = time_step(method, inputs)
        return torch.cuda.max_memory_allocated() - before, seconds

    reset_peak_memory()
    before = read_peak_memory()
    seconds, _ = time_step(method, inputs)
    return read_peak_memory() - before, seconds


def measure_peak_alone(method: str, shape: Shape, args: argparse.Namespace) -> tuple[int, float]:
    """`measure_peak` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure_peak, (method, shape, args))


def measure_bandwidth(device: str) -> float:
    """Bytes per second of a large copy on the device: one read and one write each."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    best = math.inf
    for _ in range(5):
        wait_for_device(source)
        start = time.perf_counter()
        target.copy_(source)
        wait_for_device(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * source.element_size() / best


def count_least_bytes(inputs: Inputs) -> int:
    """What any implementation must move: values and offsets twice, result, its gradient and both gradients once."""
    x, offsets, weight = inputs
    result = x[:, :1].numel() * len(weight)
    return x.element_size() * (3 * x.numel() + 3 * offsets.numel() + 2 * result)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    torch.set_num_threads(args.threads)
    inputs = make_inputs(SMALL, args.channels, args.taps, args.device)
    with torch.no_grad():
        difference = float((convolve_all_taps(*inputs) - convolve_tubes(*inputs)).abs().max())

    runs = [{method: time_step(method, inputs) for method in METHODS} for _ in range(args.repeats)]
    best = {method: min(run[method][0] for run in runs) for method in METHODS}
    cpu = {method: min(run[method][1] for run in runs) for method in METHODS}
    figures: dict[str, Any] = {
        "device": args.device,
        "threads": args.threads,
        "shape": SMALL,
        "channels": args.channels,
        "taps": args.taps,
        "largest_difference": difference,
        "seconds": best,
        "time_ratio": best["tubes"] / best["all_taps"],
        "cpu_seconds": cpu,
        "cpu_time_ratio": cpu["tubes"] / cpu["all_taps"],
    }
    if args.device != "cpu":
        figures["bandwidth_share"] = count_least_bytes(inputs) / measure_bandwidth(args.device) / best["tubes"]

    # On a GPU the inputs would take memory from the processes that measure it.
    del inputs
    figures["peak_bytes"] = {method: measure_peak_alone(method, SMALL, args)[0] for method in METHODS}
    figures["memory_ratio"] = figures["peak_bytes"]["tubes"] / figures["peak_bytes"]["all_taps"]
    size, seconds = measure_peak_alone("tubes", LARGE, args)
    figures["large"] = {"shape": LARGE, "peak_bytes": size, "seconds": seconds}
    return figures


def format_table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    small, large = ("x".join(str(n) for n in shape) for shape in (figures["shape"], figures["large"]["shape"]))
    rows = [("volume", "way", "seconds", "CPU seconds", "peak above inputs")]
    for method in METHODS:
        peak_memory = f"{figures['peak_bytes'][method] / 2**20:.0f} MiB"
        seconds, cpu_seconds = f"{figures['seconds'][method]:.3f}", f"{figures['cpu_seconds'][method]:.3f}"
        rows.append((small, method, seconds, cpu_seconds, peak_memory))

    time_ratio, cpu_ratio, memory = (f"{figures[k]:.3f}" for k in ("time_ratio", "cpu_time_ratio", "memory_ratio"))
    rows.append(("ratio", "tubes / all_taps", time_ratio, cpu_ratio, memory))
    peak_memory = f"{figures['large']['peak_bytes'] / 2**20:.0f} MiB"
    rows.append((large, "tubes", f"{figures['large']['seconds']:.3f}", "", peak_memory))

    threads = f"{figures['threads']} thread(s)"
    lines = [f"{figures['channels']} channels, {figures['taps']} taps, {figures['device']}, {threads}"]
    lines += [f"{a:<12} {b:<17} {c:>9} {d:>12} {e:>18}" for a, b, c, d, e in rows]
    if "bandwidth_share" in figures:
        lines.append(f"share of the memory-bandwidth bound: {figures['bandwidth_share']:.1%}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--channels", type=int, default=32, help="channels in and out")
    parser.add_argument("--taps", type=int, default=9, help="taps of a tube, odd")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each way; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")

    figures = measure(parser.parse_args())
    print(format_table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
