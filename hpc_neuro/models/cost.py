"""What a student costs before it is built: parameters, operations and memory of a training step, by part.

Operations are multiplications and additions of matrix products and convolutions, two per product, as papers count
them. Memory is what backward keeps. The convolutional path is run on a single patch, and what it did and kept there is
the same for every other; the transformer and tubes are counted by formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.config import StudentConfig, TubularTokens
from hpc_neuro.models.stem import FirstConv
from hpc_neuro.models.student import Student, blank_student

_STATE_BYTES = 16  # per parameter: float32 weight and gradient, two Adam moments


@dataclass(frozen=True)
class Cost:
    """One part of the student at a crop and batch."""

    part: str
    parameters: int
    forward: float  # operations
    step: float  # operations of forward and backward, recomputation included
    kept: int  # bytes held from forward to backward


def costs(cfg: StudentConfig, crop: Shape, batch: int, value_bytes: int = 4) -> list[Cost]:
    """Cost per part. `crop` in voxels, a multiple of the patch; `value_bytes` 4 for float32, 2 for bf16."""
    student = blank_student(cfg).train()
    stem, decoder = student.stem.to_empty(device="cpu"), student.decoder.to_empty(device="cpu")
    grid = math.prod(n // p for n, p in zip(crop, cfg.patch, strict=True))
    trace = _Trace(student)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # no pool of threads is left behind: a process that is forked later would wait for it
    skips = trace.run(stem, torch.zeros(1, 1, *cfg.patch))
    (stem_operations, stem_bytes), tokens = (
        trace.take_counts(),
        torch.zeros(1, student.vit.dim, 1, 1, 1, requires_grad=True),
    )
    trace.run(decoder, skips, dict.fromkeys(decoder.layers, tokens))
    decoder_operations, decoder_bytes = trace.take_counts()
    torch.set_num_threads(threads)
    voxels, patches = math.prod(crop) * batch, grid * batch
    first = 2 * stem.first.weight.numel() * voxels  # the image itself needs no gradient
    scale = patches * value_bytes / 4
    work = (stem_operations * patches, decoder_operations * patches)
    return [
        _tokenizer(student, cfg, patches, voxels, value_bytes),
        _transformer(student, cfg, grid, batch, value_bytes),
        Cost("stem", _count(stem), work[0], 3 * work[0] - first, round(stem_bytes * scale)),
        Cost("decoder", _count(decoder), work[1], 3 * work[1], round(decoder_bytes * scale)),
    ]


def summary(cfg: StudentConfig, crop: Shape, batch: int, value_bytes: int = 4) -> list[str]:
    """`costs` as a table for people, with the total and what weights, gradients and optimizer need."""
    parts = costs(cfg, crop, batch, value_bytes)
    sums = [sum(getattr(p, f) for p in parts) for f in ("parameters", "forward", "step", "kept")]
    rows = [*parts, Cost("total", int(sums[0]), sums[1], sums[2], int(sums[3]))]
    grid = " x ".join(str(n // p) for n, p in zip(crop, cfg.patch, strict=True))
    size = f"student {cfg.size}, crop {' x '.join(map(str, crop))}, batch {batch}: {grid} tokens"
    lines = [size, f"{'part':<12}{'parameters':>12}{'GFLOP forward':>15}{'GFLOP step':>12}{'kept for backward':>19}"]
    for row in rows:
        numbers = f"{row.forward / 1e9:>15.2f}{row.step / 1e9:>12.2f}{format_bytes(row.kept):>19}"
        lines.append(f"{row.part:<12}{row.parameters / 1e6:>10.2f} M{numbers}")
    lines.append(
        f"weights, gradients and Adam in float32: {format_bytes(_STATE_BYTES * rows[-1].parameters)} over all ranks"
    )
    return lines


def _tokenizer(student: Student, cfg: StudentConfig, count: int, voxels: int, value_bytes: int) -> Cost:
    """A block convolution reads each voxel once per channel; a tube K taps per axis; the image needs no gradient."""
    dim, tokens = student.vit.dim, cfg.tokenizer
    block = 2 * dim * voxels if not isinstance(tokens, TubularTokens) or tokens.keep_block else 0
    if not isinstance(tokens, TubularTokens):
        return Cost("tokenizer", _count(student.tokenizer), block, 2 * block, voxels * value_bytes)
    offsets: Any = student.tokenizer.offsets
    tubes = 2 * 3 * tokens.taps * dim * count
    fuse = 2 * 3 * dim * dim * count if tokens.fuse == "concat" else 0
    forward, step = block + tubes + fuse, 2 * block + 2 * tubes + 3 * fuse
    values = 3 * tokens.taps * count + 3 * dim * count * (fuse > 0)
    if offsets is not None:
        bend = 2 * count * sum(p.numel() for p in offsets.parameters() if p.ndim > 1)
        first = 2 * count * offsets[0].weight.numel()  # sees the image
        forward, step = forward + bend, step + 3 * bend - first + tubes  # bends need the taps' gradient as well
        values += 4 * offsets[0].out_channels * count  # before and after both GELUs
    kept = (values + voxels * (block > 0 or offsets is not None)) * value_bytes
    kept += 2 * 6 * (tokens.taps - 1) * count * (offsets is not None) * 4  # tanh's result and the steps, float32
    return Cost("tokenizer", _count(student.tokenizer), forward, step, kept)


def _transformer(student: Student, cfg: StudentConfig, tokens: int, batch: int, value_bytes: int) -> Cost:
    """Per block and token 12 C^2 products in the linear layers and 2 n C in attention (scores, and values)."""
    vit = student.vit
    n, c = tokens + vit.prefix, vit.dim
    block = batch * n * (2 * 12 * c * c + 4 * n * c)
    forward = float(vit.depth * block)
    # kept per token: both norms' inputs and outputs (4 C), q k v (3 C), attention's output and its copy (2 C), GELU's
    # input and output (8 C); with layer scale both branches' ends (2 C)
    inside = batch * n * c * (17 + 2 * cfg.layer_scale) * value_bytes
    kept = vit.depth * inside
    if cfg.checkpointing:
        kept = vit.depth * batch * n * c * value_bytes + inside  # each block's input, and one block at a time
    again = forward if cfg.checkpointing else 0.0
    if again and not cfg.layer_scale:  # a block's recomputation stops at the last tensor wanted, before its last matrix
        again -= vit.depth * batch * n * 2 * 4 * c * c
    return Cost("transformer", _count(vit), forward, 3 * forward + again, kept)


class _Trace:
    """Operations of forward runs, and the float32 bytes they keep for backward, parameters not counted."""

    def __init__(self, student: Student) -> None:
        self._own = {p.untyped_storage()._cdata for p in student.parameters()}
        self._kept: dict[int, Tensor] = {}  # by storage; held, for a freed storage's address would be given out again
        self._operations, self._bytes = 0.0, 0

    def run(self, module: nn.Module, *inputs: Any) -> Any:
        """`module`'s output."""
        layers = [m for m in module.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear, FirstConv))]
        handles = [layer.register_forward_hook(self._count) for layer in layers]
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            output = module(*inputs)
        for handle in handles:
            handle.remove()
        return output

    def take_counts(self) -> tuple[float, int]:
        """Operations and bytes since the last call; a tensor kept before is not counted again."""
        counts = self._operations, self._bytes
        self._operations, self._bytes = 0.0, 0
        return counts

    def _count(self, layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        positions = inputs[0] if isinstance(layer, nn.ConvTranspose3d) else output
        channels = positions.shape[-1 if isinstance(layer, nn.Linear) else 1]
        self._operations += 2 * layer.weight.numel() * positions.numel() / channels

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._kept:
            self._kept[storage._cdata] = tensor
            self._bytes += storage.nbytes()
        return tensor


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
