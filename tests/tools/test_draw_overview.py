"""The picture of the README is what its script draws."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tools import draw_overview


def test_the_picture_of_the_readme_can_be_drawn_again() -> None:
    committed = draw_overview.PICTURE.read_bytes()
    assert len(committed) < 150_000

    drawn = draw_overview.draw_overview(draw_overview.SEED)
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float) for data in (committed, drawn)]
    assert pixels[0].shape == pixels[1].shape
    # Another version of matplotlib may draw letters otherwise, and of NumPy other noise.
    assert np.abs(pixels[0] - pixels[1]).mean() < 4

    # Amber only in the middle, blue at the right.
    thirds = np.array_split(pixels[1], 3, axis=1)
    amber = [np.mean((part[..., 0] > 150) & (part[..., 2] < 100)) for part in thirds]
    blue = [np.mean((part[..., 2] > 150) & (part[..., 0] < 120)) for part in thirds]
    assert np.argmax(amber) == 1
    assert np.argmax(blue) == 2
    assert min(amber[1], blue[2]) > 0.005
