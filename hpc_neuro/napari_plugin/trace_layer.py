"""`trace` on an image layer; napari makes a form of the arguments of the function."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpc_neuro.core.geometry import Point, VoxelSize
from hpc_neuro.core.image_settings import require_voxel_size
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.intensity import open_array
from hpc_neuro.napari_plugin.layers import LayerData, build_trees_layer
from hpc_neuro.trace_stacks.tracer import trace_image

if TYPE_CHECKING:
    import napari.layers
    import napari.types


def trace_layer(
    image: napari.layers.Image, roots: napari.layers.Points | None = None, search_somas: bool = True
) -> list[napari.types.LayerDataTuple]:
    """Trace an image layer [Z, Y, X] as `hpc-neuro trace` does, and show the trees.

    The scale of the layer is taken for its voxel size in um. `roots`: a layer with a point where each neuron begins.
    The window waits until the trees are there. Raises InputError, which napari shows, for what cannot be traced.
    """
    # Of a pyramid, the finest level.
    data = image.data[0] if image.multiscale else image.data
    if data.ndim != 3 or getattr(image, "rgb", False):
        raise InputError(
            f"the layer {image.name} has the shape {data.shape}; a stack z, y, x without color is expected"
        )

    voxels = np.asarray(data)
    read = open_array(voxels, f"the layer {image.name}")
    z, y, x = voxels.shape
    dz, dy, dx = (float(edge) for edge in image.scale)
    size: VoxelSize = (dz, dy, dx)
    require_voxel_size(size, f"the scale of the layer {image.name}:")
    result = trace_image(
        read,
        (z, y, x),
        size,
        roots=() if roots is None else _list_roots(roots, image),
        search_somas=search_somas,
    )
    if not result.trees:
        raise InputError(f"no tree was found in the layer {image.name}; look at its contrast")

    layer: LayerData = build_trees_layer(f"{image.name} trees", result.trees, size)
    # A layer that was moved keeps its trees over it.
    layer[1]["translate"] = tuple(float(offset) for offset in image.translate)
    return [layer]


def _list_roots(points: napari.layers.Points, image: napari.layers.Image) -> list[Point]:
    """[voxel] z y x of the points, which may have another scale than the image."""
    roots = []
    for point in points.data:
        if len(point) != 3:
            raise InputError(f"the layer {points.name} has points of {len(point)} axes; three, z y x, are expected")
        z, y, x = (float(value) for value in image.world_to_data(points.data_to_world(point)))
        roots.append((z, y, x))
    return roots
