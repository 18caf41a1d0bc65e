"""The metrics: one row each, with the definition that is printed under the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpc_neuro.evaluate.config import EvaluateConfig


@dataclass(frozen=True)
class Metric:
    """One number per volume and method."""

    key: str
    title: str
    better: Literal["high", "low", ""]  # "": neither, it is compared with gold
    digits: int
    definition: str
    main: bool = False  # in the report's first table

    def best(self, values: Sequence[float]) -> float | None:
        """The best of several values; None where none is better than another."""
        if not self.better or len(set(values)) < 2:
            return None
        return max(values) if self.better == "high" else min(values)


METRICS = (
    Metric(
        "dice",
        "Dice",
        "high",
        3,
        "Foreground Dice, 2|P∩G| / (|P|+|G|), over labelled voxels; background is never averaged in.",
        main=True,
    ),
    Metric(
        "cldice",
        "clDice",
        "high",
        3,
        "Centreline Dice (Shit et al. 2021): harmonic mean of the share of the predicted skeleton inside the gold mask "
        "and of the gold skeleton inside the predicted mask; skeletons by thinning (Lee et al. 1994), of which every "
        "connected part keeps a line.",
        main=True,
    ),
    Metric(
        "hd95_um",
        "HD95 [µm]",
        "low",
        2,
        "95 % Hausdorff distance, the larger of the two directed 95th percentiles between surface voxels "
        "(6-neighbourhood), as MONAI computes it; anisotropic, in micrometres. One empty mask: the volume's diagonal.",
        main=True,
    ),
    Metric(
        "hd95_pooled_um",
        "HD95 pooled [µm]",
        "low",
        2,
        "95th percentile of the surface distances of both directions in one set, as medpy computes it.",
    ),
    Metric("assd_um", "ASSD [µm]", "low", 2, "Average symmetric surface distance: mean of the two directed means."),
    Metric("voxel_precision", "Voxel precision", "high", 3, "Share of the predicted voxels that are gold."),
    Metric("voxel_recall", "Voxel recall", "high", 3, "Share of the gold voxels that are predicted."),
    Metric("mask_missed", "Mask missed", "low", 0, "1 where exactly one of the two masks is empty."),
    Metric(
        "precision_{tol}",
        "Precision @ {tolerance}",
        "high",
        3,
        "Share of the traced cable within {tolerance} of the gold tree (nearest segment, pieces of at most 1 {unit}).",
        main=True,
    ),
    Metric(
        "recall_{tol}",
        "Recall @ {tolerance}",
        "high",
        3,
        "Share of the gold cable within {tolerance} of the traced tree.",
        main=True,
    ),
    Metric(
        "f1_{tol}",
        "F1 @ {tolerance}",
        "high",
        3,
        "Harmonic mean of the two. Everything that was traced counts, also a neurite before the gold root.",
        main=True,
    ),
    Metric(
        "precision_{tol}_no_stub",
        "Precision, no stub",
        "high",
        3,
        "The same without the longest traced arm that leaves the root and nowhere meets the gold tree: gold trees "
        "often begin part way along a neurite that the image shows further back.",
    ),
    Metric("f1_{tol}_no_stub", "F1, no stub", "high", 3, "F1 with that precision; recall does not change."),
    Metric(
        "esa",
        "ESA [voxel]",
        "low",
        2,
        "Entire structure average, by the rule of Vaa3D's neuron_distance (Peng et al. 2010): mean distance from "
        "samples about one voxel apart to the nearest segment of the other tree, mean of both directions. No tree: the "
        "volume's diagonal.",
        main=True,
    ),
    Metric(
        "dsa",
        "DSA [voxel]",
        "low",
        2,
        "Different structure average: the same over samples at least 2 voxels away; 0 when there are none.",
    ),
    Metric(
        "pds", "PDS", "low", 3, "Share of different structure: of samples at least 2 voxels away, mean of both ways."
    ),
    Metric("esa_no_stub", "ESA, no stub [voxel]", "low", 2, "ESA without the arm before the root."),
    Metric("dsa_no_stub", "DSA, no stub [voxel]", "low", 2, "DSA without the arm before the root."),
    Metric("pds_no_stub", "PDS, no stub", "low", 3, "PDS without the arm before the root."),
    Metric("tree_missed", "Tree missed", "low", 0, "1 where nothing was traced."),
    Metric("length_um", "Cable [µm]", "", 0, "Cable length: sum of the edges' lengths.", main=True),
    Metric("tips", "Tips", "", 0, "End points: nodes without children.", main=True),
    Metric(
        "branch_points",
        "Branch points",
        "",
        0,
        "Nodes with two or more children (a root: three or more).",
        main=True,
    ),
    Metric(
        "splits",
        "Splits",
        "low",
        0,
        "Joins that are missing: connected pieces in which the gold tree is found, less one. Pieces up to twice the "
        "tolerance do not count, nor does a detour within twice the tolerance.",
    ),
    Metric("merges", "Merges", "low", 0, "Joins too many: the same with the roles of the two trees changed."),
    Metric(
        "expected_run_length_um",
        "Expected run length [µm]",
        "high",
        0,
        "Expected length of correctly connected cable around a random point of the gold tree (Januszewski et al. "
        "2018): sum of squared lengths of the pieces over the gold cable.",
    ),
)

GOLD_KEYS = ("length_um", "tips", "branch_points")
"""What a tree has by itself, and so gold too."""


def rows(cfg: EvaluateConfig) -> list[Metric]:
    """All metrics of a run, with its tolerances in keys and texts."""
    found = [_filled(m, cfg.tolerance_vox, "voxel", "vox") for m in METRICS]
    if cfg.tolerance_um is not None:
        base = [m for m in METRICS if "{tol}" in m.key and not m.key.endswith("no_stub")]
        found += [_filled(m, cfg.tolerance_um, "µm", "um", main=False) for m in base]
    return found


def _filled(metric: Metric, tolerance: float, unit: str, short: str, main: bool = True) -> Metric:
    words = {"tol": f"{tolerance:g}{short}", "tolerance": f"{tolerance:g} {unit}", "unit": unit}
    if unit == "voxel" and tolerance != 1:
        words["tolerance"] += "s"
    return Metric(
        metric.key.format(**words),
        metric.title.format(**words),
        metric.better,
        metric.digits,
        metric.definition.format(**words),
        metric.main and main,
    )
