"""The picture of one volume: image, probability, errors of the mask, gold tree, traced trees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import geometry
from hpc_neuro.core.geometry import Box, VoxelSize
from hpc_neuro.core.morphology import Tree, resample_tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.evaluate.predictions import VolumePrediction
from hpc_neuro.metrics.segments import SegmentIndex
from hpc_neuro.metrics.surface import Mask
from hpc_neuro.metrics.voxel import drop_unlabelled
from hpc_neuro.report.figures import (
    GOLD,
    MISSED,
    RIGHT,
    WRONG,
    Panel,
    Projections,
    TreeLines,
    draw_panels,
    project_maxima,
)

_BOTH, _ONLY_PREDICTED, _ONLY_GOLD = (0.78, 0.80, 0.83), (1.0, 0.42, 0.29), (1.0, 0.88, 0.40)
"""Red, green and blue of voxels of both masks, of the prediction only, of gold only."""
_DIM = 0.45
"""Brightness of the image under trees."""

CAPTION = (
    "Maximum projections along z (large), x (right) and y (below). In the mask panel gray is agreement, red is "
    "predicted only, yellow is gold only. On the trees blue is traced cable near gold, red is traced cable that is "
    "not, yellow is gold cable that was not found; the white ring is the given root."
)


def draw_picture(
    volume: StoredVolume, prediction: VolumePrediction, trees: dict[str, Tree], tolerance: float, title: str
) -> bytes:
    """A JPEG. `trees` are the traced trees (voxels) by the name of their method; `title` stands over the image."""
    # One pass over the volume serves all panels with the image.
    image = project_maxima(volume.normalized_image, volume.shape)
    probability = project_maxima(prediction.probability, volume.shape)
    gold, size = volume.tree(), volume.voxel_size
    root = None if volume.root is None else _to_um(volume.root, size)
    gold_lines = TreeLines(geometry.to_um(gold.points, size)[gold.edges], GOLD, "gold")

    panels = [
        Panel(title, gray=image),
        Panel("probability", gray=probability, gamma=1.0),
        Panel("mask against gold", rgb=_project_errors(volume, prediction.mask)),
    ]
    # A volume of labels has none.
    if volume.has_tree:
        panels.append(Panel("gold tree", gray=image, brightness=_DIM, lines=[gold_lines], root=root))

    # Compare every traced tree with gold in its own panel.
    for name, tree in trees.items():
        lines = _compare_trees(tree, gold, tolerance, size)
        panels.append(Panel(f"{name}: traced tree", gray=image, brightness=_DIM, lines=lines, root=root))

    return draw_panels(panels, volume.shape, size)


def _compare_trees(tree: Tree, gold: Tree, tolerance: float, voxel_size: VoxelSize) -> list[TreeLines]:
    """The cable of both trees (voxels) by agreement, as colored lines in um."""
    # Gold cable near the traced tree is already drawn as right, so only its missed part is added.
    right, wrong = _split_cable(tree, gold, tolerance, voxel_size)
    _, missed = _split_cable(gold, tree, tolerance, voxel_size)

    return [
        TreeLines(missed, MISSED, "missed"),
        TreeLines(right, RIGHT, "on gold"),
        TreeLines(wrong, WRONG, "not on gold"),
    ]


def _split_cable(
    tree: Tree, other: Tree, tolerance: float, voxel_size: VoxelSize
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pieces of at most a voxel of `tree` within `tolerance` of `other`, and the rest, [E, 2, 3] um."""
    # Pieces of a voxel are finer than a pixel of the picture.
    fine = resample_tree(tree, 1.0)
    ends = fine.points[fine.edges]
    is_near = SegmentIndex(other).query(ends.mean(axis=1)) <= tolerance
    um = ends * np.asarray(voxel_size)
    return um[is_near], um[~is_near]


def _project_errors(volume: StoredVolume, mask: Callable[[Box], Array]) -> tuple[Projections, Projections, Projections]:
    """The projected masks in red, green and blue; where several meet behind one another, agreement is in front."""

    def project(choose: Callable[[Mask, Mask], Mask]) -> Projections:
        return project_maxima(lambda box: choose(*drop_unlabelled(mask(box), volume.mask(box))), volume.shape)

    # Each kind is projected by itself: a maximum of colors would mix them.
    both = project(lambda p, g: p & g)
    only_predicted = project(lambda p, g: p & ~g)
    only_gold = project(lambda p, g: g & ~p)

    # Paint from the back to the front: gold, prediction, agreement.
    channels = []
    for back, middle, front in zip(_ONLY_GOLD, _ONLY_PREDICTED, _BOTH, strict=True):
        planes = []
        for axis in ("z", "y", "x"):
            plane = np.where(getattr(only_gold, axis) > 0, back, 0.0)
            plane = np.where(getattr(only_predicted, axis) > 0, middle, plane)
            planes.append(np.where(getattr(both, axis) > 0, front, plane).astype(np.float32))
        channels.append(Projections(*planes))

    red, green, blue = channels

    return red, green, blue


def _to_um(point: tuple[float, float, float], size: VoxelSize) -> tuple[float, float, float]:
    z, y, x = (float(p * s) for p, s in zip(point, size, strict=True))
    return z, y, x
