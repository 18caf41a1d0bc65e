"""The picture of one volume: image, probability, errors of the mask, gold tree, traced trees."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hpc_neuro.core import geometry, morphology
from hpc_neuro.core.geometry import Box, VoxelSize
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.types import Array
from hpc_neuro.data.store import StoredVolume
from hpc_neuro.evaluate.predictions import Prediction
from hpc_neuro.metrics.segments import Segments
from hpc_neuro.metrics.voxel import labelled
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

# Colours of the mask's errors: agreement, predicted only, gold only.
_BOTH, _ONLY_PREDICTED, _ONLY_GOLD = (0.78, 0.80, 0.83), (1.0, 0.42, 0.29), (1.0, 0.88, 0.40)
_DIM = 0.45  # brightness of the image under trees
CAPTION = (
    "Maximum projections along z (large), x (right) and y (below). In the mask panel grey is agreement, red is "
    "predicted only, yellow is gold only. On the trees blue is traced cable near gold, red is traced cable that is "
    "not, yellow is gold cable that was not found; the white ring is the given root."
)


def picture(
    volume: StoredVolume, prediction: Prediction, trees: dict[str, Tree], tolerance: float, title: str
) -> bytes:
    """A JPEG. `trees` are the traced trees (voxels) by the name of their method; `title` stands over the image."""
    image = project_maxima(volume.normalized_image, volume.shape)
    gold, size = volume.tree(), volume.voxel_size
    root = None if volume.root is None else _um(volume.root, size)
    panels = [
        Panel(title, gray=image),
        Panel("probability", gray=project_maxima(prediction.probability, volume.shape), gamma=1.0),
        Panel("mask against gold", rgb=_errors(volume, prediction.mask)),
        Panel(
            "gold tree", gray=image, brightness=_DIM, lines=[TreeLines(_segments(gold, size), GOLD, "gold")], root=root
        ),
        *(
            Panel(
                f"{name}: traced tree",
                gray=image,
                brightness=_DIM,
                lines=compared(tree, gold, tolerance, size),
                root=root,
            )
            for name, tree in trees.items()
        ),
    ]
    return draw_panels(panels, volume.shape, size)


def compared(tree: Tree, gold: Tree, tolerance: float, voxel_size: VoxelSize) -> list[TreeLines]:
    """The cable of both trees (voxels) by agreement, as coloured lines in um."""
    right, wrong = _split(tree, gold, tolerance, voxel_size)
    _, missed = _split(gold, tree, tolerance, voxel_size)
    return [
        TreeLines(missed, MISSED, "missed"),
        TreeLines(right, RIGHT, "on gold"),
        TreeLines(wrong, WRONG, "not on gold"),
    ]


def _split(
    tree: Tree, other: Tree, tolerance: float, voxel_size: VoxelSize
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pieces of at most a voxel of `tree` within `tolerance` of `other`, and the rest, [E, 2, 3] um."""
    fine = morphology.resample_tree(tree, 1.0)
    ends = fine.points[fine.edges]
    near = Segments(other).distance(ends.mean(axis=1)) <= tolerance
    um = ends * np.asarray(voxel_size)
    return um[near], um[~near]


def _segments(tree: Tree, voxel_size: VoxelSize) -> NDArray[np.float64]:
    return geometry.to_um(tree.points, voxel_size)[tree.edges]


def _errors(volume: StoredVolume, mask: Callable[[Box], Array]) -> tuple[Projections, Projections, Projections]:
    """The projected masks in red, green and blue; where several meet behind one another, agreement is in front."""

    def part(choose: Callable[[NDArray[np.bool_], NDArray[np.bool_]], NDArray[np.bool_]]) -> Projections:
        def read(box: Box) -> Array:
            return choose(*labelled(mask(box), volume.mask(box)))

        return project_maxima(read, volume.shape)

    both, predicted, gold = part(lambda p, g: p & g), part(lambda p, g: p & ~g), part(lambda p, g: g & ~p)

    def channel(c: int) -> Projections:
        planes = []
        for name in ("z", "y", "x"):
            front, middle, back = (getattr(v, name) > 0 for v in (both, predicted, gold))
            colour = np.where(middle, _ONLY_PREDICTED[c], np.where(back, _ONLY_GOLD[c], 0.0))
            planes.append(np.where(front, _BOTH[c], colour).astype(np.float32))
        return Projections(*planes)

    return channel(0), channel(1), channel(2)


def _um(point: tuple[float, float, float], size: VoxelSize) -> tuple[float, float, float]:
    z, y, x = (float(p * s) for p, s in zip(point, size, strict=True))
    return z, y, x
