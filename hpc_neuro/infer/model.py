"""The student made ready, what its results depend on, and the forecast."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_neuro.core import distributed, files, schema
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.block_pipeline import Work
from hpc_neuro.infer.config import EmptyConfig, InferConfig
from hpc_neuro.infer.tiling import MASK, Plan
from hpc_neuro.infer.volumes import Source
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import load_student


class Job:
    """A student, ready, with the plan by which it goes over volumes."""

    def __init__(self, cfg: InferConfig) -> None:
        """Raises ConfigError and InputError for weights or a window that cannot be used."""
        folder = weights_folder(cfg)
        self.student, self.meta = load_student(folder)
        self.device = distributed.device()
        self.student.to(self.device)
        self.digest = files.sha256(folder / "model.safetensors")
        window = cfg.window or self.meta.get("window")
        if window is None:
            raise ConfigError(f"{folder} does not say on what crop it was trained; give window=[z, y, x]")
        z, y, x = (int(n) for n in window)
        self.plan = Plan((z, y, x), cfg.overlap, self.student.patch, cfg.block, cfg.chunk)
        if any(w % p for w, p in zip(self.plan.window, self.student.patch, strict=True)):
            raise ConfigError(f"window: {[z, y, x]} must be a multiple of the student's patch {self.student.patch}")
        _check_flips(cfg, folder, bool(self.meta.get("mirrored", True)))
        self.threshold = float(cfg.threshold or self.meta.get("threshold", 0.5))
        self.batch = sliding_window.BatchSize(cfg.batch)
        self.cfg = cfg

    def predict(
        self,
        image: NDArray[np.float32],
        seen: Callable[[int], None] | None = None,
        flip: Sequence[int] = (),
        where: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float32]:
        """Normalised image [Z, Y, X] -> probability float32 [Z, Y, X]; the rest as of sliding_window.predict."""
        plan = self.plan
        return sliding_window.predict(
            self.student, image, plan.window, plan.overlap, self.batch, self.device, seen, flip, where
        )

    def work(self, source: Source, empty: EmptyConfig | None = None) -> Work:
        """What the blocks of one volume are made with."""
        cfg = self.cfg
        return Work.open(
            source,
            self.plan,
            self.predict,
            self.threshold,
            self.key(source),
            cfg.out,
            empty or cfg.empty,
            cfg.tries,
            cfg.deaths,
        )

    def key(self, source: Source) -> str:
        """Everything a probability depends on, hashed."""
        plan, cfg = self.plan, self.cfg
        facts = [self.digest, source.digest, plan.window, plan.overlap, plan.write, plan.chunk, self.threshold]
        looked = [i.overview for i in cfg.inputs]
        facts += [schema.to_plain(cfg.empty), looked]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def dark(self) -> float:
        """The largest probability the student gives to a black window."""
        return float(self.predict(np.zeros(self.plan.window, np.float32)).max())

    @torch.inference_mode()
    def seconds(self) -> float:
        """Time of one window; the first pass pays for set-up."""
        image = torch.zeros(1, 1, *self.plan.window, device=self.device)
        for _ in range(2):
            begun = time.monotonic()
            self.student(image).logits.sum().item()
        return time.monotonic() - begun


def weights_folder(cfg: InferConfig) -> Path:
    """Where the weights are: `model` itself, or weights/best|last in a train folder."""
    if (cfg.model / "model.safetensors").is_file() and cfg.weights == "last" and cfg.model.resolve().name != "last":
        raise ConfigError(f"weights: {cfg.model} holds weights itself and no `last`; give the folder that train wrote")
    for folder in (cfg.model, cfg.model / "weights" / cfg.weights):
        if (folder / "model.safetensors").is_file():
            return folder
    raise InputError(
        f"{cfg.model} holds no weights; give a folder that `hpc-neuro train` has finished, or its weights/best"
    )


def _check_flips(cfg: InferConfig, weights: Path, mirrored: bool) -> None:
    """Raises ConfigError where the weights say that their training never mirrored anything."""
    if cfg.flips and not mirrored:
        raise ConfigError(
            f"flips: the student of {weights} was trained without mirrored crops (augment.flip=false, or all were "
            "distilled as they stand), so that its doubt there says nothing; leave flips out"
        )


def lines(cfg: InferConfig, job: Job, volumes: Sequence[Source], ranks: int = 1) -> list[str]:
    """What there is to do, timed by one window. Raises InputError when the disk is too small."""
    plan, voxels = job.plan, sum(int(np.prod(v.shape, dtype=np.int64)) for v in volumes)
    files.require_space(cfg.out, 2 * voxels, "the probability and the mask (uncompressed)")
    blocks = [plan.share(plan.blocks(v.shape), v.part) for v in volumes]
    count, windows = sum(map(len, blocks)), sum(plan.cost(b) for found in blocks for b in found)
    coarse = sum(len(level) for v in volumes for level in ome_zarr.plan_shards(v.shape, v.voxel_size, plan.write, MASK))
    second = [b for v in volumes for b in (plan.second(v.shape) if cfg.flips and v.part is None else [])]
    held = max((b.read.size for found in [*blocks, second] for b in found[:8]), default=0)
    seconds, many = job.seconds(), f"{ranks} rank{'s' if ranks > 1 else ''}"
    again = len(cfg.flips) * sum(map(plan.cost, second))
    views = (
        f"the windows through which trees run once more in {len(cfg.flips)} mirrored view(s): at most {again} windows, "
        f"{seconds * again / ranks:.0f} s on {many}"
    )
    return [
        f"student of {sum(p.numel() for p in job.student.parameters()) / 1e6:.1f} M parameters on {job.device}, "
        f"threshold {job.threshold:.2f}",
        f"{len(volumes)} volumes, {voxels / 1e6:.0f} M voxels: {count} blocks of up to {plan.write} with {plan.halo} "
        f"voxels around, at most {windows} windows of {plan.window}",
        f"at most {files.format_bytes(2 * voxels)} on disk in {2 * count} shards, {coarse} shards of the pyramids and "
        f"{count} markers; about {files.format_bytes(held * 20)} of memory per rank besides the network, at most "
        f"{seconds * windows / ranks:.0f} s on {many} and the time to trace",
        *([views] if cfg.flips else []),
    ]
