"""The benchmark of links along the image, on one small volume."""

from __future__ import annotations

import pytest

from tools.bench import links


def test_the_same_mask_is_traced_without_and_with_its_image() -> None:
    report = links.score_volume(0, 2, 1.0, (24, 96, 128))
    assert set(report) == {"no", "yes"}
    assert report["no"]["precision"] == pytest.approx(1, abs=0.3)
    assert report["yes"]["recall"] > report["no"]["recall"] + 0.1
