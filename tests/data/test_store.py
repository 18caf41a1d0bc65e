"""The training store: what is written is what is read, streamed, whole or not at all, from any process."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import multiprocessing as mp
import os
import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_neuro.core import files, morphology
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.morphology import Tree
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data import intensity
from hpc_neuro.data.rasterize import DrawSettings, list_centerline_voxels, rasterize
from hpc_neuro.data.store import Store, VolumeRecord, forecast_bytes, is_written, write_index, write_volume

SHAPE = (40, 150, 170)
SIZE = (1.0, 0.4, 0.4)
BOX = Box((3, 20, 30), (30, 100, 140))


def tree() -> Tree:
    points = np.array([[5, 10, 10], [20, 60, 80], [35, 140, 90], [22, 50, 160], [60, 60, 200.0]])
    return morphology.build_tree(points, np.array([-1, 0, 1, 1, 3]), np.array([2.0, 3, 1, 1, 1]))


def image(dtype: str = "u2") -> Array:
    rng = np.random.default_rng(0)
    made = rng.integers(0, 60, SHAPE).astype(dtype)
    made[:, :64, 128:] = 0  # whole chunks of zeros
    return made


def volume(id_: str = "a", dtype: str = "u2", split: str = "train") -> VolumeRecord:
    return VolumeRecord(
        id=id_,
        shape=SHAPE,
        voxel_size=SIZE,
        dtype=np.dtype(dtype),
        low=3.0,
        high=50.0,
        root=(5.0, 10.0, 10.0),
        split=split,
        digest=f"digest-{id_}",
        sources={"image": "i", "swc": "s"},
    )


def write(folder: Path, *volumes: VolumeRecord, drawing: DrawSettings | None = None) -> Store:
    for v in volumes:
        made = image(v.dtype.str)
        fitted = replace(tree(), points=tree().points + 0.3)
        write_volume(
            folder / f"{v.id}.h5", v, lambda b, made=made: made[b.slices], tree(), fitted, drawing or DrawSettings()
        )
    write_index(folder, list(volumes))
    return Store(folder)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_every_box_comes_back_as_it_was(tmp_path: Path, dtype: str) -> None:
    store = write(tmp_path, volume(dtype=dtype), drawing=DrawSettings(ignore_margin=1.0, stretch=1.5))
    stored = store["a"]
    drawn = rasterize(stored.fitted_tree(), BOX, SIZE, DrawSettings(ignore_margin=1.0, stretch=1.5))

    np.testing.assert_array_equal(stored.image(BOX), image(dtype)[BOX.slices])
    assert stored.image(BOX).dtype == np.dtype(dtype)
    np.testing.assert_array_equal(stored.normalized_image(BOX), intensity.normalize(image(dtype)[BOX.slices], 3, 50))
    np.testing.assert_array_equal(stored.mask(BOX), drawn.mask)
    np.testing.assert_array_equal(stored.skeleton(BOX), drawn.skeleton)
    np.testing.assert_allclose(stored.distance(BOX), drawn.distance, atol=4e-3)  # float16
    np.testing.assert_allclose(127 * stored.tangent(BOX), drawn.tangent, atol=1e-4)
    assert stored.distance(BOX).dtype == stored.tangent(BOX).dtype == np.float32


def test_the_header_and_the_trees_come_back(tmp_path: Path) -> None:
    stored = write(tmp_path, volume())["a"]
    assert (stored.id, stored.shape, stored.voxel_size, stored.low, stored.high) == ("a", SHAPE, SIZE, 3.0, 50.0)
    assert (stored.root, stored.digest, stored.dtype) == ((5.0, 10.0, 10.0), "digest-a", np.dtype("u2"))
    np.testing.assert_array_equal(stored.tree().points, tree().points)
    np.testing.assert_array_equal(stored.tree().parents, tree().parents)
    np.testing.assert_allclose(stored.fitted_tree().points, tree().points + 0.3)

    with h5py.File(tmp_path / "a.h5", locking=False) as file:
        np.testing.assert_allclose(file.attrs["affine"], np.diag([*SIZE, 1]))
        assert file.attrs["sha256_image"] == "i"
        assert file["image"].compression is None
        assert file["image"].chunks == (32, 64, 64)


def test_points_for_the_sampler_lie_inside_on_line_branches_and_tips(tmp_path: Path) -> None:
    stored = write(tmp_path, volume())["a"]
    np.testing.assert_array_equal(
        stored.points("skeleton"), list_centerline_voxels(stored.fitted_tree(), Box.whole(SHAPE))
    )
    np.testing.assert_array_equal(stored.points("branch"), [[20, 60, 80]])
    np.testing.assert_array_equal(stored.points("tip"), [[35, 140, 90]])  # the other tip lies outside the image


def test_splits_order_and_unknown_ids(tmp_path: Path) -> None:
    store = write(tmp_path, volume("b"), volume("a", split="test"), volume("c"))
    assert store.ids == ("b", "a", "c")
    assert store.split("train") == ("b", "c")
    assert store.split("test") == ("a",)
    assert store.split("val") == ()
    with pytest.raises(InputError, match="'valid' is not a split; train, val, test are"):
        store.split("valid")
    assert [v.id for v in store] == ["b", "a", "c"]

    index = json.loads((tmp_path / "dataset.json").read_text())
    assert index["splits"] == {"train": ["b", "c"], "val": [], "test": ["a"]}
    assert index["totals"]["volumes"] == 3
    assert index["totals"]["voxels"] == 3 * np.prod(SHAPE)
    with pytest.raises(InputError, match="holds no volume 'x'; it holds b, a, c"):
        store["x"]


def test_a_box_that_leaves_the_volume_is_refused(tmp_path: Path) -> None:
    stored = write(tmp_path, volume())["a"]
    for read in (stored.image, stored.mask, stored.tangent):
        with pytest.raises(InputError, match="leaves volume a"):
            read(Box((0, 0, 0), (41, 10, 10)))


def test_what_is_empty_takes_no_room(tmp_path: Path) -> None:
    write(tmp_path, volume())
    with h5py.File(tmp_path / "a.h5") as file:
        chunks = 2 * 3 * 3  # of the whole volume
        assert file["image"].id.get_num_chunks() == chunks - 2  # the corner of zeros
        assert file["mask"].id.get_num_chunks() < chunks
        assert file["tangent"].id.get_num_chunks() < chunks


def test_a_sparse_giant_stays_small_in_file_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (256, 2048, 2048)  # 1 GB of zeros around one neurite
    thin = morphology.build_tree(np.array([[100, 100, 100], [100, 100, 400.0]]), np.array([-1, 0]), 2.0)
    largest = 0

    def read(box: Box) -> Array:
        nonlocal largest
        largest = max(largest, box.size)
        return np.broadcast_to(np.uint8(0), box.shape)

    monkeypatch.setattr(intensity, "_PASS_BYTES", 8 << 20)
    write_volume(tmp_path / "a.h5", replace(volume(dtype="u1"), shape=shape), read, thin, thin, DrawSettings())

    assert (tmp_path / "a.h5").stat().st_size < 40e6
    assert largest <= 8 << 20


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        write(tmp_path / name, volume())
        digests.add(hashlib.sha256((tmp_path / name / "a.h5").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_unlabelled_voxels_become_255_outside_the_neurite(tmp_path: Path) -> None:
    made = image()
    path = tmp_path / "a.h5"
    blank = np.zeros(SHAPE, dtype=bool)
    blank[:, :40, 100:] = True  # far from the tree in part, across it in part
    write_volume(path, volume(), lambda b: made[b.slices], tree(), tree(), DrawSettings(), lambda b: blank[b.slices])
    write_index(tmp_path, [volume()])
    mask = Store(tmp_path)["a"].mask(Box.whole(SHAPE))
    plain = rasterize(tree(), Box.whole(SHAPE), SIZE).mask

    np.testing.assert_array_equal(mask == 1, plain == 1)
    np.testing.assert_array_equal(mask == 255, blank & (plain == 0))


def test_is_written_knows_the_digest(tmp_path: Path) -> None:
    write(tmp_path, volume())
    assert is_written(tmp_path / "a.h5", "digest-a")
    assert not is_written(tmp_path / "a.h5", "another")
    assert not is_written(tmp_path / "b.h5", "digest-a")


def test_the_forecast_is_an_upper_bound_of_the_right_size(tmp_path: Path) -> None:
    write(tmp_path, volume())
    size = (tmp_path / "a.h5").stat().st_size
    forecast = forecast_bytes(tree(), SHAPE, 2, SIZE, 8.0)
    assert size <= forecast < 2 * size


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = image(), []

    def full(folder: Path, needed: int) -> None:
        seen.append(needed)
        if len(seen) == 3:  # in the middle: the header and the image are there
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "reserve_space", full)
    with pytest.raises(InputError, match=r"full, a\.h5 was not written; make room or choose another `out`"):
        write_volume(tmp_path / "a.h5", volume(), lambda b: made[b.slices], tree(), tree(), DrawSettings())
    assert list(tmp_path.iterdir()) == []


def test_reserve_asks_the_file_system_and_leaves_nothing(tmp_path: Path) -> None:
    files.reserve_space(tmp_path, 1 << 20)
    files.reserve_space(tmp_path, 0)

    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=r"space|large") as caught:
        files.reserve_space(tmp_path, 1 << 60)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_read_leaves_nothing(tmp_path: Path) -> None:
    def read(box: Box) -> Array:
        raise InputError("damaged there")

    with pytest.raises(InputError, match="damaged there"):
        write_volume(tmp_path / "a.h5", volume(), read, tree(), tree(), DrawSettings())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; make the store with `hpc-neuro prepare`"):
        Store(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(InputError, match="is not a store of format"):
        Store(tmp_path)


def test_missing_broken_and_exchanged_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, volume("a"), volume("b"))
    (tmp_path / "a.h5").write_bytes((tmp_path / "b.h5").read_bytes())

    with pytest.raises(InputError, match=r"a\.h5 is not the file that dataset\.json describes"):
        Store(tmp_path)["a"].image(BOX)

    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"a\.h5 cannot be read as HDF5"):
        Store(tmp_path)["a"].image(BOX)

    (tmp_path / "a.h5").unlink()
    with pytest.raises(InputError, match="lacks the files of a"):
        Store(tmp_path)


def _sum(store: Store) -> int:
    return int(store["a"].image(BOX).sum())


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_an_open_store_works_in_other_processes(tmp_path: Path, method: str) -> None:
    store = write(tmp_path, volume())
    here = _sum(store)  # the parent's handle is open
    with mp.get_context(method).Pool(1) as pool:
        assert pool.map(_sum, [store] * 2) == [here] * 2
    assert _sum(store) == here


def test_pickling_leaves_the_handles_behind(tmp_path: Path) -> None:
    store = write(tmp_path, volume())
    _sum(store)

    assert store._handles
    assert not pickle.loads(pickle.dumps(store))._handles

    stored = pickle.loads(pickle.dumps(store["a"]))
    assert int(stored.image(BOX).sum()) == _sum(store)

    store.close()
    assert _sum(store) == int(stored.image(BOX).sum())


def test_readers_take_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write(tmp_path, volume())
    monkeypatch.setenv("HDF5_USE_FILE_LOCKING", "TRUE")
    with (tmp_path / "a.h5").open("rb") as holder:  # a stale lock, as shared disks keep them
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OSError, match="lock"):
            h5py.File(tmp_path / "a.h5", "r", locking=True)
        assert _sum(store) > 0
