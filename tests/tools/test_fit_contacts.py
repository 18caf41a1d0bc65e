"""tools/fit_contacts.py: examples whose truth is known, and weights that tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.tracing.contact_evidence import FEATURES
from tests.helpers.shapes import paint_points, sample_line
from tools.fit_contacts import Example, fit_weights, list_examples, print_table, take_apart

SHAPE = (30, 90, 140)
ROOT = (15.0, 45.0, 6.0)


def test_arms_of_a_crossing_belong_to_their_neurons() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(10, 1, SHAPE).astype(np.float32)
    own, other = sample_line(ROOT, (15, 45, 130)), sample_line((15, 8, 50), (15, 82, 90))
    paint_points(image, own, 2.0, 200.0)
    paint_points(image, other, 2.0, 120.0)

    def read(box: Box) -> np.ndarray:
        return np.asarray(image[box.slices])

    crowd = [build_tree(line, np.arange(len(line)) - 1, np.full(len(line), 2.0)) for line in (own, other)]
    parts = take_apart(read, SHAPE, (1.0, 1.0, 1.0), ROOT)
    examples = list(list_examples(parts, crowd))
    assert sorted(example.is_same for example in examples) == [False, False, True]
    assert all(example.features.shape == (len(FEATURES),) for example in examples)
    assert all(example.is_same for example in list_examples(parts, None))


def test_weights_tell_separable_examples_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, len(FEATURES)))
    examples = [Example(row, bool(row[0] > 0), 50.0) for row in features]
    center, scale, weights, bias = fit_weights(examples, [])
    odds = (features - center) / scale @ weights + bias
    assert np.mean((odds > 0) == (features[:, 0] > 0)) > 0.95

    print_table(center, scale, weights, bias)
    table = capsys.readouterr().out
    assert all(f'"{name}"' in table for name in FEATURES)
