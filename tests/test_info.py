"""`hpc-neuro info`: printed values are those of numpy, in bounded memory, with a picture."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from hpc_neuro import info
from hpc_neuro.cli import main as command_line
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import swc
from hpc_neuro.data.formats import open_volume


def line_image(dtype: str = "uint8") -> Array:
    """A bright oblique line over noise, 30 x 40 x 50."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 20, (30, 40, 50)).astype(dtype)
    for t in np.linspace(0, 1, 200):
        image[int(5 + 20 * t), int(5 + 30 * t), int(40 - 35 * t)] = 200
    return image


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32"])
def test_numbers_are_those_of_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(info, "_BLOCK_BYTES", 7000)  # many blocks, cut along y too
    monkeypatch.setattr(info, "_MOST_PIXELS", 16)
    image = line_image(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="minisblack")
    statistics, planes = info.measure_volume(open_volume(tmp_path / "a.tif"))
    assert (statistics.low, statistics.high) == (image.min(), image.max())
    assert statistics.zero_share == pytest.approx((image == 0).mean())
    for percent, value in statistics.percentiles.items():
        expected = np.percentile(image, percent, method="inverted_cdf")
        assert value == pytest.approx(expected, abs=200 / 65535 + 1e-6)
    for along, plane in enumerate(planes):
        full = image.max(axis=along)
        factor = [-(-n // 16) for n in full.shape]
        pooled = [
            [full[i : i + factor[0], j : j + factor[1]].max() for j in range(0, full.shape[1], factor[1])]
            for i in range(0, full.shape[0], factor[0])
        ]
        np.testing.assert_array_equal(plane, np.array(pooled))


def test_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "um"}
    tifffile.imwrite(tmp_path / "a.tif", line_image(), imagej=True, resolution=(2, 2), metadata=metadata)
    assert command_line(["info", str(tmp_path / "a.tif"), f"picture={tmp_path / 'p.png'}"]) == 0
    out = capsys.readouterr().out
    assert "30 x 40 x 50 voxels (z y x), uint8, 60.0 kB" in out
    assert "voxel size: 2 x 0.5 x 0.5 um (z y x)" in out
    assert "intensity: 0 to 200" in out
    assert f"picture: {tmp_path / 'p.png'}" in out
    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] > 300
    inside = pixels[pixels.shape[0] // 8 : pixels.shape[0] // 4, pixels.shape[1] // 8 : pixels.shape[1] // 3]
    assert inside.std() > 10  # an image, not a blank frame


def test_a_channel_and_axes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = np.stack([line_image(), line_image() // 2], axis=1)
    tifffile.imwrite(tmp_path / "a.tif", data, photometric="minisblack")
    assert info.main([str(tmp_path / "a.tif"), "axes=ZCYX", "channel=1"]) == 0
    assert "intensity: 0 to 100" in capsys.readouterr().out
    with pytest.raises(InputError, match="axes="):
        info.main([str(tmp_path / "a.tif")])


@pytest.mark.parametrize(
    ("axes", "lines"),
    [
        ("ZCYX", ["30 x 40 x 50 voxels (z y x)", "channel 0: 0 to 200", "channel 1: 0 to 100", "channel=0 to 1"]),
        ("TZYX", ["stored axes: T 2, Z 30, Y 40, X 50", "2 time points; one is wanted"]),
        ("TYX", ["stored axes: T 30, Y 40, X 50", "if the time axis is slices, say axes=ZYX"]),
    ],
)
def test_channels_and_times_are_summarized(
    axes: str, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    along = axes.replace("Y", "").replace("X", "").find("C" if "C" in axes else "T")
    one = line_image()
    data = one if axes == "TYX" else np.stack([one, one // 2], axis=along)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, data, imagej=True, metadata={"axes": axes})
    assert command_line(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in lines if line not in out] == []

    # A single one is described as before, and a picture is of one channel.
    assert command_line(["info", str(path), "channel=1"]) == (0 if "C" in axes else 2)
    assert command_line(["info", str(path), f"picture={tmp_path / 'p.png'}"]) == 2
    assert not (tmp_path / "p.png").exists()


def test_colors_are_summarized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    colors = np.stack([line_image(), line_image() // 2, line_image() // 4], axis=-1)
    tifffile.imwrite(tmp_path / "a.tif", colors, photometric="rgb")
    assert command_line(["info", str(tmp_path / "a.tif")]) == 0
    assert "channel 2: 0 to 50" in capsys.readouterr().out
    tifffile.imwrite(tmp_path / "b.tif", colors[0], photometric="rgb")
    assert command_line(["info", str(tmp_path / "b.tif")]) == 0
    assert "a 2D color image" in capsys.readouterr().out


def test_constant_and_nan_images_are_remarked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.full((4, 5, 6), 7, "uint8"), photometric="minisblack")
    assert info.main([str(tmp_path / "a.tif"), f"picture={tmp_path / 'a.png'}"]) == 0
    assert "every voxel has the same value" in capsys.readouterr().out
    image = line_image("float32")
    image[3, 4, 5:8] = np.nan
    tifffile.imwrite(tmp_path / "b.tif", image, photometric="minisblack")
    assert info.main([str(tmp_path / "b.tif"), f"picture={tmp_path / 'b.png'}"]) == 0
    assert "3 voxels of no finite number" in capsys.readouterr().out
    tifffile.imwrite(tmp_path / "c.tif", np.full((4, 5, 6), np.nan, "float32"), photometric="minisblack")
    assert info.main([str(tmp_path / "c.tif"), f"picture={tmp_path / 'c.png'}"]) == 0
    assert "120 voxels of no finite number" in capsys.readouterr().out


def test_memory_does_not_grow_with_the_volume(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.memmap(path, shape=(600, 512, 512), dtype="uint8", photometric="minisblack").flush()
    tracemalloc.start()
    info.measure_volume(open_volume(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 << 20  # the volume has 157 MB


def test_of_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.swc").write_text("1 1 0 0 0 5 -1\n2 3 6 0 0 1 1\n3 3 6 8 2 1 2\n4 2 9 0 0 1 2\n")
    assert info.main([str(tmp_path / "a.swc"), f"picture={tmp_path / 'a.png'}"]) == 0
    out = capsys.readouterr().out
    assert "SWC, 4 nodes, 1 root, 2 tips, 1 branch point" in out
    assert "extent z y x: 0 to 2, 0 to 8, 0 to 9" in out
    assert (tmp_path / "a.png").stat().st_size > 5000
    swc.write(tmp_path / "b.swc", swc.read(tmp_path / "a.swc"), voxel_size=(1, 2, 3))
    assert info.main([str(tmp_path / "b.swc")]) == 0
    assert "voxel size: 1 x 2 x 3 um (z y x)" in capsys.readouterr().out


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.tif").write_bytes(b"an image")
    assert command_line(["info", str(tmp_path / "b.tif"), f"picture={tmp_path / 'b.tif'}"]) == 2
    assert "is not named as a picture" in capsys.readouterr().err
    assert (tmp_path / "b.tif").read_bytes() == b"an image"
    for argv, says in ((["a", "b"], "2 paths"), ([], "0 paths"), (["a", "color=1"], "unknown color")):
        with pytest.raises(ConfigError, match=says):
            info.main(argv)
    with pytest.raises(ConfigError, match="channel=x"):
        info.main(["a.tif", "channel=x"])
    with pytest.raises(InputError, match="does not exist"):
        info.main([str(tmp_path / "a.tif")])
    assert command_line(["info", str(tmp_path / "a.tif")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert info.main(["--help"]) == 0
    assert "picture=FILE.png" in capsys.readouterr().out


def test_an_empty_path_is_not_the_current_folder() -> None:
    with pytest.raises(InputError, match="the path is empty"):
        info.main([""])
