"""Fitting `pca` and `int8` on a sample of slices, and picking such samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch

from hpc_neuro.core import files
from hpc_neuro.data import feature_cache as cache
from hpc_neuro.data.feature_cache import encoding
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import Teacher
from hpc_neuro.precompute.build import look
from hpc_neuro.precompute.config import PrecomputeConfig
from hpc_neuro.precompute.slices import Job, jobs, pixels

log = logging.getLogger(__name__)
_TOKENS = 16384  # per view, at most
_QUALITY = "coding.json"


def sampled(
    cfg: PrecomputeConfig, units: Sequence[cache.Unit], patch: int, count: int, seed: int = 0
) -> list[tuple[cache.Unit, Job]]:
    """At most `count` slices, spread evenly over `units`, one tile of each: the same for the same seed."""
    draw = np.random.default_rng(seed)
    ends = np.cumsum([u.count for u in units])
    places = (np.arange(count) + draw.random(count)) * ends[-1] / count
    picked = []
    for place in np.unique(places.astype(np.int64)):
        which = int(np.searchsorted(ends, place, side="right"))
        number = int(place - (ends[which] - units[which].count))
        tiles = [j for j in jobs(cfg, units[which], patch, 1) if j.slices.start == number]
        picked.append((units[which], tiles[int(draw.integers(len(tiles)))]))
    return picked


def fitted(
    cfg: PrecomputeConfig, store: Store, teacher: Teacher, units: Sequence[cache.Unit]
) -> dict[str, cache.Coding]:
    """Fit the codings and write them to `out`, with what they lose, which is said."""
    layers = [n % teacher.depth for n in cfg.layers]
    found: dict[str, cache.Coding] = {}
    quality: dict[str, dict[str, list[float]]] = {}
    for view in cfg.views:
        mine = sorted((u for u in units if u.view == view), key=lambda u: u.name)
        halves: list[list[torch.Tensor]] = [[], []]
        picked = sampled(cfg, mine, teacher.patch, cfg.sample)
        draw = np.random.default_rng(0)
        for i, (unit, job) in enumerate(picked):
            values = look(teacher, pixels(store[unit.volume], unit, job), layers, unit.how)()[0]  # [L, h, w, D]
            tokens = torch.from_numpy(values[:, job.inner_rows, job.inner_columns]).flatten(1, 2)  # [L, M, D]
            some = draw.permutation(tokens.shape[1])[: math.ceil(_TOKENS / len(picked))]
            halves[i % 2].append(tokens[:, some])
        seen = torch.cat(halves[0], 1)
        unseen = torch.cat(halves[1] or halves[0], 1)
        found[view], quality[view] = encoding.fit(seen, unseen, cfg.pca, cfg.dtype == "int8")
    for line in said(quality):
        log.info(line)
    encoding.save(cfg.out / cache.CODING, found)
    digest = files.sha256(cfg.out / cache.CODING)
    files.write_json(cfg.out / _QUALITY, {"recipe": recipe(cfg, store, teacher), "sha256": digest, "quality": quality})
    return found


def said(quality: dict[str, dict[str, list[float]]]) -> list[str]:
    """What the coding keeps, in lines for people."""
    return [
        f"view {view}: explained variance {' '.join(f'{v:.4f}' for v in q['explained_variance'])}, cosine "
        f"{' '.join(f'{v:.4f}' for v in q['cosine'])}, relative error "
        f"{' '.join(f'{v:.4f}' for v in q['relative_error'])} (per layer, on slices it was not fitted on)"
        for view, q in quality.items()
    ]


def recipe(cfg: PrecomputeConfig, store: Store, teacher: Teacher) -> str:
    """What the fit depends on, hashed."""
    volumes = {v: store[v].digest for split in cfg.splits for v in store.split(split)}
    knobs = [cfg.pca, cfg.dtype, cfg.sample, cfg.layers, cfg.views, cfg.augment_views, cfg.stride_v, cfg.scale]
    facts = [teacher.identity, volumes, knobs, cfg.isotropic, cfg.tile, cfg.halo, cfg.slab]
    return files.sha256_json(facts)


def existing(cfg: PrecomputeConfig, store: Store, teacher: Teacher) -> tuple[str, dict[str, dict[str, list[float]]]]:
    """(digest, quality) of the coding that `out` holds; ("", {}) when there is none of this recipe."""
    note, path = cfg.out / _QUALITY, cfg.out / cache.CODING
    if not cfg.coded or not note.exists() or not path.exists():
        return "", {}
    held = files.read_json(note, f"remove {note}")
    if held["recipe"] != recipe(cfg, store, teacher) or held["sha256"] != files.sha256(path):
        return "", {}
    return str(held["sha256"]), held["quality"]
