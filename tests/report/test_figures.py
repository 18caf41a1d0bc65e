"""Projections and panels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from hpc_neuro.core.geometry import Box
from hpc_neuro.report import figures
from hpc_neuro.report.figures import Panel, TreeLines, draw_panels, project_maxima


def test_projections_are_maxima_whatever_the_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = np.random.default_rng(0).random((7, 9, 11)).astype(np.float32)
    monkeypatch.setattr(figures, "_SLAB", 200)
    views = project_maxima(lambda box: volume[box.slices], volume.shape)
    for view, axis in ((views.z, 0), (views.y, 1), (views.x, 2)):
        np.testing.assert_array_equal(view, volume.max(axis=axis))


def test_large_planes_keep_single_bright_voxels() -> None:
    def read(box: Box) -> np.ndarray:
        block = np.zeros(box.shape, np.uint8)
        if box.start[0] == 0:
            block[0, 777, 1500] = 1
        return block

    views = project_maxima(read, (3, 1000, 2000))
    assert views.z.shape == (334, 667)
    assert views.z.sum() == 1
    assert views.z[259, 500] == 1


def test_a_panel_shows_its_lines_where_they_are() -> None:
    """A line across the volume is seen in all three views; without lines the panel is dark."""
    shape, size = (20, 60, 100), (1.0, 1.0, 1.0)
    dark = project_maxima(lambda box: np.zeros(box.shape, np.float32), shape)
    line = TreeLines(np.array([[[5.0, 30, 10], [5.0, 30, 90]]]), "#ff0000", "one")

    def find_red(panel: Panel) -> np.ndarray:
        picture = np.asarray(Image.open(io.BytesIO(draw_panels([panel], shape, size)))).astype(int)
        return picture[..., 0] - picture[..., 1:].max(axis=-1) > 60

    assert not find_red(Panel("none", gray=dark)).any()
    marks = find_red(Panel("one", gray=dark, lines=[line]))
    height, width = marks.shape
    rows = np.flatnonzero(marks[:, : int(0.7 * width)].sum(axis=1) > 0.4 * width)  # the long stretches, along x
    assert len(rows) >= 2
    assert rows.min() < 0.5 * height < rows.max()  # once seen along z, once along y


def test_panels_stand_in_rows_of_three() -> None:
    shape, size = (10, 50, 50), (2.0, 1.0, 1.0)
    views = project_maxima(lambda box: np.ones(box.shape, np.float32), shape)
    sizes = [Image.open(io.BytesIO(draw_panels([Panel("p", gray=views)] * n, shape, size))).size for n in (1, 3, 4)]
    assert sizes[1][0] == 3 * sizes[0][0]
    assert sizes[2] == (sizes[1][0], 2 * sizes[1][1])
