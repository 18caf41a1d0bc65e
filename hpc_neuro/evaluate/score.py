"""All metrics of one volume under one method."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from hpc_neuro.core import morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.evaluate.config import EvaluateConfig
from hpc_neuro.evaluate.metric_rows import key
from hpc_neuro.metrics import tree as tree_metrics
from hpc_neuro.metrics import voxel
from hpc_neuro.metrics.topology import topology


def score(volume: StoredVolume, mask: Callable[[Box], Array], tree: Tree, cfg: EvaluateConfig) -> dict[str, float]:
    """Every metric of `rows(cfg)`: `mask` (by box) against the store's mask, `tree` (voxels) against its gold tree."""
    return {**_mask_scores(volume, mask, cfg), **_tree_scores(volume, tree, cfg), **facts(tree, volume)}


def facts(tree: Tree, volume: StoredVolume) -> dict[str, float]:
    """What a tree in voxels has by itself: cable in um, tips, branch points."""
    found = tree_metrics.summary(morphology.scaled(tree, volume.voxel_size))
    return {"length_um": found["length"], "tips": found["tips"], "branch_points": found["branch_points"]}


def _mask_scores(volume: StoredVolume, mask: Callable[[Box], Array], cfg: EvaluateConfig) -> dict[str, float]:
    whole = Box.whole(volume.shape)
    if whole.size <= cfg.whole:
        predicted, gold = voxel.labelled(mask(whole), volume.mask(whole))
        counts = voxel.counts(predicted, gold)
        surface = voxel.surface_metrics(predicted, gold, volume.voxel_size)
        centre = voxel.cldice(predicted, gold)
    else:
        counts = voxel.counts_streamed(mask, volume.mask, volume.shape)
        surface = voxel.surface_metrics_streamed(mask, volume.mask, volume.shape, volume.voxel_size)
        centre = voxel.cldice_streamed(mask, volume.mask, volume.shape)
    return {
        "dice": counts.dice,
        "cldice": centre,
        "hd95_um": surface.hd95,
        "hd95_pooled_um": surface.hd95_pooled,
        "assd_um": surface.assd,
        "voxel_precision": counts.precision,
        "voxel_recall": counts.recall,
        "mask_missed": float(counts.missed),
    }


def _tree_scores(volume: StoredVolume, tree: Tree, cfg: EvaluateConfig) -> dict[str, float]:
    gold, tolerance = volume.tree(), cfg.tolerance_vox
    bare = tree_metrics.without_stub(tree, gold, tolerance, volume.root)
    match, match_bare = tree_metrics.match(tree, gold, tolerance), tree_metrics.match(bare, gold, tolerance)
    found = {
        key("precision", tolerance, "vox"): match.precision,
        key("recall", tolerance, "vox"): match.recall,
        key("f1", tolerance, "vox"): match.f1,
        key("precision", tolerance, "vox") + "_no_stub": match_bare.precision,
        key("f1", tolerance, "vox") + "_no_stub": match_bare.f1,
        **_finite(tree_metrics.distances(tree, gold), volume),
        **{f"{k}_no_stub": v for k, v in _finite(tree_metrics.distances(bare, gold), volume).items()},
        "tree_missed": float(not len(tree)),
    }
    connected = topology(tree, gold, tolerance, volume.voxel_size)
    found |= {
        "splits": connected.splits,
        "merges": connected.merges,
        "expected_run_length_um": connected.expected_run_length,
    }
    if cfg.tolerance_um is not None:
        scaled = [morphology.scaled(t, volume.voxel_size) for t in (tree, gold)]
        step = min(1.0, cfg.tolerance_um / 4)
        match = tree_metrics.match(scaled[0], scaled[1], cfg.tolerance_um, step)
        found |= {
            key("precision", cfg.tolerance_um, "um"): match.precision,
            key("recall", cfg.tolerance_um, "um"): match.recall,
            key("f1", cfg.tolerance_um, "um"): match.f1,
        }
    return found


def _finite(distances: dict[str, float], volume: StoredVolume) -> dict[str, float]:
    """Without a tree the distance is the diagonal of the volume in voxels, so that a miss stays in the mean."""
    diagonal = float(np.linalg.norm(volume.shape))
    return {k: v if math.isfinite(v) else diagonal for k, v in distances.items()}
