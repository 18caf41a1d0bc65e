"""The fastest tiles of the tube operator's Triton kernels on the GPU at hand.

    python -m tools.bench.tune_tubular [--channels 32] [--taps 9] [--repeats 20]

Every choice of tubes, warps and pipeline stages is timed for the kernels of the convolution, the gradients of values
and displacements, and the gradient of the weight, in float32 and bfloat16, against the package's own tile, on the
inputs of `tools.bench.tubular`. The last lines are the table to put into `hpc_neuro/models/tubular/triton_impl.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time

import torch
from triton.runtime.errors import OutOfResources

from hpc_neuro.models.tubular import triton_impl
from hpc_neuro.models.tubular.torch_impl import Tubes
from tools.bench import tubular

Tile = tuple[int, int, int]
"""Tubes, warps and stages of a program."""

TUBES, WARPS, STAGES = (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)
NEEDS = {"gradient": (True, True, False), "weight": (False, False, True)}
"""Which gradients a kernel gives, of values, offsets and weight."""


def list_tiles() -> list[Tile]:
    """Every choice in which a warp has 8 to 32 tubes: with fewer it idles, with more its registers overflow."""
    choices = itertools.product(TUBES, WARPS, STAGES)
    return [(tubes, warps, stages) for tubes, warps, stages in choices if 8 <= tubes // warps <= 32]


def time_tile(kernel: str, tile: Tile, inputs: tubular.Inputs, tubes: Tubes, repeats: int) -> float:
    """[s] A launch by the package, with its other kernels, on average of `repeats`; infinity where it does not fit."""
    rows, offsets, weight = inputs
    grad = torch.ones(len(offsets), offsets.shape[2], len(weight), dtype=rows.dtype, device=rows.device)

    def launch() -> None:
        if kernel == "conv":
            triton_impl.forward(rows, offsets, weight, tubes)
        else:
            triton_impl.backward(rows, offsets, weight, grad, tubes, NEEDS[kernel])

    table = triton_impl.TILES[rows.dtype]
    before, table[kernel] = table[kernel], tile
    try:
        # The first launch compiles.
        launch()
        tubular.wait_for_device(rows)

        start = time.perf_counter()
        for _ in range(repeats):
            launch()
        tubular.wait_for_device(rows)
        return (time.perf_counter() - start) / repeats
    except OutOfResources:
        return math.inf
    finally:
        table[kernel] = before


def prepare_inputs(args: argparse.Namespace, dtype: torch.dtype) -> tuple[tubular.Inputs, Tubes]:
    """The benchmark's inputs as the kernels take them: rows [N, C], offsets [1, 2(K-1), N], weight [O, C, K]."""
    shape = tubular.SMALL
    x, offsets, weight = (t.detach() for t in tubular.make_inputs(shape, args.channels, args.taps, args.device))
    rows = x[0].flatten(1).t().contiguous().to(dtype)

    ranges = [torch.arange(n, device=x.device) for n in shape]
    centers = torch.stack([c.flatten() for c in torch.meshgrid(*ranges, indexing="ij")])
    return (rows, offsets.flatten(2), weight.to(dtype)), Tubes(shape, 0, args.taps, centers)


def tune_kernels(dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Tile]:
    """The fastest tile of each kernel, with a printed line for each."""
    inputs, tubes = prepare_inputs(args, dtype)

    fastest = {}
    for kernel, current in triton_impl.TILES[dtype].items():
        before = time_tile(kernel, current, inputs, tubes, args.repeats)
        timings = {tile: time_tile(kernel, tile, inputs, tubes, args.repeats) for tile in list_tiles()}
        fastest[kernel] = min(timings, key=lambda tile: timings[tile])

        best, fit = timings[fastest[kernel]], sum(map(math.isfinite, timings.values()))
        name = f"{str(dtype).removeprefix('torch.'):<9} {kernel:<9}"
        print(f"{name} {current} {before * 1e6:.0f} us -> {fastest[kernel]} {best * 1e6:.0f} us", end=" ")
        print(f"({best / before:.2f}; {fit} of {len(timings)} choices fit)", flush=True)
    return fastest


def main() -> int:
    """Time every choice; prints a line for each kernel and precision, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=32, help="channels in and out")
    parser.add_argument("--taps", type=int, default=9, help="taps of a tube, odd")
    parser.add_argument("--repeats", type=int, default=20, help="timed launches of each choice")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with TRITON_INTERPRET=1 to try the tool itself")
    args = parser.parse_args()

    if args.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here, and tiles are tuned for one: run this on a GPU machine", file=sys.stderr)
        return 2

    print(f"{len(list_tiles())} choices for each of 6 kernels; compiling them takes some minutes", flush=True)
    table = []
    for dtype in triton_impl.TILES:
        choice = ", ".join(f'"{kernel}": {tile}' for kernel, tile in tune_kernels(dtype, args).items())
        table.append(f"    {dtype}: {{{choice}}},")
    print("TILES = {", *table, "}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
