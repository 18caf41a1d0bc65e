"""Warnings that need no tree."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import cli
from hpc_neuro.core.constants import EXIT_DONE
from hpc_neuro.core.geometry import Box
from hpc_neuro.trace_stacks.sanity import (
    NO_TREE_DOUBT,
    describe_odd_width,
    list_label_values,
    list_warnings,
    measure_doubt,
)
from hpc_neuro.trace_stacks.tracer import TraceFigures
from tests.helpers.stacks import make_neuron, take_picture


def list_values(image: np.ndarray) -> list[int]:
    z, y, x = image.shape
    return list_label_values(lambda box: image[box.slices], (z, y, x), image.dtype)


def test_labels_are_told_from_images() -> None:
    labels = np.zeros((6, 8, 9), dtype=np.uint8)
    labels[4, 2:4], labels[5, 0] = 2, 4
    assert list_values(labels) == [0, 2, 4]
    assert list_values(labels > 0) == [0, 1]
    assert list_values(labels.astype(np.uint16) * 1000) == [0, 2000, 4000]
    # Brightness has many values, and other types are not counted.
    image = np.arange(6 * 8 * 9).reshape(6, 8, 9)
    assert list_values(image.astype(np.uint16)) == []
    assert list_values(labels.astype(np.float32)) == []

    # No further than to the slices that show many values.
    planes = []

    def read(box: Box) -> np.ndarray:
        planes.append(box.start[0])
        return image.astype(np.uint16)[box.slices]

    assert list_label_values(read, (6, 8, 9), np.dtype(np.uint16)) == []
    assert planes == [0]


def test_trace_warns_of_labels(tmp_path: Path) -> None:
    picture = take_picture(make_neuron(3))
    stacks = {"image": picture, "mask": (picture > np.quantile(picture, 0.98)).astype(np.uint8)}
    for name, stack in stacks.items():
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, photometric="minisblack")
    assert (
        cli.main(["trace", str(tmp_path / "image.tif"), str(tmp_path / "mask.tif"), f"out={tmp_path / 'o'}"])
        == EXIT_DONE
    )
    results = json.loads((tmp_path / "o" / "trace.json").read_text())["stacks"]
    assert not any("label" in text for text in results["image"]["warnings"])
    assert "holds only the values 0, 1" in results["mask"]["warnings"][0]
    assert 0.5 < results["image"]["expected_right"] < 1


@pytest.mark.parametrize(
    ("width", "size", "word"),
    [
        (3.0, (50.0, 20.0, 20.0), "60 um wide"),
        (3.0, (1e-3, 3e-4, 3e-4), "0.0009 um wide"),
        (3.0, (1.0, 0.33, 0.33), ""),
        (3.0, (5.0, 5.0, 5.0), ""),
        (None, (50.0, 20.0, 20.0), ""),
        (3.0, None, ""),
    ],
)
def test_a_voxel_size_that_makes_neurites_absurd_gets_a_word(
    width: float | None, size: tuple[float, float, float] | None, word: str
) -> None:
    warning = describe_odd_width(width, size)
    assert (word in warning) if word else warning == ""


def test_a_stub_at_the_root_is_as_doubtful_as_no_tree() -> None:
    """Both tracings of a stub agree, which says nothing."""
    figures = TraceFigures(
        mask_share=0.001,
        speck_share=0.03,
        contrast_to_noise=6.5,
        trees=1,
        somas=0,
        cable=6.0,
        tips=1,
        left_out_trees=0,
        left_out_cable=0.0,
        agreement=1.0,
    )
    assert measure_doubt(figures) == NO_TREE_DOUBT
    assert "only 6 voxels of cable" in list_warnings(figures, False)[0]
    whole = replace(figures, cable=200.0)
    assert measure_doubt(whole) < 0.1
    assert list_warnings(whole, False) == []
