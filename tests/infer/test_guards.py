"""What lies in or beside the results and is not infer's stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_FAILURES
from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.volumes import open_inputs
from tests.helpers.small_volumes import configure, write_crossing
from tests.helpers.tiny_store import write_store

TRACED = ["trees=true", "trace.threshold=0.6", "trace.low=0.55"]


def image(folder: Path, value: int = 7, shape: Shape = (8, 32, 32)) -> Path:
    """Somebody's OME-Zarr."""
    ome_zarr.create(folder, "raw", shape, (1.0, 1.0, 1.0), shape, shape, "labels", None)
    ome_zarr.open_level(folder)[...].write(np.full(shape, value, np.uint8)).result()
    return folder


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("out", ["lab", "lab/brain.ome.zarr", "lab/brain.ome.zarr/results", "."])
def test_no_image_is_written_over(model: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "lab").mkdir()
    brain = image(tmp_path / "lab" / "brain.ome.zarr")
    before, item = bytes_of(tmp_path), f"inputs=[{{image: {brain}, range: [0, 255]}}]"
    cfg = configure(model, tmp_path / out, item)
    if out == ".":  # the image lies deeper than any result
        assert len(infer.forecast(cfg)) > 0
        return
    with pytest.raises(InputError, match="would lie in one another; choose another `out`"):
        infer.run(cfg)
    assert bytes_of(tmp_path) == before


def test_a_folder_of_somebody_elses_is_not_replaced(model: Path, store: Path, tmp_path: Path) -> None:
    other = image(tmp_path / "a.ome.zarr")
    before = bytes_of(other)
    with pytest.raises(ConfigError, match="is there, and no result"):
        infer.run(configure(model, tmp_path, f"store={store}"))
    assert bytes_of(other) == before


def test_a_tree_that_lies_in_the_way_is_set_aside(model: Path, tmp_path: Path) -> None:
    line = f"inputs=[{write_crossing(tmp_path / 'cells.tif')}]"
    out = tmp_path / "out"
    (out / "swc").mkdir(parents=True)
    (out / "swc" / "cells.swc").write_text("gold")
    assert infer.run(configure(model, out, line, *TRACED)) == 0
    assert (out / "set_aside" / "swc" / "cells.swc").read_text() == "gold"
    edited = out / "swc" / "cells.voxel.swc"
    edited.write_text(edited.read_text() + "# corrected by hand\n")
    kept, whole = edited.read_text(), sorted(p.name for p in (out / "swc").rglob("*.swc"))
    assert infer.run(configure(model, out, line, *TRACED, "trace.smooth=2")) == 0
    assert (out / "set_aside" / "swc" / "cells.voxel.swc").read_text() == kept
    assert sorted(p.name for p in (out / "swc").rglob("*.swc")) == whole
    assert len([p for p in (out / "set_aside").rglob("*") if p.is_file()]) == 2  # our own trees went, theirs stay


def test_half_written_trees_of_a_killed_run_are_its_own(model: Path, tmp_path: Path) -> None:
    line, out = f"inputs=[{write_crossing(tmp_path / 'cells.tif')}]", tmp_path / "out"
    assert infer.run(configure(model, out, line, *TRACED)) == 0
    before = bytes_of(out / "swc")
    files.write_json(out / "entries" / "cells.json", {"key": "", "entry": {}, "files": {}, "writing": True})
    (out / "predictions.json").unlink()
    (out / "swc" / "cells.voxel.swc").write_text("half")
    assert infer.run(configure(model, out, line, *TRACED)) == 0
    assert bytes_of(out / "swc") == before
    assert not (out / "set_aside").exists()


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden"])
def test_a_name_that_leads_elsewhere_is_refused(model: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a file name"):
        configure(model, tmp_path, f"inputs=[{{image: x.tif, id: {name}}}]")


def test_another_split_of_the_store_is_another_run(model: Path, finished_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished_run, tmp_path / "out")
    more = write_store(tmp_path / "more", {"a": "test", "b": "test", "c": "test"})
    fewer = write_store(tmp_path / "fewer", {"a": "test", "b": "train"})
    same = write_store(tmp_path / "same", {"a": "test", "b": "test"})
    config = json.loads((out / "run.json").read_text())["config"]
    for store, refused in ((more, True), (fewer, True), (same, False)):
        config["store"] = str(store)  # a store made anew in its place
        record = {**json.loads((out / "run.json").read_text()), "config": config}
        files.write_json(out / "run.json", record)
        cfg = configure(model, out, f"store={store}")
        if refused:
            with pytest.raises(ConfigError, match="the input volumes changed"):
                infer.run(cfg)
        else:
            assert infer.run(cfg) == 0


def test_an_image_folder_that_was_written_anew_is_another_image(model: Path, tmp_path: Path) -> None:
    cfg = configure(model, tmp_path / "o", f"inputs=[{{image: {image(tmp_path / 'b.ome.zarr')}, range: [0, 255]}}]")
    (before,) = open_inputs(cfg)
    (again,) = open_inputs(cfg)
    shutil.rmtree(tmp_path / "b.ome.zarr")
    image(tmp_path / "b.ome.zarr", value=9)
    (after,) = open_inputs(cfg)
    assert before.digest == again.digest != after.digest


def test_a_voxel_that_is_nan_is_a_failure_although_the_range_is_given(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voxels = np.random.default_rng(0).uniform(0, 100, (8, 32, 64)).astype(np.float32)
    voxels[3, 4, 40] = np.nan
    tifffile.imwrite(tmp_path / "cells.tif", voxels, photometric="minisblack")
    item = f"inputs=[{{image: {tmp_path / 'cells.tif'}, range: [0, 100], voxel_size: [1, 1, 1]}}]"
    assert infer.run(configure(model, tmp_path / "out", item)) == EXIT_FAILURES
    assert "cells.tif: voxel z=3 y=4 x=40 is NaN or infinite" in caplog.text
