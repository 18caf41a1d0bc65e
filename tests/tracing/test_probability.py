"""Confidence is high on a tube, low over a break, and does not depend on how the volume is read."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.core.morphology import build_tree
from hpc_neuro.tracing import measure_confidence, probability, trace


def test_a_break_is_the_least_certain_place(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((12, 16, 90), np.float32)
    image[4:8, 6:10, 4:86] = 0.9
    image[:, :, 40:48] = 0.1
    image[4:8, 6:10, 70] = 0.6
    tree = trace(image, (1.0, 1.0, 1.0))[0]
    confidence = measure_confidence(tree, lambda box: image[box.slices], image.shape)
    assert confidence.shape == (len(tree),)
    x = tree.points[:, 2]
    assert np.all(confidence[(x > 43) & (x < 46)] == np.float32(0.1))
    assert np.all(confidence[(x < 36) | (x > 76)] == np.float32(0.9))
    monkeypatch.setattr(probability, "_CONFIDENCE_CELL", 5)
    assert np.array_equal(measure_confidence(tree, lambda box: image[box.slices], image.shape), confidence)


def test_values_are_the_lowest_along_the_edge_and_uint8_counts() -> None:
    image = np.full((3, 3, 30), 255, np.uint8)
    image[:, :, 12:16] = 51
    tree = build_tree(np.array([[1, 1, 2], [1, 1, 10], [1, 1, 20], [1, 1, 40]]), np.array([-1, 0, 1, 2]))
    confidence = measure_confidence(tree, lambda box: image[box.slices], (3, 3, 30))
    np.testing.assert_allclose(confidence, [1, 1, 0.2, 1])
