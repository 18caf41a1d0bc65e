"""models/feature_tubes.py: a branch that starts as nothing and starts straight."""

from __future__ import annotations

import pytest
import torch

from hpc_neuro.core.schema import ConfigError, load
from hpc_neuro.models.config import FeatureTubesConfig
from hpc_neuro.models.feature_tubes import FeatureTubes


@pytest.mark.parametrize("kind", ["straight", "deformable"])
def test_tubes_start_as_the_identity(kind: str) -> None:
    tubes, x = FeatureTubes(6, load(FeatureTubesConfig, None, [f"kind={kind}"])), torch.randn(2, 6, 3, 4, 5)
    torch.testing.assert_close(tubes(x), x, rtol=0, atol=0)


def test_bends_start_straight_and_stay_within_the_extent() -> None:
    tubes, x = FeatureTubes(6, FeatureTubesConfig(taps=5, width=6, extent=0.5)), 100 * torch.randn(1, 6, 3, 4, 5)
    assert all(not steps.any() for steps in tubes.bend(x))
    assert tubes.offsets is not None
    torch.nn.init.normal_(tubes.offsets.weight)
    steps = torch.stack(tubes.bend(x))
    assert steps.shape == (3, 1, 8, 3, 4, 5)
    assert 0.4 < steps.abs().max() <= 0.5


def test_a_straight_tube_is_a_line_convolution() -> None:
    tubes, x = FeatureTubes(4, FeatureTubesConfig(kind="straight", taps=3, width=4)), torch.randn(1, 4, 6, 6, 6)
    torch.nn.init.ones_(tubes.gain.weight)
    narrow = tubes.reduce(x)
    lines = [
        torch.nn.functional.conv3d(
            torch.nn.functional.pad(narrow, _pad(axis), mode="replicate"), tubes.weight[axis].view(4, 4, *_shape(axis))
        )
        for axis in range(3)
    ]
    torch.testing.assert_close(tubes(x), x + tubes.expand(sum(lines)))


def _shape(axis: int) -> tuple[int, ...]:
    return tuple(3 if a == axis else 1 for a in range(3))


def _pad(axis: int) -> tuple[int, ...]:
    return tuple(1 if a == axis else 0 for a in (2, 1, 0) for _ in range(2))


def test_an_even_number_of_taps_is_refused() -> None:
    with pytest.raises(ConfigError, match="odd number of taps"):
        load(FeatureTubesConfig, None, ["taps=4"])
