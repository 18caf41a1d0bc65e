"""The forecast: bytes as they come to be, and what would fit where there is too little room."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from hpc_neuro import precompute
from hpc_neuro.core.schema import InputError, load
from hpc_neuro.data.store import Store
from hpc_neuro.precompute import estimate
from tests.precompute.conftest import Configure


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_bytes_are_those_that_are_written(configure: Configure, store: Path, cache_folder: Path) -> None:
    cfg = configure(cache_folder)
    planned = estimate.estimate_bytes(cfg, estimate.plan_all_shards(cfg, Store(store), 16), 192)
    written = sum(p.stat().st_size for p in cache_folder.glob("*.h5"))
    assert written <= planned < 1.15 * written + 1e5


def test_the_lines_say_shapes_bytes_files_space_and_time(configure: Configure, tmp_path: Path) -> None:
    text = "\n".join(precompute.forecast(configure(tmp_path / "c", "augment_views=[flip_y]")))
    assert "those of flip_y" in text
    assert "shards of at most [2, 2, 4, 4] slices, layers, token rows, columns" in text
    assert "are free" in text
    assert "s on 1 rank, by a timed probe" in text
    assert not (tmp_path / "c").exists()


def test_what_is_refused_says_for_every_knob_what_would_fit(
    configure: Configure, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(tmp_path / "c", "augment_views=[flip_y,rot90]")
    size = estimate.estimate_bytes(cfg, estimate.plan_all_shards(cfg, Store(store), 16), 192)
    free = int(size * 0.75)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(size, size - free, free))

    with pytest.raises(InputError, match=r"needs .* but only .* are free there; make room") as refusal:
        precompute.run(cfg)
    assert not (tmp_path / "c").exists()  # so that the milder config can have it

    text = str(refusal.value)
    proposals = [line.split()[0] for line in text.splitlines() if "would fit" in line]

    assert {p.partition("=")[0] for p in proposals} >= {"views", "augment_views", "stride_v", "pca"}
    for proposal in proposals:  # each is a key as it is typed, and does fit
        key, value = proposal.split("=", 1)
        less = load(precompute.PrecomputeConfig, None, make_keys(cfg, key, value))
        assert estimate.estimate_bytes(less, estimate.plan_all_shards(less, Store(store), 16), 192) <= 0.99 * free
    assert "layers alone would not do" in text or "layers=[-1] would fit" in text


def make_keys(cfg: precompute.PrecomputeConfig, key: str, value: str) -> list[str]:
    keys = {"store": cfg.store, "out": cfg.out, "teacher.model": "random", "stride_v": 8, "slab": 2, "layers": "[3,-1]"}
    return [f"{k}={v}" for k, v in {**keys, "augment_views": "[flip_y,rot90]", key: value}.items()]


def test_too_many_files_are_refused(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    few = os.statvfs_result((*real[:7], 30, *real[8:]))  # f_favail; 20 shards are to be made
    monkeypatch.setattr(os, "statvfs", lambda path: few)
    with pytest.raises(InputError, match=r"needs 20 files .* only 30 more can be made there; .* slab=4"):
        precompute.run(configure(tmp_path / "c"))
    assert not (tmp_path / "c").exists()


def test_a_quota_is_asked_how_much_it_allows(
    configure: Configure, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No quota is set where tests run: the answer of the file system is replaced."""
    cfg = configure(tmp_path / "c")
    size = estimate.estimate_bytes(cfg, estimate.plan_all_shards(cfg, Store(store), 16), 192)
    monkeypatch.setattr(estimate, "_is_granted", lambda folder, asked: asked <= size * 0.75)

    with pytest.raises(InputError, match="your quota allows only .* are free") as refusal:
        precompute.forecast(cfg)

    text = str(refusal.value)
    room = float(text.partition("allows only ")[2].split()[0])

    assert room == pytest.approx(size * 0.75 / 1e3, rel=0.02)
    assert "views=[z,y] would fit" in text


def test_a_reservation_is_given_back(tmp_path: Path) -> None:
    assert estimate._is_granted(tmp_path, 10 << 20) in (True, None)
    assert estimate._is_granted(tmp_path, 1 << 60) in (False, None)
    assert not list(tmp_path.iterdir())


def test_knobs_do_not_touch_one_another(configure: Configure, tmp_path: Path) -> None:
    cfg = configure(tmp_path)
    for knob, settings in estimate._list_milder_values(cfg, 192):
        for setting in settings:
            changed = dataclasses.replace(cfg, **{knob: setting})
            assert dataclasses.replace(changed, **{knob: getattr(cfg, knob)}) == cfg
