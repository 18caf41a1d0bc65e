"""Volumes whose brightness cannot be measured are named, and the others are predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from hpc_neuro import infer
from hpc_neuro.core.schema import InputError
from hpc_neuro.infer.verify import main as verify
from tests.helpers.small_volumes import KEYS, configure


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


def write_damaged_image(path: Path) -> str:
    """An image that opens, and whose voxels cannot be decoded; its entry of `inputs`."""
    image = np.random.default_rng(1).integers(0, 200, (8, 40, 40)).astype(np.uint8)
    tifffile.imwrite(path, image, photometric="minisblack", compression="zlib", metadata={"axes": "ZYX"})
    with tifffile.TiffFile(path) as tif:
        begin, count = tif.pages[5].dataoffsets[0], tif.pages[5].databytecounts[0]
    data = bytearray(path.read_bytes())
    data[begin : begin + count] = bytes(count)
    path.write_bytes(bytes(data))
    return f"{{image: {path}, voxel_size: [1, 1, 1]}}"


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_leave_out_the_same_volumes(ranks: int, model: Path, tmp_path: Path) -> None:
    """Whatever is found out by one rank alone, all ranks leave out, and none waits for another."""
    images = write_images(tmp_path)
    blank = np.zeros((8, 40, 40), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "blank.tif", blank, photometric="minisblack", metadata={"axes": "ZYX"})
    images = [write_damaged_image(tmp_path / "damaged.tif"), *images[1:], images[0]]
    images.insert(2, f"{{image: {tmp_path / 'blank'}.tif, voxel_size: [1, 1, 1]}}")

    start = [
        str(Path(sys.executable).with_name("mpiexec")),
        "-n",
        str(ranks),
        sys.executable,
        "-m",
        "hpc_neuro",
        "infer",
    ]
    command = [*start, f"model={model}", f"out={tmp_path / 'out'}", f"inputs=[{', '.join(images)}]", *KEYS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    assert result.returncode == 3, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    sentences = (
        "flat.tif: every voxel is 7",
        "blank.tif: every voxel is 0",
        "nan.tif: voxel z=1 y=2 x=3",
        "damaged.tif",
    )
    # The first rank speaks for all.
    failures = [line for line in result.stderr.splitlines() if "failed" in line or "left out" in line]
    assert [sum(sentence in line for line in failures) for sentence in sentences] == [1, 1, 1, 1], result.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert all(any(sentence in failure for failure in record["failures"]) for sentence in sentences)
    assert list(json.loads((tmp_path / "out" / "predictions.json").read_text())) == ["good"]

    # The volume that was predicted is that of one process.
    alone = tmp_path / "alone"
    assert infer.run(configure(model, alone, f"inputs=[{images[-1]}]")) == 0
    for path in (p for p in (alone / "good.ome.zarr").rglob("*") if p.is_file() and "json" not in p.name):
        assert path.read_bytes() == (tmp_path / "out" / path.relative_to(alone)).read_bytes()
