"""The student made ready, what its results depend on, and the forecast."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpc_neuro.core import distributed, files
from hpc_neuro.core.geometry import Shape, VoxelSize
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.core.task_queue import RetryLimits
from hpc_neuro.data import ome_zarr
from hpc_neuro.data.resample import Resampling
from hpc_neuro.data.run_journal import RunJournal
from hpc_neuro.infer.block_pipeline import EmptyRule, VolumeRun
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.grid import choose_grid
from hpc_neuro.infer.tiling import MASK, Tiling
from hpc_neuro.infer.volumes import InputVolume
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student
from hpc_neuro.models.student_folder import find_student, read_contrast
from hpc_neuro.tracing.super_blocks import has_super_blocks

_BYTES_PER_VOXEL = 20
"""Memory that a block takes for each voxel it reads, besides the network: the image, its padded copy, the sums."""


class Predictor:
    """A student, ready, with the tiling by which it goes over volumes."""

    def __init__(self, cfg: InferConfig) -> None:
        """Raises ConfigError and InputError for weights or a window that cannot be used."""
        folder = find_student(cfg.model, cfg.weights)
        self.student, self.meta = load_student(folder)
        self.device = distributed.device()
        self.student.to(self.device)

        # Results depend on the bytes of the weights, wherever they lie.
        self.digest = files.sha256(folder / "model.safetensors")

        window = choose_window(folder, self.meta, self.student.patch, cfg.window)
        self.tiling = Tiling(window, cfg.overlap, self.student.patch, cfg.block, cfg.chunk)

        _check_flips(cfg, folder, bool(self.meta.get("mirrored", True)))

        # The threshold that training found best belongs to the weights.
        self.threshold = float(cfg.threshold or self.meta.get("threshold", 0.5))

        # The student must see what it saw in training.
        self.contrast = read_contrast(self.meta)

        # Shared by all calls: a batch that was halved once stays so.
        self.batch = sliding_window.BatchSize(cfg.batch)
        self.cfg = cfg

    def predict(
        self,
        image: NDArray[np.float32],
        count_windows: Callable[[int], None] | None = None,
        flip: Sequence[int] = (),
        where: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float32]:
        """Normalized image [Z, Y, X] -> probability float32 [Z, Y, X]; the rest as of sliding_window.predict."""
        tiling = self.tiling
        return sliding_window.predict(
            self.student,
            image,
            tiling.window,
            tiling.overlap,
            self.batch,
            self.device,
            count_windows,
            flip,
            where,
            skip_black=self.skips_black,
        )

    def open_volume(
        self, source: InputVolume, empty_level: float | None, journal: RunJournal | None = None
    ) -> VolumeRun:
        """What the blocks of one volume are made with."""
        return VolumeRun.open(
            source,
            self.tile(source),
            self.predict,
            self.threshold,
            self.hash_settings(source),
            self.cfg.out,
            EmptyRule(empty_level),
            RetryLimits(deaths=self.cfg.deaths),
            journal,
        )

    def choose_grid(self, shape: Shape, size: VoxelSize, image: str) -> Resampling | None:
        """The grid that the student sees of an image; None: that of the image. Raises InputError; see `choose_grid`."""
        return None if self.cfg.any_voxel_size else choose_grid(self.meta, self.cfg.model, shape, size, image)

    def tile(self, source: InputVolume) -> Tiling:
        """How a volume is cut."""
        return self.tiling if source.resampling is None else replace(self.tiling, resampling=source.resampling)

    def hash_settings(self, source: InputVolume) -> str:
        """Everything that the probability of a volume depends on, hashed."""
        tiling, cfg = self.tile(source), self.cfg
        facts = [self.digest, source.digest, tiling.window, tiling.overlap, tiling.write, tiling.chunk, self.threshold]

        # Which blocks are skipped depends on these.
        facts += [cfg.empty_level, [item.overview for item in cfg.inputs]]
        if source.resampling is not None:
            facts.append(source.resampling.factor)
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @functools.cached_property
    def skips_black(self) -> bool:
        """Whether black windows and blocks need not be run: it is asked for, and the student finds nothing in them."""
        if self.cfg.empty_level is None:
            return False
        return predict_black(self.student, self.tiling.window, self.device) < self.threshold

    @torch.inference_mode()
    def time_window(self) -> float:
        """[s] Time of one window; the first pass pays for set-up."""
        image = torch.zeros(1, 1, *self.tiling.window, device=self.device)
        for _ in range(2):
            started_at = time.monotonic()

            # `item` waits for the device; without it only the launch would be timed.
            self.student(image).logits.sum().item()
        return time.monotonic() - started_at


def choose_window(folder: Path, meta: Mapping[str, Any], patch: Shape, window: Shape | None) -> Shape:
    """[voxel] z y x of what the student sees at once: as asked for, else as much as in training.

    meta: what was saved beside the weights in `folder`. Raises ConfigError where neither says it, and for a window that
    does not divide into patches.
    """
    sizes = window or meta.get("window")
    if sizes is None:
        raise ConfigError(f"{folder} does not say on what crop it was trained; give window=[z, y, x]")

    # The student divides a window into whole patches.
    z, y, x = (int(size) for size in sizes)
    if any(size % patch_size for size, patch_size in zip((z, y, x), patch, strict=True)):
        raise ConfigError(f"window: {[z, y, x]} must be a multiple of the student's patch {patch}")
    return z, y, x


def predict_black(student: nn.Module, window: Shape, device: torch.device) -> float:
    """The largest probability that the student gives to a black window."""
    # No window may be left out here, or every student would pass.
    return float(sliding_window.predict(student, np.zeros(window, np.float32), window, device=device).max())


def describe_run(cfg: InferConfig, predictor: Predictor, volumes: Sequence[InputVolume], ranks: int = 1) -> list[str]:
    """What there is to do, timed by one window. Raises InputError when the disk is too small."""
    tilings = [predictor.tile(volume) for volume in volumes]
    voxels = sum(int(np.prod(volume.shape, dtype=np.int64)) for volume in volumes)

    # A disk that is too small is reported before hours of computing.
    # The shards of a volume that is traced in super-blocks are copied into packs.
    packed = sum(math.prod(volume.shape) for volume in volumes if _is_large(cfg, volume))
    contents = "the probability and the mask" + (", and packs of the probability" if packed else "")
    files.require_space(cfg.out, 2 * voxels + packed, f"{contents} (uncompressed)")

    pairs = list(zip(volumes, tilings, strict=True))
    blocks = [tiling.take_share(tiling.list_blocks(volume.shape), volume.share) for volume, tiling in pairs]
    block_count = sum(map(len, blocks))
    windows = sum(predictor.tiling.count_windows(block) for own in blocks for block in own)

    levels = [level for v, tiling in pairs for level in ome_zarr.plan_shards(v.shape, v.voxel_size, tiling.write, MASK)]
    pyramid_shards = sum(map(len, levels))

    # The first blocks of a volume include one of the largest.
    flip_blocks = [b for v, tiling in pairs if cfg.flips and v.share is None for b in tiling.list_flip_blocks(v.shape)]
    voxels_in_memory = max((block.read.size for own in [*blocks, flip_blocks] for block in own[:8]), default=0)

    # One window is timed, because its cost differs widely between devices and students.
    seconds = predictor.time_window()
    count, ranks_text = files.format_count, files.format_count(ranks, "rank")

    # The blocks of a resampled volume may be smaller.
    tiling = max(tilings, key=lambda t: math.prod(t.write), default=predictor.tiling)
    # Intermediate files of tracing are removed at the end.
    trace_blocks = sum(
        math.prod(math.ceil(n / b) for n, b in zip(volume.shape, cfg.trace.block, strict=True))
        for volume in volumes
        if cfg.trees and volume.share is None
    )
    file_count = 2 * block_count + pyramid_shards + ranks

    lines = [
        f"student of {sum(p.numel() for p in predictor.student.parameters()) / 1e6:.1f} M parameters on "
        f"{predictor.device}, threshold {predictor.threshold:.2f}",
        f"{count(len(volumes), 'volume')}, {voxels / 1e6:.0f} M voxels: {count(block_count, 'block')} of up to "
        f"{tiling.write} with {tiling.halo} voxels around, at most {count(windows, 'window')} of {tiling.window}",
        f"at most {files.format_bytes(2 * voxels)} in {count(file_count, 'file')}: {2 * block_count} shards, "
        f"{count(pyramid_shards, 'shard')} of the pyramids and {count(ranks, 'log')} of the journal; at most "
        f"{count(trace_blocks, 'file')} more while trees are traced"
        + (f", with at most {files.format_bytes(packed)} of copies of the probability" if packed else ""),
        f"about {files.format_bytes(voxels_in_memory * _BYTES_PER_VOXEL)} of memory per rank besides the network, at "
        f"most {seconds * windows / ranks:.0f} s on {ranks_text} and the time to trace",
    ]

    # Which windows trees touch is not known before tracing, so this is an upper bound.
    if cfg.flips:
        flip_windows = len(cfg.flips) * sum(map(tiling.count_windows, flip_blocks))
        lines.append(
            f"the windows through which trees run once more in {count(len(cfg.flips), 'mirrored view')}: at most "
            f"{count(flip_windows, 'window')}, {seconds * flip_windows / ranks:.0f} s on {ranks_text}"
        )
    return lines


def _is_large(cfg: InferConfig, volume: InputVolume) -> bool:
    """Whether a volume is traced in super-blocks by this run."""
    shape = volume.shape if volume.resampling is None else volume.resampling.new_shape
    return cfg.trees and volume.share is None and has_super_blocks(shape, cfg.trace)


def _check_flips(cfg: InferConfig, weights: Path, is_mirrored: bool) -> None:
    """Raises ConfigError where the weights say that their training never mirrored anything."""
    if cfg.flips and not is_mirrored:
        raise ConfigError(
            f"flips: the student of {weights} was trained without mirrored crops (augment.flip=false, or all were "
            "distilled as they stand), so its doubt in mirrors means nothing; leave flips out"
        )
