"""The verb: check all pairs, then write one volume after the other, then the index."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.alignment import Fit
from hpc_neuro.data.proximal_axon import find_proximal_axon
from hpc_neuro.data.radius import fit_radii
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import SPLITS, Store, VolumeRecord, is_written, write_index, write_volume
from hpc_neuro.prepare.check import Measured, OpenedPair, entry, measure, open_pair
from hpc_neuro.prepare.config import PrepareConfig
from hpc_neuro.prepare.pairs import Pair, find_pairs
from hpc_neuro.prepare.picture import draw

log = logging.getLogger(__name__)


def forecast(cfg: PrepareConfig) -> list[str]:
    """Check every pair down to its voxels; lines with volumes, voxels, bytes and splits. Raises like `run`."""
    opened = _opened(cfg)
    measured = [measure(o, cfg.misaligned) for o in opened]
    return _lines(opened, measured, cfg)


def run(cfg: PrepareConfig) -> int:
    """Write the store. All pairs are checked before anything is written; finished volumes are skipped. Returns 0.

    Raises InputError for unusable data or a full disk, ConfigError when `out` belongs to another config.
    """
    opened = _opened(cfg)
    folder = run_folder.share_folder(cfg.out, cfg.share)
    begun = (folder / "run.json").exists()  # an earlier start measured the same inputs, or runs.start refuses below
    measured = {} if begun else {o.pair.id: _measured(o, cfg) for o in opened}
    whole = cfg.share is not None or all(path.exists() for path in _outputs(cfg.out, opened))
    raw = {f"{o.pair.id}.{k}": p for o in opened for k, p in (("image", o.pair.image), ("swc", o.pair.swc))}
    with run_folder.start("prepare", cfg, folder, inputs=_inputs(opened, cfg), whole=whole, sources=raw) as record:
        if record.complete:
            return 0
        if measured:
            for line in _lines(opened, list(measured.values()), cfg):
                log.info("%s", line)
        volumes = []
        for one in run_folder.track_progress(opened, "prepare", unit="volume"):
            found = measured.get(one.pair.id) or _measured(one, cfg)
            if cfg.share is not None:
                files.write_json(_kept(one, cfg), {"digest": one.digest, **asdict(found)})
            volume = entry(one, found)
            _write(cfg.out / f"{volume.id}.h5", one, volume, cfg)
            volumes.append((volume, found))
        if cfg.share is None:
            write_index(cfg.out, [volume for volume, _ in volumes])
            _pictures(cfg.out, volumes)
        voxels = sum(int(np.prod(v.shape)) for v, _ in volumes)
        rest = (
            "" if cfg.share is None else "; once all shares are done, the same command without share writes the index"
        )
        log.info("wrote %d volumes, %d million voxels, to %s%s", len(volumes), voxels // 1_000_000, cfg.out, rest)
        record.finish(
            {"volumes": len(volumes), "voxels": voxels}, outputs=[cfg.out / "dataset.json"] * (cfg.share is None)
        )
    return 0


def _measured(one: OpenedPair, cfg: PrepareConfig) -> Measured:
    """What a pass over the voxels gives, or gave to a share of this run."""
    path = _kept(one, cfg)
    if path.exists():
        held = files.read_json(path, f"remove {path}")
        if held.pop("digest") == one.digest:
            found = Measured(held["low"], held["high"], Fit(**held["fit"]), tuple(held["remarks"]))
            if not (found.fit.is_misaligned and cfg.misaligned == "error"):
                return found
    return measure(one, cfg.misaligned)


def _kept(one: OpenedPair, cfg: PrepareConfig) -> Path:
    return cfg.out / "measured" / f"{one.pair.id}.json"


def _opened(cfg: PrepareConfig) -> list[OpenedPair]:
    pairs = find_pairs(cfg)
    _apart(cfg.out, pairs)
    opened = [open_pair(pair, cfg) for pair in run_folder.take_share(pairs, cfg.share)]
    _once(opened)
    written = sum(o.bytes(cfg.distance_cap) for o in opened if not is_written(cfg.out / f"{o.pair.id}.h5", o.digest))
    files.require_space(cfg.out, written, "the store")
    return opened


def _apart(out: Path, pairs: list[Pair]) -> None:
    """InputError where the store would be written over an image or a tree."""
    written = {(out / f"{pair.id}.h5").resolve() for pair in pairs} | {(out / "dataset.json").resolve()}
    for pair in pairs:
        for path in (pair.image, pair.swc):
            if path.resolve() in written:
                raise InputError(f"{path} would be replaced by the store's file of that name; choose another `out`")


def _once(opened: list[OpenedPair]) -> None:
    """InputError where one image is in two splits: what is tested would be what was trained on."""
    first: dict[tuple[str, int | None], OpenedPair] = {}
    for one in opened:
        other = first.setdefault((one.sources["image"], one.pair.channel), one)
        if other.pair.split != one.pair.split:
            raise InputError(
                f"{other.pair.id} ({other.pair.split}) and {one.pair.id} ({one.pair.split}) are the same image; put "
                "both into one split (a manifest's `neuron` does so), or leave one out"
            )


def _outputs(out: Path, opened: list[OpenedPair]) -> list[Path]:
    ids = [o.pair.id for o in opened]
    return [out / "dataset.json", *(out / f"{i}.h5" for i in ids), *(out / "pictures" / f"{i}.png" for i in ids)]


def _write(path: Path, one: OpenedPair, volume: VolumeRecord, cfg: PrepareConfig) -> None:
    if is_written(path, volume.digest):
        log.info("%s: already written", volume.id)
        return
    read = one.image.__getitem__
    drawn = fit_radii(one.tree, cfg.radius, read, volume.shape, volume.voxel_size)
    drawing = DrawSettings(cfg.tube, cfg.distance_cap, cfg.ignore_margin, cfg.stretch or drawn.stretch)
    region = None
    if cfg.beyond_root == "unlabelled":
        region = find_proximal_axon(drawn.tree, drawing.stretch, read, volume.shape, volume.voxel_size)
    write_volume(path, volume, read, one.tree, drawn.tree, drawing, region.mask_in if region else None)
    if region:
        log.info("%s: a neurite before the root, %d voxels, is marked unlabelled", volume.id, int(region.inside.sum()))
    log.info(
        "%s: written, %s; median radius %.2f fine voxels (%.2f to %.2f), %.2f times that along the coarsest axis",
        volume.id,
        files.format_bytes(path.stat().st_size),
        *np.percentile(drawn.tree.radii, [50, 5, 95]),
        drawing.stretch,
    )


def _pictures(out: Path, volumes: list[tuple[VolumeRecord, Measured]]) -> None:
    store = Store(out)
    for volume, found in volumes:
        path = out / "pictures" / f"{volume.id}.png"
        if not path.exists():
            size = " x ".join(f"{v:.4g}" for v in volume.voxel_size)
            title = (
                f"{volume.id} ({volume.split}): {' x '.join(map(str, volume.shape))} voxels of {size} um (z y x), "
                f"{volume.dtype}\nred: the tree, circle: its root, cyan: the mask, yellow: unlabelled; "
                f"mean intensity percentile along the tree {100 * found.fit.score:.1f}"
            )
            draw(store[volume.id], path, title)
    store.close()


def _inputs(opened: list[OpenedPair], cfg: PrepareConfig) -> dict[str, Path | str]:
    """Digests by name; `pairs` holds what meta.json or the manifest said, of a share of them under the share's name."""
    said = [[o.pair.id, o.pair.split, o.digest] for o in opened]
    hashes: dict[str, Path | str] = {f"{o.pair.id}.{k}": v for o in opened for k, v in o.sources.items()}
    return hashes | {run_folder.input_name("pairs", cfg.share): files.sha256_json(said)}


def _lines(opened: list[OpenedPair], measured: list[Measured], cfg: PrepareConfig) -> list[str]:
    voxels = sum(int(np.prod(o.image.shape, dtype=np.int64)) for o in opened)
    needed = sum(o.bytes(cfg.distance_cap) for o in opened)
    lines = [f"{len(opened)} volumes, {voxels:,} voxels, at most about {files.format_bytes(needed)} in {cfg.out}"]
    for split in SPLITS:
        ids = [o.pair.id for o in opened if o.pair.split == split]
        lines.append(f"{split}: {len(ids)} ({', '.join(ids)})" if ids else f"{split}: none")
    for o, m in zip(opened, measured, strict=True):
        z, y, x = o.image.shape
        size = " x ".join(f"{v:.4g}" for v in o.size)
        lines.append(
            f"{o.pair.id}: {z} x {y} x {x} of {size} um, {o.image.dtype}, range {m.low:g} to {m.high:g}, "
            f"{len(o.tree)} nodes, percentile along the tree {100 * m.fit.score:.1f} "
            f"(best other {100 * m.fit.best_score:.1f}: {m.fit.best_change})"
        )
        lines += [*o.remarks, *m.remarks]
    lines.append(f"radius: {schema.to_plain(cfg.radius)}")
    return lines
