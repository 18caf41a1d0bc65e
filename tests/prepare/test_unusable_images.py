"""Images that cannot be used are left out of a store, and the others are prepared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core.schema import InputError
from hpc_neuro.prepare import forecast, run
from tests.helpers.image_pairs import SHAPE, make_config, make_pair, write_pair


def write_batch(folder: Path) -> None:
    """One good pair, and images that are blank, constant, or hold NaN."""
    write_pair(folder, "good", 1)
    write_pair(folder, "blank", 2, image=np.zeros(SHAPE, np.uint8))
    write_pair(folder, "flat", 3, image=np.full(SHAPE, 7, np.uint8))
    with_nan = make_pair(4)[1].astype(np.float32)
    with_nan[3, 4, 5] = np.nan
    write_pair(folder, "nan", 4, image=with_nan)


def test_a_batch_goes_on_without_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_batch(tmp_path / "pairs")
    cfg = make_config(images=tmp_path / "pairs", out=tmp_path / "store")
    lines = "\n".join(forecast(cfg))
    assert f"left out: {tmp_path / 'pairs' / 'flat.tif'}: every voxel is 7" in lines

    # The second start is a resumed one, which has measured nothing.
    for _ in range(2):
        caplog.clear()
        assert run(cfg) == 3
        assert list(json.loads((tmp_path / "store" / "dataset.json").read_text())["volumes"]) == ["good"]
        for text in ("blank.tif: every voxel is 0", "flat.tif: every voxel is 7", "nan.tif: voxel z=3 y=4 x=5"):
            assert text in caplog.text


def test_nothing_is_written_without_a_usable_image(tmp_path: Path) -> None:
    write_pair(tmp_path / "pairs", "flat", 3, image=np.full(SHAPE, 7, np.uint8))
    cfg = make_config(images=tmp_path / "pairs", out=tmp_path / "store")
    with pytest.raises(InputError, match=r"flat\.tif: every voxel is 7"):
        run(cfg)
    assert not (tmp_path / "store").exists()
