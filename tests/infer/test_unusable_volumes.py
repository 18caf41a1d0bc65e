"""Volumes whose brightness cannot be measured are named, and the others are predicted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.core.schema import InputError
from hpc_neuro.infer.verify import main as verify
from tests.helpers.small_volumes import configure


def write_images(folder: Path) -> list[str]:
    """Images that are good, constant, and with NaN, as entries of `inputs`."""
    good = np.random.default_rng(0).integers(0, 200, (8, 40, 40)).astype(np.float32)
    with_nan = good.copy()
    with_nan[1, 2, 3] = np.nan
    for name, image in (("good", good), ("flat", np.full_like(good, 7)), ("nan", with_nan)):
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    return [f"{{image: {folder / name}.tif, voxel_size: [1, 1, 1]}}" for name in ("good", "flat", "nan")]


def test_a_batch_goes_on_without_them(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_images(tmp_path)
    cfg = configure(model, tmp_path / "out", f"inputs=[{', '.join(images)}]")
    assert "flat.tif: every voxel is 7" in "\n".join(infer.forecast(cfg))

    assert infer.run(cfg) == 3
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())) == ["good"]
    assert "flat.tif: every voxel is 7" in caplog.text
    assert "nan.tif: voxel z=1 y=2 x=3" in caplog.text
    # A folder that lacks volumes is not called whole.
    assert verify([str(tmp_path / "out"), "--check"]) == 3


def test_nothing_is_written_without_a_usable_volume(model: Path, tmp_path: Path) -> None:
    cfg = configure(model, tmp_path / "out", f"inputs=[{write_images(tmp_path)[1]}]")
    with pytest.raises(InputError, match=r"flat\.tif: every voxel is 7"):
        infer.run(cfg)
    assert not (tmp_path / "out").exists()
