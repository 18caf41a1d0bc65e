"""tracing/neurite_light.py: width without brightness, and brightness without width."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from hpc_neuro.tracing import TraceConfig
from hpc_neuro.tracing.graph import build_centerline_graph
from hpc_neuro.tracing.neurite_light import measure_neurite_light
from hpc_neuro.tracing.trace import find_lines
from tests.helpers.shapes import build_voxel_graph, paint_points, sample_line

SHAPE = (20, 120, 160)


def measure_two(radii: tuple[float, float], brightness: tuple[float, float]) -> list[tuple[float, float]]:
    """Width and glow of two neurites side by side."""
    image = np.zeros(SHAPE, np.float32)
    for y, radius, value in zip((30, 90), radii, brightness, strict=True):
        paint_points(image, sample_line((10, y, 6), (10, y, 150)), radius, value)
    image = gaussian_filter(image, 0.7) + 1.0
    graph = build_voxel_graph(image > 1.1, TraceConfig())
    assert graph is not None
    lines = find_lines(graph, [], TraceConfig(), None)
    centerlines = build_centerline_graph(graph, lines.centerlines, lines.bridges)
    section = np.zeros(len(centerlines), np.int64)
    light = measure_neurite_light(centerlines, graph, section, lambda box: image[box.slices])
    is_inner = np.abs(centerlines.points[:, 2] - 80) < 50
    sides = [is_inner & (np.abs(centerlines.points[:, 1] - y) < 8) for y in (30, 90)]
    return [(float(np.median(light.width[side])), float(np.median(light.glow[side]))) for side in sides]


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_a_dim_neurite_is_as_wide_as_a_bright_one(ratio: float) -> None:
    (bright, glow), (dim, dim_glow) = measure_two((1.5, 1.5), (1.0, ratio))
    assert dim == pytest.approx(bright, abs=0.1)
    assert dim_glow - glow == pytest.approx(np.log(ratio), abs=0.1)


def test_a_wide_neurite_is_wider_and_about_as_bright() -> None:
    (thin, glow), (wide, wide_glow) = measure_two((1.0, 2.2), (1.0, 1.0))
    assert wide - thin > 0.3
    assert wide_glow - glow == pytest.approx(0.0, abs=0.6)


def test_without_an_image_the_width_is_that_of_the_mask() -> None:
    image = np.zeros(SHAPE, np.float32)
    paint_points(image, sample_line((10, 60, 6), (10, 60, 150)), 2.0)
    graph = build_voxel_graph(image > 0, TraceConfig())
    assert graph is not None
    lines = find_lines(graph, [], TraceConfig(), None)
    centerlines = build_centerline_graph(graph, lines.centerlines, lines.bridges)
    light = measure_neurite_light(centerlines, graph, np.zeros(len(centerlines), np.int64), None)
    np.testing.assert_array_equal(light.width, np.log(centerlines.thickness))
    assert not light.is_measured
    assert not light.glow.any()
