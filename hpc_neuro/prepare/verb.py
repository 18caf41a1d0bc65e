"""Run `prepare`: check all pairs, write one volume after the other, then the index and the pictures."""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import stop_on_request, until_stopped
from hpc_neuro.data.alignment import Fit
from hpc_neuro.data.proximal_axon import VoxelRegion, find_proximal_axon
from hpc_neuro.data.radius import fit_radii
from hpc_neuro.data.rasterize import DrawSettings
from hpc_neuro.data.store import (
    INDEX,
    SPLITS,
    Store,
    StoredLabels,
    VolumeRecord,
    is_written,
    write_index,
    write_labelled_volume,
    write_volume,
)
from hpc_neuro.data.untraced import UntracedNeurites
from hpc_neuro.prepare.check import (
    OpenedPair,
    PairMeasurement,
    UnusableImageError,
    make_record,
    measure_pair,
    open_pair,
)
from hpc_neuro.prepare.config import DISTANCE_CAP, PrepareConfig
from hpc_neuro.prepare.pairs import ImagePair, find_pairs
from hpc_neuro.prepare.picture import draw_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _SavedMeasurement:
    """What a share keeps of a pair for the run that gathers the shares; see PairMeasurement."""

    digest: str
    low: float
    high: float
    fit: Fit | None
    remarks: tuple[str, ...]


def forecast(cfg: PrepareConfig) -> list[str]:
    """Check every pair down to its voxels; -> lines with volumes, voxels, bytes and splits. Raises like `run`."""
    # A forecast reads every voxel once: a bad volume is found before the run.
    pairs = _open_pairs(cfg)
    measurements, failures = _measure_pairs(pairs, cfg)
    return [*_describe(pairs, measurements, cfg), *(f"left out: {line}" for line in failures.values())]


def run(cfg: PrepareConfig) -> int:
    """Write the store. All pairs are checked before anything is written; finished volumes are skipped.

    Returns 0, or 3 when images without contrast or with voxels that cannot be read were left out.
    Raises InputError for unusable data or a full disk, ConfigError when `out` belongs to another config.
    """
    pairs = _open_pairs(cfg)
    folder = run_folder.share_folder(cfg.out, cfg.share)

    # An earlier start measured the same inputs, or run_folder.start refuses this one.
    was_started = (folder / run_folder.RECORD).exists()
    measurements, unusable = ({}, {}) if was_started else _measure_pairs(pairs, cfg)

    # A share writes no index and no pictures, so its record alone says that it is done.
    paths = _output_paths(cfg.out, [opened.id for opened in pairs])
    is_whole = cfg.share is not None or all(path.exists() for path in paths)
    sources = {f"{p.id}.{kind}": path for p in pairs for kind, path in (("image", p.pair.image), p.pair.truth)}
    inputs = _list_inputs(pairs, cfg)
    with run_folder.start("prepare", cfg, folder, inputs=inputs, whole=is_whole, sources=sources) as record:
        if record.complete:
            return 0

        # A resumed run has logged these lines at its first start.
        if measurements:
            for line in _describe(pairs, measurements, cfg):
                log.info("%s", line)

        for name in record.damaged:
            (cfg.out / name).unlink(missing_ok=True)
        usable = [opened for opened in pairs if opened.id not in unusable]
        volumes, later_failures = _write_volumes(usable, measurements, cfg)
        failures = [*unusable.values(), *later_failures]
        if cfg.share is None:
            # The index comes last: a store without it is not complete.
            write_index(cfg.out, [volume for volume, _ in volumes])
            _draw_pictures(cfg.out, volumes)

        voxels = sum(int(np.prod(volume.shape)) for volume, _ in volumes)
        advice = "; once all shares are done, the same command without share writes the index" if cfg.share else ""
        count = files.format_count(len(volumes), "volume")
        log.info("wrote %s, %d million voxels, to %s%s", count, voxels // 1_000_000, cfg.out, advice)
        for line in failures:
            log.error("left out: %s", line)
        index, *large = _output_paths(cfg.out, [volume.id for volume, _ in volumes])
        outputs, large_outputs = ([], []) if cfg.share else ([index], large)
        record.finish({"volumes": len(volumes), "voxels": voxels}, failures, outputs, large_outputs)
    return EXIT_FAILURES if failures else EXIT_DONE


def _open_pairs(cfg: PrepareConfig) -> list[OpenedPair]:
    """Open this share's pairs, and check what needs no voxels: files, names, splits, space."""
    # All pairs, also in a share, so that every share sees the same faults.
    pairs = find_pairs(cfg)
    _require_separate_output(cfg.out, pairs)
    opened_pairs = [open_pair(pair, cfg) for pair in run_folder.take_share(pairs, cfg.share)]
    _require_one_split_per_image(opened_pairs)

    # Volumes that are already written need no space.
    needed = 0
    for opened in opened_pairs:
        if not is_written(_volume_path(cfg.out, opened.id), opened.digest):
            needed += opened.forecast_bytes()
    files.require_space(cfg.out, needed, "the store")
    return opened_pairs


def _require_separate_output(out: Path, pairs: list[ImagePair]) -> None:
    """Raise InputError where the store would be written over an image or a tree."""
    # An image in HDF5 may have the very name of the volume's file.
    outputs = {_volume_path(out, pair.id).resolve() for pair in pairs} | {(out / INDEX).resolve()}
    for pair in pairs:
        for path in (pair.image, pair.truth[1]):
            if path.resolve() in outputs:
                raise InputError(f"{path} would be replaced by the store's file of that name; choose another `out`")


def _require_one_split_per_image(pairs: list[OpenedPair]) -> None:
    """Raise InputError where one image is in two splits: a model would be tested on what it was trained on."""
    first: dict[tuple[str, int | None], OpenedPair] = {}
    for opened in pairs:
        # Copies under another id are recognized by their content.
        other = first.setdefault((opened.sources["image"], opened.pair.channel), opened)
        if other.pair.split != opened.pair.split:
            raise InputError(
                f"{other.id} ({other.pair.split}) and {opened.id} ({opened.pair.split}) are the same image; put "
                "both into one split (a manifest's `neuron` does so), or leave one out"
            )


def _measure_pairs(pairs: list[OpenedPair], cfg: PrepareConfig) -> tuple[dict[str, PairMeasurement], dict[str, str]]:
    """Measurements by id, and by id a sentence on each image that cannot be used. InputError where none can."""
    measurements: dict[str, PairMeasurement] = {}
    failures: dict[str, str] = {}
    for opened in pairs:
        try:
            measurements[opened.id] = _measure_or_read(opened, cfg)
        except UnusableImageError as error:
            failures[opened.id] = str(error)

    if failures and not measurements:
        raise InputError("\n".join(failures.values()))
    return measurements, failures


def _measure_or_read(opened: OpenedPair, cfg: PrepareConfig) -> PairMeasurement:
    """Measure a pair, unless a share of this run has done so."""
    # A measurement that cannot be read, of another image, or of other settings, is not used.
    with contextlib.suppress(InputError):
        saved = files.read_json(_measurement_path(cfg.out, opened.id), "", _SavedMeasurement)
        is_misaligned = saved.fit is not None and saved.fit.is_misaligned
        if saved.digest == opened.digest and not (is_misaligned and cfg.misaligned == "error"):
            return PairMeasurement(saved.low, saved.high, saved.fit, saved.remarks)
    return measure_pair(opened, cfg.misaligned, cfg.range)


def _write_volumes(
    pairs: list[OpenedPair], measurements: dict[str, PairMeasurement], cfg: PrepareConfig
) -> tuple[list[tuple[VolumeRecord, PairMeasurement]], list[str]]:
    """Write the file of each volume, and in a share its measurement, which the gathering run reads.

    Returns the volumes, and a sentence on each image that cannot be used.
    """
    volumes, failures = [], []
    for opened in until_stopped(run_folder.track_progress(pairs, "prepare", unit="volume")):
        try:
            measurement = measurements.get(opened.id) or _measure_or_read(opened, cfg)
        except UnusableImageError as error:
            failures.append(str(error))
            continue
        if cfg.share is not None:
            body = {"digest": opened.digest, **asdict(measurement)}
            files.write_json(_measurement_path(cfg.out, opened.id), body)

        volume = make_record(opened, measurement, cfg.contrast)
        _write_volume(_volume_path(cfg.out, volume.id), opened, volume, cfg)
        volumes.append((volume, measurement))
    return volumes, failures


def _write_volume(path: Path, opened: OpenedPair, volume: VolumeRecord, cfg: PrepareConfig) -> None:
    """Fit the radii, find what lies before the root, and write the volume's file, unless it is already written."""
    if is_written(path, volume.digest):
        log.info("%s: already written", volume.id)
        return

    # A large volume takes long; its file appears whole or not at all.
    read = stop_on_request(opened.image.__getitem__)
    if opened.labels is not None:
        labels = StoredLabels(stop_on_request(opened.labels.read_mask), stop_on_request(opened.labels.read_skeleton))
        write_labelled_volume(path, volume, read, labels, limits=cfg.range, confirm=opened.require_unchanged)
        log.info("%s: written, %s", volume.id, files.format_bytes(path.stat().st_size))
        return
    fitted = fit_radii(opened.tree, cfg.radius, read, volume.shape, volume.voxel_size)

    # The fitted tree has the radii that tell the axon from the tree's own halo.
    axon = None
    if cfg.beyond_root == "unlabelled":
        axon = find_proximal_axon(fitted.tree, fitted.stretch, read, volume.shape, volume.voxel_size)

    regions: list[VoxelRegion | UntracedNeurites] = [axon] if axon else []
    if cfg.off_tree == "unlabelled":
        regions.append(UntracedNeurites(fitted.tree, fitted.stretch, read, volume.shape, volume.voxel_size))

    settings = DrawSettings(cfg.tube, DISTANCE_CAP, cfg.ignore_margin, fitted.stretch)
    write_volume(
        path,
        volume,
        read,
        opened.tree,
        fitted.tree,
        settings,
        functools.partial(_mask_regions, regions) if regions else None,
        limits=cfg.range,
        confirm=opened.require_unchanged,
    )

    if axon:
        log.info("%s: a neurite before the root, %d voxels, is marked unlabelled", volume.id, int(axon.inside.sum()))
    log.info(
        "%s: written, %s; median radius %.2f fine voxels (%.2f to %.2f), %.2f times that along the coarsest axis",
        volume.id,
        files.format_bytes(path.stat().st_size),
        *np.percentile(fitted.tree.radii, [50, 5, 95]),
        fitted.stretch,
    )


def _mask_regions(regions: list[VoxelRegion | UntracedNeurites], box: Box) -> NDArray[np.bool_]:
    """[Z, Y, X] which voxels of a box lie in any of the regions."""
    mask = np.zeros(box.shape, dtype=bool)
    for region in regions:
        mask |= region.mask_in(box)
    return mask


def _draw_pictures(out: Path, volumes: list[tuple[VolumeRecord, PairMeasurement]]) -> None:
    # Drawn from the store, the pictures show what training will read.
    store = Store(out)
    for volume, measurement in until_stopped(volumes):
        path = _picture_path(out, volume.id)
        if path.exists():
            continue
        shape = " x ".join(map(str, volume.shape))
        legend = "cyan: neurite, yellow: unlabelled"
        if measurement.fit is not None:
            legend = (
                "red: the tree, circle: its root, cyan: the mask, yellow: unlabelled; "
                f"mean intensity percentile along the tree {100 * measurement.fit.score:.1f}"
            )
        title = (
            f"{volume.id} ({volume.split}): {shape} voxels of {_format_size(volume.voxel_size)} um (z y x), "
            f"{volume.dtype}\n{legend}"
        )
        draw_picture(store[volume.id], path, title)
    store.close()


def _list_inputs(pairs: list[OpenedPair], cfg: PrepareConfig) -> dict[str, Path | str]:
    """Digests by name. `pairs` covers what meta.json or the manifest adds; each share has its own."""
    inputs: dict[str, Path | str] = {}
    for opened in pairs:
        for kind, digest in opened.sources.items():
            inputs[f"{opened.id}.{kind}"] = digest

    # The split is not part of a volume's digest: it does not change the volume's file.
    described = [[opened.id, opened.pair.split, opened.digest] for opened in pairs]
    inputs[run_folder.input_name("pairs", cfg.share)] = files.sha256_json(described)
    return inputs


def _describe(pairs: list[OpenedPair], measurements: dict[str, PairMeasurement], cfg: PrepareConfig) -> list[str]:
    """The forecast in lines for people, for the pairs that were measured."""
    pairs = [opened for opened in pairs if opened.id in measurements]
    voxels = sum(int(np.prod(opened.image.shape, dtype=np.int64)) for opened in pairs)
    needed = files.format_bytes(sum(opened.forecast_bytes() for opened in pairs))
    lines = [f"{files.format_count(len(pairs), 'volume')}, {voxels:,} voxels, at most about {needed} in {cfg.out}"]

    for split in SPLITS:
        ids = [opened.id for opened in pairs if opened.pair.split == split]
        lines.append(f"{split}: {len(ids)} ({', '.join(ids)})" if ids else f"{split}: none")

    for opened in pairs:
        measurement = measurements[opened.id]
        z, y, x = opened.image.shape
        fit = measurement.fit
        line = (
            f"{opened.id}: {z} x {y} x {x} of {_format_size(opened.size)} um, {opened.image.dtype}, range "
            f"{measurement.low:g} to {measurement.high:g}"
        )
        if fit is not None:
            line += (
                f", {len(opened.tree)} nodes, percentile along the tree {100 * fit.score:.1f} (best other "
                f"{100 * fit.best_score:.1f}: {fit.best_change})"
            )
        lines.append(line)
        lines += [*opened.remarks, *measurement.remarks]

    settings = schema.to_plain(cfg.radius)
    lines.append(
        "radius: " + ", ".join([settings.pop("kind"), *(f"{key} {value:g}" for key, value in settings.items())])
    )
    return lines


def _format_size(size: tuple[float, float, float]) -> str:
    return " x ".join(f"{v:.4g}" for v in size)


def _volume_path(out: Path, id_: str) -> Path:
    return out / f"{id_}.h5"


def _picture_path(out: Path, id_: str) -> Path:
    return out / "pictures" / f"{id_}.png"


def _measurement_path(out: Path, id_: str) -> Path:
    return out / "measured" / f"{id_}.json"


def _output_paths(out: Path, ids: list[str]) -> list[Path]:
    return [out / INDEX, *(_volume_path(out, id_) for id_ in ids), *(_picture_path(out, id_) for id_ in ids)]
