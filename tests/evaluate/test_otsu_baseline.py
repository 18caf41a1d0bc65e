"""The baseline that needs no training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from skimage.filters import threshold_otsu

from hpc_neuro.core.geometry import Box
from hpc_neuro.data.store import Store
from hpc_neuro.evaluate import predictions
from hpc_neuro.evaluate.predictions import OtsuMask
from hpc_neuro.tracing import TraceConfig


def test_otsu_is_that_of_scikit_image(store: Path) -> None:
    volume = Store(store)["a"]
    image = volume.image(Box.whole(volume.shape))
    baseline = OtsuMask(volume)
    assert baseline.threshold == threshold_otsu(image)
    assert np.array_equal(baseline.mask(Box.whole(volume.shape)), image > threshold_otsu(image))


def test_otsus_mask_is_traced_along_the_image_as_the_models_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume, images = Store(store)["a"], []
    monkeypatch.setattr(predictions, "trace_reader", lambda *args, image, **kwargs: images.append(image) or [])
    predictions.trace_otsu_mask(volume, OtsuMask(volume), TraceConfig())
    whole = Box.whole(volume.shape)
    assert np.array_equal(images[0](whole), volume.normalized_image(whole))
