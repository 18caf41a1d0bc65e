"""Radii of traced tubes are physical, whatever the voxels and the metric."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from hpc_neuro.core.geometry import VoxelSize, fine_voxel
from hpc_neuro.core.morphology import scale_tree
from hpc_neuro.data import swc
from hpc_neuro.tracing import TraceConfig, trace

RADIUS = 3.0
LENGTH = 24.0
SIZES = [
    (1.0, 1.0, 1.0),
    (0.33, 0.33, 0.33),
    (1.0, 0.33, 0.33),
    (2.0, 0.5, 0.5),
    (0.2, 0.5, 0.5),
    (0.5, 0.25, 0.5),
    (0.5, 1.0, 0.5),
    (0.5, 0.5, 0.25),
    (1.0, 0.5, 0.7),
]


def paint_tube(size: VoxelSize, axis: int) -> NDArray[np.bool_]:
    """A tube of 3 um radius along an axis, with an empty border of 3 um, in voxels of `size` um."""
    edges = [2 * (RADIUS + 3.0)] * 3
    edges[axis] = LENGTH + 6.0
    shape = [2 * round(edge / s / 2) + 1 for edge, s in zip(edges, size, strict=True)]
    um = np.meshgrid(*((np.arange(n) - n // 2) * s for n, s in zip(shape, size, strict=True)), indexing="ij")
    across = sum(um[other] ** 2 for other in range(3) if other != axis)
    return np.asarray((across <= RADIUS**2) & (np.abs(um[axis]) <= LENGTH / 2))


@pytest.mark.parametrize("metric", ["voxel", "um"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_a_tube_has_its_radius_in_micrometres(
    size: VoxelSize, axis: int, metric: Literal["voxel", "um"], tmp_path: Path
) -> None:
    (tree,) = trace(paint_tube(size, axis), size, cfg=TraceConfig(metric=metric, min_cable=10.0))
    inner = np.abs(tree.points[:, axis] - np.median(tree.points[:, axis])) * size[axis] < LENGTH / 2 - 2 * RADIUS
    assert np.median(tree.radii[inner]) * fine_voxel(size) == pytest.approx(RADIUS, rel=0.1)

    swc.write(tmp_path / "tube.swc", scale_tree(tree, size), unit="um", voxel_size=size)
    written = swc.read(tmp_path / "tube.swc")
    assert np.median(written.radii[inner]) == pytest.approx(RADIUS, rel=0.1)
    extent = np.ptp(written.points[:, axis])
    assert LENGTH - 2 * RADIUS < extent < LENGTH + RADIUS


@pytest.mark.parametrize("size", SIZES)
def test_the_unit_of_radii_does_not_depend_on_the_order_of_axes(size: VoxelSize) -> None:
    assert fine_voxel(size) == fine_voxel(size[::-1]) == sorted(size)[1]


@pytest.mark.parametrize("size", [(1.0, 0.33, 0.33), (0.2, 0.5, 0.5)])
def test_a_thin_branch_does_not_get_the_radius_of_its_thick_trunk(size: VoxelSize) -> None:
    """The middle of a neurite is looked for across it, not along it."""
    shape = [round(edge / s) for edge, s in zip((14.0, 20.0, 30.0), size, strict=True)]
    z, y, x = np.meshgrid(*(np.arange(n) * s for n, s in zip(shape, size, strict=True)), indexing="ij")
    trunk = ((z - 7) ** 2 + (y - 5) ** 2 <= 3.0**2) & (x > 2) & (x < 28)
    branch = ((z - 7) ** 2 + (x - 15) ** 2 <= 1.2**2) & (y > 5) & (y < 19)
    root = (7 / size[0], 5 / size[1], 4 / size[2])
    (tree,) = trace(trunk | branch, size, roots=[root])
    um = tree.points * size
    on_branch, on_trunk = um[:, 1] > 10, np.abs(um[:, 2] - 15) > 5
    assert on_branch.sum() > 3
    assert np.median(tree.radii[on_branch]) * fine_voxel(size) == pytest.approx(1.2, abs=0.3)
    assert np.median(tree.radii[on_trunk]) * fine_voxel(size) == pytest.approx(3.0, rel=0.1)
