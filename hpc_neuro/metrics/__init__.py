"""How well masks and trees agree with the gold standard, by named definitions.

To add a metric: write one file here with the function and its row (a `Metric`) together, and name it in `list_metrics`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_neuro.core.constants import TOLERANCE_VOX

if TYPE_CHECKING:
    from hpc_neuro.metrics.metric import Metric


def list_metrics(tolerance_vox: float = TOLERANCE_VOX, tolerance_um: float | None = None) -> list[Metric]:
    """List all metrics in the order of the tables; those at `tolerance_um` come last, if there is one."""
    # Imported here, so that code which needs only a bootstrap interval does not wait for SciPy and scikit-image.
    from hpc_neuro.metrics import cable, centerline, topology, tree, voxel
    from hpc_neuro.metrics.metric import Tolerance

    metrics = [
        voxel.DICE,
        centerline.CLDICE,
        *voxel.SURFACE_METRICS,
        *voxel.OVERLAP_METRICS,
        *cable.list_metrics_at(Tolerance(tolerance_vox, "vox")),
        *tree.METRICS,
        *topology.METRICS,
    ]
    if tolerance_um is not None:
        metrics += cable.list_metrics_at(Tolerance(tolerance_um, "um"))

    return metrics


def list_voxel_metrics() -> list[Metric]:
    """List the metrics that compare labelled voxels one by one, which labels of a few slices allow."""
    from hpc_neuro.metrics import voxel

    return [voxel.DICE, *voxel.OVERLAP_METRICS]
