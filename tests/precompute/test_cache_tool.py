"""`cache verify` finds what is wrong and mends it; `cache info` says what is there and who used it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from hpc_neuro import precompute
from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.feature_cache import MANIFEST, FeatureCache, record_use
from hpc_neuro.data.store import Store
from hpc_neuro.models.teacher import load_teacher
from hpc_neuro.precompute import cache_tool
from tests.helpers.tiny_store import write_store
from tests.precompute.conftest import Configure
from tools.bench import live_teacher as live


@pytest.fixture
def cache(cache_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache_folder, tmp_path / "cache")


def logged_text(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hpc_neuro")


def damage(shard: Path) -> None:
    """Change one feature, not the checksum."""
    with h5py.File(shard, "r+") as file:
        file["features"][0, 0, 0, 0, 0] += np.float16(1)


def test_a_sound_cache_passes(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert cache_tool.main(["verify", str(cache)]) == 0
    assert "20 of 20 shards are there and have their checksums" in logged_text(caplog)
    assert "lowest cosine of a token to the live teacher 1.0000" in logged_text(caplog)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before


@pytest.mark.parametrize("tile", ["512", "32"])
def test_a_live_teacher_needs_whole_tiles_for_what_the_cache_gives(
    configure: Configure, tmp_path: Path, tile: str
) -> None:
    """What the benchmark's step without a cache computes is the same; a teacher that sees the crop alone is not."""
    cfg = configure(tmp_path / "c", f"tile={tile}", "halo=16", "splits=[test]")
    assert precompute.run(cfg) == 0

    volume, teacher, box, patch = (
        Store(cfg.store)["c"],
        load_teacher(cfg.teacher),
        Box((8, 16, 16), (16, 48, 48)),
        (8, 16, 16),
    )
    cached = FeatureCache(cfg.out).read_crop("c", box, patch)
    same, alone = (ask(cfg, volume, teacher, box, patch) for ask in (live.compute_as_cached, live.compute_from_crop))

    for view, features in cached.items():
        torch.testing.assert_close(same[view], features, atol=2e-3, rtol=2e-3)
        assert alone[view].shape == features.shape
        assert torch.cosine_similarity(alone[view].float(), features.float(), dim=1).min() < 0.999


def test_damaged_and_missing_shards_are_listed_and_built_again(
    cache_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(cache / "a.z.000000.h5")
    (cache / "b.y.000016.h5").unlink()
    (cache / "b.x.000000.h5").write_bytes(b"not HDF5")

    assert cache_tool.main(["verify", str(cache), "rebuild=false", "slices=2"]) == 3
    text = logged_text(caplog)

    assert "a.z.000000.h5: its features do not have the checksum" in text
    assert "b.y.000016.h5: missing" in text
    assert "b.x.000000.h5: of another teacher, image or config, or not readable" in text
    assert cache_tool.main(["verify", str(cache), "slices=2"]) == 0
    assert "built again: 3 shards; bad now: 0" in logged_text(caplog)
    for shard in cache_folder.glob("*.h5"):
        assert (cache / shard.name).read_bytes() == shard.read_bytes()
    assert [s["sha256"] for s in FeatureCache(cache).manifest["shards"]] == [
        s["sha256"] for s in FeatureCache(cache_folder).manifest["shards"]
    ]


def test_wrong_features_with_a_right_checksum_are_found_by_the_teacher(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a bug in the writer would leave them: checksum and manifest agree, the content is of other slices."""
    from hpc_neuro.core import files
    from hpc_neuro.data.feature_cache import ShardSpec, read_shard_record

    manifest = files.read_json(cache / MANIFEST, "")
    shards = {s["file"]: s for s in manifest["shards"]}
    path, other = cache / "a.z.000000.h5", cache / "b.z.000000.h5"
    with h5py.File(path, "r+") as file, h5py.File(other) as other_file:
        file["features"][...] = other_file["features"][...]
        file.attrs.modify("sha256", other_file.attrs["sha256"])
    shards[path.name]["sha256"] = read_shard_record(path, ShardSpec.from_json(shards[path.name]["unit"]))["sha256"]
    files.write_json(cache / MANIFEST, manifest)

    assert cache_tool.main(["verify", str(cache), "slices=1000", "rebuild=false"]) == 3
    assert "a.z.000000.h5: cosine" in logged_text(caplog)


def test_a_store_that_moved_is_given_anew(
    store: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = shutil.copytree(store, tmp_path / "moved")
    (cache / "b.y.000016.h5").unlink()
    assert cache_tool.main(["verify", str(cache), f"store={moved}", "slices=1"]) == 0
    assert "built again: 1 shard" in logged_text(caplog)


def test_another_teacher_is_refused_before_a_shard_is_touched(cache: Path) -> None:
    before = {p.name: p.read_bytes() for p in cache.iterdir()}
    with pytest.raises(InputError, match=r"holds features of the teacher .* seed 0.* the given one is .* seed 1"):
        cache_tool.main(["verify", str(cache), "teacher.seed=1"])
    assert {p.name: p.read_bytes() for p in cache.iterdir()} == before


def test_a_build_goes_on_with_its_own_teacher_only(configure: Configure, cache: Path) -> None:
    """Weights may have moved; here the record says that others made the shards."""
    record = files.read_json(cache / "run.json", "")
    assert record["inputs"]["teacher"] == load_teacher(configure(cache).teacher).identity["sha256"]

    record["inputs"]["teacher"] = "ab" * 32
    files.write_json(cache / "run.json", record)

    with pytest.raises(ConfigError, match="the input teacher changed"):
        precompute.run(configure(cache))


@pytest.mark.parametrize("key", ["stride_v=4", "store={}"])
def test_asked_about_another_cache_it_removes_nothing(cache: Path, tmp_path: Path, key: str) -> None:
    """Every shard looks stale then."""
    other = write_store(tmp_path / "other", {"a": "train", "b": "train"}, digest="another")
    before = {p.name: p.read_bytes() for p in cache.glob("*.h5")}
    with pytest.raises(ConfigError, match="another|changed"):
        cache_tool.main(["verify", str(cache), key.format(other), "slices=1"])
    assert {p.name: p.read_bytes() for p in cache.glob("*.h5")} == before


def test_info_says_what_is_held_and_by_whom_it_is_used(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_tool.main(["info", str(cache)]) == 0
    text = capsys.readouterr().out

    assert "teacher random vit_tiny_patch16_224 seed 0, RANDOM WEIGHTS" in text
    assert "layers [3, 11], views z y x, augment_views none" in text
    assert "20 shards" in text
    assert "used by no training yet" in text

    for _ in range(2):  # a training that was started twice is one training
        record_use(cache, tmp_path / "run_1")
    record_use(cache, tmp_path / "run_2")
    (cache / "b.y.000016.h5").unlink()
    cache_tool.main(["info", str(cache)])
    text = capsys.readouterr().out

    assert text.count("used by") == 2
    assert f"used by {tmp_path / 'run_1'} on " in text
    assert "MISSING b.y.000016.h5" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["verify", "{}", "slices=0"], "slices=0: want a int"),
        (["verify", "{}", "slize=3"], "slize"),
        (["mend", "{}"], "want `cache verify OUT` or `cache info OUT`"),
        (["info", "{}", "x=1"], "cache info has no key x=1"),
    ],
)
def test_bad_words_are_refused(cache_folder: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cache_tool.main([w.format(cache_folder) for w in words])


def test_what_is_no_cache_is_named(tmp_path: Path) -> None:
    for command in ("verify", "info"):
        with pytest.raises(InputError, match=r"manifest.json does not exist; .*hpc-neuro precompute"):
            cache_tool.main([command, str(tmp_path)])

    (tmp_path / MANIFEST).write_text("{}")
    for command in ("verify", "info"):
        with pytest.raises(InputError, match=r"manifest.json is not of format \d; build the cache again"):
            cache_tool.main([command, str(tmp_path)])
    with pytest.raises(InputError, match="is not of format"):
        FeatureCache(tmp_path)


def test_a_quality_without_a_measure_is_refused(cache: Path) -> None:
    path = cache / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["coding_quality"] = {"z": {"cosine": [1.0], "relative_error": [0.0]}}
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"coding_quality\.z\.explained_variance"):
        cache_tool.main(["info", str(cache)])
