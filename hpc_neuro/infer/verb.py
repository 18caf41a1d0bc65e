"""`infer` from config to predictions.json."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_neuro import distributed, files, morphology, runs, schema
from hpc_neuro.data import swc
from hpc_neuro.geometry import Box, Shape
from hpc_neuro.infer.blocks import Plan, foreground, predict_volume, reader
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.sources import Source, sources
from hpc_neuro.models import sliding_window
from hpc_neuro.models.student import Student, load_student
from hpc_neuro.morphology import Tree
from hpc_neuro.schema import ConfigError, InputError
from hpc_neuro.tracing import trace_read

log = logging.getLogger(__name__)
INDEX = "predictions.json"


class Job:
    """A student, ready, with the plan by which it goes over volumes."""

    def __init__(self, cfg: InferConfig) -> None:
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
        self.threshold = float(cfg.threshold or self.meta.get("threshold", 0.5))
        self.batch = cfg.batch

    def predict(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised image [Z, Y, X] -> probability float32 [Z, Y, X]."""
        plan = self.plan
        return sliding_window.predict(self.student, image, plan.window, plan.overlap, self.batch, self.device)

    def key(self, source: Source) -> str:
        """Everything a probability depends on, hashed."""
        plan = self.plan
        facts = [self.digest, source.digest, plan.window, plan.overlap, plan.write, plan.chunk, self.threshold]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def weights_folder(cfg: InferConfig) -> Path:
    """Where the weights are: `model` itself, or weights/best|last in a train folder."""
    for folder in (cfg.model, cfg.model / "weights" / cfg.weights):
        if (folder / "model.safetensors").is_file():
            return folder
    raise InputError(
        f"{cfg.model} holds no weights; give a folder that `hpc-neuro train` has finished, or its weights/best"
    )


def forecast(cfg: InferConfig) -> list[str]:
    """Check the weights, the volumes and the space; say how much there is to do, timed by one window."""
    return _forecast(cfg, Job(cfg), list(sources(cfg)))


def run(cfg: InferConfig) -> int:
    """Predict and trace every volume. Exit code 3 when blocks failed; the same command tries those again."""
    job, volumes = Job(cfg), list(sources(cfg))
    inputs = {"weights": job.digest, **{f"volume {v.id}": v.digest for v in volumes}}
    inputs |= {f"image {v.id}": v.content for v in volumes if v.file}
    behind = {"weights": weights_folder(cfg) / "model.safetensors"}
    behind |= {f"image {v.id}": v.file for v in volumes if v.file}
    folder, whole = runs.share_folder(cfg.out, cfg.share), cfg.share is not None or (cfg.out / INDEX).exists()
    with runs.start("infer", cfg, folder, inputs, whole=whole, sources=behind) as this:
        if this.complete:
            return 0
        if volumes:  # a share may be empty
            log.info("\n".join(_forecast(cfg, job, volumes)))
        begun, failures, index = time.monotonic(), [], {}
        for source in volumes:
            key = job.key(source)
            failed = predict_volume(source, job.plan, job.predict, job.threshold, key, cfg.out, cfg.tries)
            failures += failed
            if not failed:
                index[source.id], problem = _finish_once(cfg, job, source, key)
                failures += problem
        if cfg.share is None:
            files.write_json(cfg.out / INDEX, index)
        for line in failures:
            log.error("failed: %s", line)
        summary = {"volumes": len(index), "seconds": round(time.monotonic() - begun, 1)}
        this.finish(summary, failures, outputs=[cfg.out / INDEX] if cfg.share is None else [])
        log.info("wrote %d volumes and their trees to %s", len(index), cfg.out)
    return 3 if failures else 0


def _finish_once(cfg: InferConfig, job: Job, source: Source, key: str) -> tuple[dict[str, Any], list[str]]:
    """`_finish`, unless an earlier run or a share of this one traced the same probability with the same settings."""
    path = cfg.out / "entries" / f"{source.id}.json"
    facts = hashlib.sha256(f"{key} {cfg.trees} {schema.dump(cfg.trace)} {source.root} {source.voxel_size}".encode())
    if path.exists():
        held = files.read_json(path, f"remove {path}")
        trees = [held["entry"][name] for name in ("swc", "swc_voxel") if held["entry"][name]]
        if held["key"] == facts.hexdigest() and all((cfg.out / tree).exists() for tree in trees):
            return held["entry"], []
    entry, problems = _finish(cfg, job, source)
    if not problems:
        files.write_json(path, {"key": facts.hexdigest(), "entry": entry})
    return entry, problems


def _finish(cfg: InferConfig, job: Job, source: Source) -> tuple[dict[str, Any], list[str]]:
    """Trace one volume; its entry in predictions.json (paths relative to `out`), and why there is no tree, if so."""
    entry: dict[str, Any] = {
        "image": source.image,
        "voxel_size": source.voxel_size,
        "root": source.root,
        "threshold": job.threshold,
        "probability": f"{source.id}.ome.zarr",
        "foreground_voxels": foreground(cfg.out, source),
        "trees": 0,
        "swc": None,
        "swc_voxel": None,
    }
    if not cfg.trees:
        return entry, []
    begun = time.monotonic()
    read = reader(cfg.out, source)

    def probability(box: Box) -> NDArray[np.float32]:
        return read(box).astype(np.float32) / np.float32(255)

    try:
        found = trace_read(probability, source.shape, source.voxel_size, root=source.root, cfg=cfg.trace)
    except InputError as error:  # a root off the foreground; the other volumes still count
        return entry, [f"{source.id}: not traced, {error}"]
    entry["trees"] = len(found)
    if found:
        about = [f"traced by hpc_neuro {runs.code_version()} from {source.image}"]
        entry["swc"], entry["swc_voxel"] = f"swc/{source.id}.swc", f"swc/{source.id}.voxel.swc"
        _write(cfg.out / "swc", source.id, _together(found), source, about)
        entry["sha256"] = {name: files.sha256(cfg.out / entry[name]) for name in ("swc", "swc_voxel")}
        for number, tree in enumerate(found if len(found) > 1 else [], start=1):
            _write(cfg.out / "swc" / source.id, f"{number:04d}", tree, source, about)
    nodes = sum(map(len, found))
    log.info("%s: %d trees, %d nodes, traced in %.1f s", source.id, len(found), nodes, time.monotonic() - begun)
    return entry, []


def _write(folder: Path, name: str, tree: Tree, source: Source, about: list[str]) -> None:
    """NAME.swc in micrometres and NAME.voxel.swc in voxels."""
    um = morphology.scaled(tree, source.voxel_size)
    swc.write(folder / f"{name}.swc", um, unit="um", voxel_size=source.voxel_size, comments=about)
    swc.write(folder / f"{name}.voxel.swc", tree, unit="voxel", voxel_size=source.voxel_size, comments=about)


def _together(trees: list[Tree]) -> Tree:
    """Several trees as one forest."""
    starts = np.cumsum([0, *map(len, trees)])
    parents = [np.where(t.parents >= 0, t.parents + s, -1) for t, s in zip(trees, starts, strict=False)]
    return Tree(
        np.concatenate([t.points for t in trees]),
        np.concatenate([t.radii for t in trees]),
        np.concatenate(parents).astype(np.int64),
        np.concatenate([t.types for t in trees]),
    )


def _forecast(cfg: InferConfig, job: Job, volumes: list[Source]) -> list[str]:
    plan, voxels = job.plan, sum(int(np.prod(v.shape, dtype=np.int64)) for v in volumes)
    files.require_space(cfg.out, 2 * voxels, "the probability and the mask (uncompressed)")
    count, windows = sum(len(plan.blocks(v.shape)) for v in volumes), sum(plan.windows(v.shape) for v in volumes)
    seconds = _probe(job.student, plan.window, job.device) * windows
    held = max(b.read.size for v in volumes for b in plan.blocks(v.shape)[:8])
    return [
        f"student of {sum(p.numel() for p in job.student.parameters()) / 1e6:.1f} M parameters on {job.device}, "
        f"threshold {job.threshold:.2f}",
        f"{len(volumes)} volumes, {voxels / 1e6:.0f} M voxels: {count} blocks of up to {plan.write} with {plan.halo} "
        f"voxels around, {windows} windows of {plan.window}",
        f"at most {files.human(2 * voxels)} on disk in {2 * count} shards and their pyramids, about "
        f"{files.human(held * 16)} of memory besides the network, about {seconds:.0f} s and the time to trace",
    ]


@torch.inference_mode()
def _probe(student: Student, window: Shape, device: torch.device) -> float:
    """Seconds one window takes; the first pass pays for set-up."""
    image = torch.zeros(1, 1, *window, device=device)
    for _ in range(2):
        begun = time.monotonic()
        student(image).logits.sum().item()
    return time.monotonic() - begun
