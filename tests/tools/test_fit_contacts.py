"""tools/fit_contacts.py: examples whose truth is known, and weights that tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import build_tree
from hpc_neuro.tracing.contact_evidence import FEATURES
from hpc_neuro.tracing.crowd_evidence import CROWD_FEATURES, CrowdEvidence
from tests.helpers.shapes import paint_points, sample_line
from tools.fit_contacts import (
    Example,
    LightExample,
    find_graph,
    fit_weights,
    list_examples,
    list_rooted_examples,
    main,
    print_light,
    print_table,
)

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
    volume = find_graph(read, SHAPE, (1.0, 1.0, 1.0))
    parts = volume.take_apart(ROOT)
    examples = list(list_examples(parts, crowd))
    assert sorted(example.is_same for example in examples) == [False, False, True]
    assert all(example.features.shape == (len(FEATURES),) for example in examples)
    assert all(example.is_same for example in list_examples(parts, None))

    evidence = CrowdEvidence(parts, volume.graph, volume.image)
    rooted = list(list_rooted_examples(evidence, crowd[0], crowd[1:]))
    assert sorted(example.is_same for example in rooted) == [False, False, True]
    assert all(example.features.shape == (len(CROWD_FEATURES),) for example in rooted)


def test_weights_tell_separable_examples_apart(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(400, len(FEATURES)))
    examples = [Example(row, bool(row[0] > 0), 50.0) for row in features]
    center, scale, weights, bias = fit_weights(examples, [])
    odds = (features - center) / scale @ weights + bias
    assert np.mean((odds > 0) == (features[:, 0] > 0)) > 0.95

    print_table(FEATURES, center, scale, weights, bias)
    table = capsys.readouterr().out
    assert all(f'"{name}"' in table for name in FEATURES)


def test_light_is_fitted_by_least_squares(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(2)
    logs = rng.normal(size=(300, 3))
    width = logs @ np.array([-3.0, 4.0, -1.0]) + 0.5
    labeling = logs[:, 0] - (logs[:, 1:] - logs[:, :1]) @ np.array([9.0, -3.0]) - 5.0
    print_light([LightExample(*row) for row in zip(logs, width.tolist(), labeling.tolist(), strict=True)])
    printed = capsys.readouterr().out
    assert "_WIDTH = (-3.000, 4.000, -1.000)\n_WIDTH_BIAS = 0.500" in printed
    assert "_GLOW = (9.000, -3.000)\n_GLOW_BIAS = 5.000" in printed


def test_the_tool_prints_the_tables_that_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    only = ["--only", "crowd", "light"]
    monkeypatch.setattr("sys.argv", ["fit", "--seeds", "102", "103", "--ratios", "0.5", "--neurons", "2", *only])
    main()
    printed = capsys.readouterr().out
    assert all(f'"{name}"' in printed for name in CROWD_FEATURES)
    assert "_WIDTH" in printed
    assert '"brightness"' not in printed
