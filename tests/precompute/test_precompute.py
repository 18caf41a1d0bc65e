"""The verb precompute: the cache holds what the live teacher gives, whoever made it and however often killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_neuro import precompute
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError, load
from hpc_neuro.data.feature_cache import MANIFEST, FeatureCache
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute import cache_tool
from hpc_neuro.precompute.slices import plan_shards
from tests.helpers.tiny_store import write_store

KEYS = ["teacher.model=random", "stride_v=8", "slab=2", "layers=[3,-1]", "position_free=false"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("data") / "store", {"a": "train", "b": "train", "c": "test"})


def configure(store: Path, out: Path, *keys: str) -> precompute.PrecomputeConfig:
    return load(precompute.PrecomputeConfig, None, [f"store={store}", f"out={out}", *KEYS, *keys])


@pytest.fixture(scope="module")
def cache_folder(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "cache"
    assert precompute.run(configure(store, out)) == 0
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.h5")}


def test_the_cache_holds_what_the_live_teacher_gives(store: Path, cache_folder: Path) -> None:
    cache, volume = FeatureCache(cache_folder), Store(store)["a"]
    teacher = load_teacher(configure(store, cache_folder).teacher)
    plane = volume.normalized_image(Box((4, 0, 0), (5, *volume.shape[1:])))[0]  # the middle slice of the first eight
    padded = np.pad(plane, [(0, -n % 16) for n in plane.shape], mode="edge")
    live = teacher.features(torch.from_numpy(padded)[None], [3, 11])[:, 0].permute(0, 3, 1, 2)  # [L, D, h, w]
    cached = cache.read_crop("a", Box((0, 0, 0), (8, 64, 64)), (8, 16, 16))["z"][:, :, 0].float()

    assert torch.cosine_similarity(live, cached, dim=1).min() > 0.9999
    torch.testing.assert_close(cached, live, atol=5e-3, rtol=5e-3)


def test_position_free_features_are_those_less_a_black_slices(store: Path, cache_folder: Path, tmp_path: Path) -> None:
    cfg = configure(store, tmp_path / "cache", "position_free=true", "views=[z]")
    assert precompute.run(cfg) == 0
    assert cache_tool.main(["verify", str(cfg.out)]) == 0

    box, patch = Box((0, 0, 0), (8, 48, 48)), (8, 16, 16)
    free, plain = (FeatureCache(folder).read_crop("a", box, patch)["z"].float() for folder in (cfg.out, cache_folder))
    # 52 x 56 voxels are 4 x 4 tokens, of which the crop has nine.
    black = load_teacher(cfg.teacher).features(torch.zeros(1, 64, 64), [3, 11])[:, 0, :3, :3].permute(0, 3, 1, 2)
    torch.testing.assert_close(free[:, :, 0], plain[:, :, 0] - black, atol=1e-2, rtol=1e-2)


def test_only_the_asked_splits_are_held(cache_folder: Path) -> None:
    assert FeatureCache(cache_folder).volumes == ("a", "b")


def test_a_lost_shard_is_made_again_alike(store: Path, cache_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = contents(cache_folder)
    lost = sorted(before)[1]
    (cache_folder / lost).unlink()

    with pytest.raises(InputError, match=lost):
        FeatureCache(cache_folder)
    assert precompute.run(configure(store, cache_folder)) == 0
    assert contents(cache_folder) == before


def test_a_second_run_says_complete(store: Path, cache_folder: Path) -> None:
    stamp = (cache_folder / MANIFEST).stat().st_mtime_ns
    assert precompute.run(configure(store, cache_folder)) == 0
    assert (cache_folder / MANIFEST).stat().st_mtime_ns == stamp


def test_tiles_with_context_differ_little_from_the_whole_slice(store: Path, tmp_path: Path, cache_folder: Path) -> None:
    """Tiling changes the attention's context, not the place of a token."""
    precompute.run(configure(store, tmp_path / "c", "tile=32", "halo=32"))
    box = Box((0, 0, 0), (16, 32, 48))
    whole, tiled = (
        FeatureCache(p).read_crop("a", box, (8, 16, 16))["z"].float() for p in (cache_folder, tmp_path / "c")
    )
    assert torch.cosine_similarity(whole, tiled, dim=1).mean() > 0.95


def test_square_pixels_of_an_anisotropic_volume(tmp_path: Path) -> None:
    """A plane three times as coarse along z is stretched, so that a token is as high as wide in micrometers."""
    folder = write_store(tmp_path / "s", {"a": "train"})
    index = folder / "dataset.json"
    index.write_text(index.read_text().replace("1.0,\n    1.0,\n    1.0", "3.0,\n    1.0,\n    1.0"))
    volume = Store(folder)["a"]
    if volume.voxel_size != (3.0, 1.0, 1.0):
        pytest.fail(f"the test could not rewrite the voxel size, it is {volume.voxel_size}")
    cfg = configure(folder, tmp_path / "c")
    (unit,) = plan_shards(cfg, volume, "y", 16)[:1]

    assert unit.cell == pytest.approx((16 / 3, 16))
    assert (unit.rows, unit.columns) == (4, 4)  # 20 * 3 = 60 and 56 pixels


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["layers=[12]"], "the teacher has blocks 0 to 11"),
        (["tile=500"], "multiples of the teacher's patch, 16, are wanted, such as tile=496 halo=64"),
        (["splits=[val]"], "has no volume in the splits val"),
        (["store=/nowhere"], "does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    store: Path, tmp_path: Path, keys: list[str], sentence: str
) -> None:
    with pytest.raises((ConfigError, InputError), match=sentence):
        precompute.run(configure(store, tmp_path / "c", *keys))
    assert not (tmp_path / "c").exists()


def command(store: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "hpc_neuro", "precompute", f"store={store}", f"out={out}", *KEYS]


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_however_many_mpi_ranks_make_the_same_files(
    store: Path, cache_folder: Path, tmp_path: Path, ranks: str
) -> None:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [str(mpiexec), "-n", ranks, *command(store, tmp_path / "c")]
    subprocess.run(run, check=True, timeout=200, env=environment, capture_output=True)

    assert contents(tmp_path / "c") == contents(cache_folder)
    ours, expected = (FeatureCache(p).manifest for p in (tmp_path / "c", cache_folder))
    assert {k: v for k, v in ours.items() if k != "code"} == {k: v for k, v in expected.items() if k != "code"}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_same_files(store: Path, cache_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    process = subprocess.Popen(command(store, out), stderr=subprocess.DEVNULL)  # a pipe nobody reads may fill
    latest = time.monotonic() + 200
    while not list(out.glob("*.h5")) and process.poll() is None and time.monotonic() < latest:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(30)

    assert not (out / MANIFEST).exists()
    assert precompute.run(configure(store, out)) == 0
    assert contents(out) == contents(cache_folder)
    assert not list(out.glob(".*"))


FILLED = """
import os, pathlib, shutil, sys
from hpc_neuro.cli import main
from hpc_neuro.precompute import estimate

out, lines_of = pathlib.Path(sys.argv.pop(1)), estimate.describe_plan
def and_then_another_program_fills_the_disk(*given):
    lines = lines_of(*given)
    with open(out / "other", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(out).free - 400_000)
    return lines
estimate.describe_plan = and_then_another_program_fills_the_disk
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_one_sentence_and_leaves_no_part_file(store: Path, tmp_path: Path, ranks: int) -> None:
    """HDF5 itself ends with a segmentation fault when a write finds the disk full."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tiny tmpfs needs root")
    out = tmp_path / "small"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(out)], check=False).returncode:
        pytest.skip("this machine does not let tests mount a tmpfs")
    try:
        verb = [*command(store, out)[3:], "scale=2"]  # 1 MB of features
        start = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
        run = [*start, sys.executable, "-c", FILLED, str(out), *verb]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(run, timeout=200, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count("is full") == 1
        assert "give the same command again" in ended.stderr
        assert not [p.name for p in out.iterdir() if p.name.endswith(".part")]
        progress = contents(out)
        assert progress
        (out / "other").unlink()
        assert precompute.run(configure(store, out, "scale=2")) == 0
        assert progress.items() < contents(out).items()
        assert (out / MANIFEST).exists()
    finally:
        subprocess.run(["umount", str(out)], check=True)
