"""Results without signal are whole, and an image that changes while it is read is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.cli import main
from hpc_neuro.data.formats import open_volume
from hpc_neuro.infer import verb
from tests.helpers.small_volumes import configure


def write_image(path: Path, bright: bool) -> None:
    """Dark but for one bright corner, or nothing but noise far below it."""
    image = np.random.default_rng(0).integers(0, 3, (16, 96, 96)).astype(np.uint8)
    if bright:
        image[2:12, 2:12, 2:30] = 250
    tifffile.imwrite(path, image)


@pytest.mark.parametrize("bright", [True, False])
def test_skipped_blocks_are_whole(
    bright: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "z.tif"
    write_image(image, bright)
    keys = [f"inputs=[{{id: z, image: {image}, voxel_size: [1, 1, 1], range: [0, 250]}}]", "empty_level=0.3"]
    assert infer.run(configure(model, tmp_path / "out", *keys, "block=[16,32,32]")) == 0
    shards = list((tmp_path / "out" / "z.ome.zarr" / "0").rglob("c/*/*/*"))
    assert bool(shards) == bright

    assert main(["info", str(tmp_path / "out" / "z.ome.zarr")]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert open_volume(tmp_path / "out" / "z.ome.zarr").shape == (16, 96, 96)
    # The model of the fixture is no run, so only its own record is missing.
    main(["history", str(tmp_path / "out")])
    assert "ome.zarr at" not in capsys.readouterr().out


def test_an_image_that_changes_while_it_is_read_is_a_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "z.tif"
    write_image(image, bright=True)
    predict = verb.predict_volume

    def predict_and_change(*args: object) -> list[str]:
        failures: list[str] = predict(*args)  # type: ignore[arg-type]
        write_image(image, bright=False)
        return failures

    monkeypatch.setattr(verb, "predict_volume", predict_and_change)
    cfg = configure(model, tmp_path / "out", f"inputs=[{{id: z, image: {image}, voxel_size: [1, 1, 1]}}]")
    assert infer.run(cfg) == 3
    assert "was changed while it was read" in (tmp_path / "out" / "run.json").read_text()
