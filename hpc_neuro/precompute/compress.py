"""Fit `pca` and `int8` on a sample of slices, and pick such samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.stop_signals import until_stopped
from hpc_neuro.data.feature_cache import CODING, FeatureCoding, ShardSpec
from hpc_neuro.data.feature_cache.encoding import LayerQuality, fit_coding, save_codings
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.build import run_teacher
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import TeacherBatch, iter_teacher_batches, read_pixels

log = logging.getLogger(__name__)

SAMPLE_SLICES = 48
"""Slices per view on which a coding is fitted."""

SAMPLE_TOKENS = 16384
"""Most tokens per view on which a coding is fitted."""

_QUALITY = "coding.json"

Quality = dict[str, LayerQuality]
"""Of the coding of each view."""


@dataclass(frozen=True)
class _Note:
    """What ties a coding to its recipe."""

    recipe: str
    sha256: str
    quality: Quality


def sample_slices(
    cfg: PrecomputeConfig, shards: Sequence[ShardSpec], patch: int, count: int, seed: int = 0
) -> list[tuple[ShardSpec, TeacherBatch]]:
    """Pick at most `count` slices, spread evenly over `shards`, one tile of each; the same ones for the same seed."""
    rng = np.random.default_rng(seed)

    # One random position in each of `count` equal parts of all slices.
    ends = np.cumsum([shard.count for shard in shards])
    positions = (np.arange(count) + rng.random(count)) * ends[-1] / count

    sample = []
    for position in np.unique(positions.astype(np.int64)):
        # The shard, and the slice in it, at this position.
        number = int(np.searchsorted(ends, position, side="right"))
        shard = shards[number]
        slice_number = int(position - (ends[number] - shard.count))
        tiles = [b for b in iter_teacher_batches(cfg, shard, patch, 1) if b.slices.start == slice_number]
        sample.append((shard, tiles[int(rng.integers(len(tiles)))]))
    return sample


def fit_codings(
    cfg: PrecomputeConfig, store: Store, teacher: Teacher, shards: Sequence[ShardSpec]
) -> dict[str, FeatureCoding]:
    """Fit the coding of each view, log what it loses, and write both to `out`."""
    codings: dict[str, FeatureCoding] = {}
    quality: Quality = {}
    for view in cfg.views:
        # The order decides which slices are drawn.
        view_shards = sorted((shard for shard in shards if shard.view == view), key=lambda shard: shard.name)
        seen, unseen = _sample_tokens(cfg, store, teacher, view_shards)
        codings[view], quality[view] = fit_coding(seen, unseen, cfg.pca, cfg.dtype == "int8")

    for line in describe_quality(quality):
        log.info(line)

    # The note ties the file to its recipe; a restart with the same recipe uses it.
    save_codings(cfg.out / CODING, codings)
    note = _Note(hash_recipe(cfg, store, teacher), files.sha256(cfg.out / CODING), quality)
    files.write_json(cfg.out / _QUALITY, asdict(note))
    return codings


def _sample_tokens(
    cfg: PrecomputeConfig, store: Store, teacher: Teacher, shards: Sequence[ShardSpec]
) -> tuple[Tensor, Tensor]:
    """Tokens [L, M, D] of every other slice of a sample, and of the slices between them."""
    layers = [n % teacher.depth for n in cfg.layers]
    sample = sample_slices(cfg, shards, teacher.patch, SAMPLE_SLICES)
    tokens_per_slice = math.ceil(SAMPLE_TOKENS / len(sample))
    rng = np.random.default_rng(0)

    even: list[Tensor] = []
    odd: list[Tensor] = []
    for i, (shard, batch) in enumerate(until_stopped(sample)):
        # The same way as in the build, so that the sample has the features that will be stored.
        pixels = read_pixels(store[shard.volume], shard, batch)
        features = run_teacher(teacher, pixels, layers, cfg.position_free, shard.layout)()[0]  # [L, h, w, D]
        tokens = torch.from_numpy(features[:, batch.inner_rows, batch.inner_columns]).flatten(1, 2)  # [L, M, D]
        picked = rng.permutation(tokens.shape[1])[:tokens_per_slice]
        (odd if i % 2 else even).append(tokens[:, picked])

    # A single slice has to serve both purposes.
    return torch.cat(even, 1), torch.cat(odd or even, 1)


def describe_quality(quality: Quality) -> list[str]:
    """What the coding keeps, in lines for people."""
    lines = []
    for view, measures in quality.items():
        variance, cosine, error = (
            " ".join(f"{value:.4f}" for value in values)
            for values in (measures["explained_variance"], measures["cosine"], measures["relative_error"])
        )
        lines.append(
            f"view {view}: explained variance {variance}, cosine {cosine}, relative error {error} (per layer, on "
            "slices it was not fitted on)"
        )
    return lines


def hash_recipe(cfg: PrecomputeConfig, store: Store, teacher: Teacher) -> str:
    """SHA-256 of everything that the fit depends on."""
    # The sample is drawn from all volumes of the splits, so each of them matters.
    volumes = {volume: store[volume].digest for split in cfg.splits for volume in store.split(split)}
    settings = [cfg.pca, cfg.dtype, SAMPLE_SLICES, cfg.layers, cfg.views, cfg.augment_views, cfg.stride_v, cfg.scale]
    return files.sha256_json([teacher.identity, volumes, settings, cfg.tile, cfg.halo, cfg.slab, cfg.position_free])


def read_coding_note(cfg: PrecomputeConfig, store: Store, teacher: Teacher) -> tuple[str, Quality]:
    """(digest, quality) of the coding in `out`; ("", {}) when there is none of this recipe."""
    note_path, path = cfg.out / _QUALITY, cfg.out / CODING
    if not cfg.is_compressed or not note_path.exists() or not path.exists():
        return "", {}

    # A note that cannot be read is not written: the coding is fitted again.
    try:
        note = files.read_json(note_path, "", _Note)
    except InputError as error:
        log.warning("%s", error)
        return "", {}
    if note.recipe != hash_recipe(cfg, store, teacher) or note.sha256 != files.sha256(path):
        return "", {}
    return note.sha256, note.quality
