"""Files that are made of parts hold all items in order, whatever the parts and whoever was stopped."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpc_neuro.core import files, sorted_parts
from hpc_neuro.core.sorted_parts import Items, Stream


def make_items(seed: int, count: int) -> list[tuple[float, int, bytes]]:
    """Items of which many have an equal first key."""
    rng = np.random.default_rng(seed)
    return [(float(rng.integers(0, 5)), n, bytes(rng.integers(97, 123, rng.integers(1, 9)))) for n in range(count)]


def write_parts(folder: Path, items: list[tuple[float, int, bytes]], parts: int) -> None:
    owner = np.random.default_rng(1).integers(0, parts, len(items))
    for part in range(parts):
        own = [item for item, number in zip(items, owner, strict=True) if number == part]
        keys = [np.array([item[0] for item in own]), np.array([item[1] for item in own], dtype=np.int64)]
        streams = {"other": Items([np.zeros(1)], [b"x"]), "table": Items(keys, [item[2] for item in own])}
        sorted_parts.write_part(folder, part, streams, {"count": np.array(len(own))})
        assert (folder / sorted_parts.name_part(part)).exists()


@pytest.mark.parametrize("parts", [1, 3, 8])
@pytest.mark.parametrize(("is_ranked", "run_bytes"), [(False, 1 << 31), (False, 2000), (True, 900)])
def test_all_items_stand_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int, is_ranked: bool, run_bytes: int
) -> None:
    monkeypatch.setattr(sorted_parts, "RANGE_BYTES", 64)
    monkeypatch.setattr(sorted_parts, "RUN_BYTES", run_bytes)
    monkeypatch.setattr(sorted_parts, "_RUN_OPERATIONS", 0)
    monkeypatch.setattr(sorted_parts, "_RUNS_FROM", 0)
    monkeypatch.setattr(files, "CHUNK_BYTES", 32)
    items = make_items(0, 250)
    write_parts(tmp_path / "parts", items, parts)
    stream = Stream("table", tmp_path / "deep" / "table.csv", b"head\n", is_ranked)
    sorted_parts.plan_stream(tmp_path / "parts", parts, stream)

    runs = sorted_parts.list_missing_runs(tmp_path / "parts", stream)
    assert (len(runs) > 1) == (parts > 1 and run_bytes < 10_000)
    for number in [*runs[::-1], *runs[:1]]:
        sorted_parts.write_run(tmp_path / "parts", stream, number)
    assert sorted_parts.list_missing_runs(tmp_path / "parts", stream) == []

    # Ranges are written in any order, and some twice: a worker may have been killed before its range counted.
    ranges = sorted_parts.list_missing_ranges(tmp_path / "parts", stream)
    assert len(ranges) > 5
    for number in [*ranges[::-1], *ranges[:3]]:
        sorted_parts.write_range(tmp_path / "parts", stream, number)
    assert sorted_parts.list_missing_ranges(tmp_path / "parts", stream) == []
    for number in sorted_parts.list_missing_sums(tmp_path / "parts", stream):
        sorted_parts.hash_range(tmp_path / "parts", stream, number)
    assert not stream.path.exists()

    digest = sorted_parts.finish_stream(tmp_path / "parts", stream)
    texts = [item[2] for item in sorted(items)]
    ranked = [b"%d,%b" % (rank, text) for rank, text in enumerate(texts, start=1)]
    assert stream.path.read_bytes() == b"head\n" + b"".join(ranked if is_ranked else texts)
    assert digest == files.checksum(stream.path)
    assert files.has_checksum(stream.path, digest)
    assert sorted_parts.finish_stream(tmp_path / "parts", stream) == digest, "a run killed after the rename"
    facts = [sorted_parts.read_facts(tmp_path / "parts", part) for part in range(parts)]
    assert sum(int(part["count"]) for part in facts) == 250


def test_a_stream_without_items_is_its_header(tmp_path: Path) -> None:
    sorted_parts.write_part(tmp_path, 0, {"a": Items([np.zeros(0), np.zeros(0, dtype=np.int64)], [])}, {})
    stream = Stream("a", tmp_path / "a.csv", b"head\n", is_ranked=True)
    sorted_parts.plan_stream(tmp_path, 1, stream)
    assert sorted_parts.list_missing_ranges(tmp_path, stream) == []
    for number in sorted_parts.list_missing_sums(tmp_path, stream):
        sorted_parts.hash_range(tmp_path, stream, number)
    assert sorted_parts.finish_stream(tmp_path, stream) == files.sha256(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == b"head\n"


def test_a_small_file_has_its_sha256_as_checksum_and_a_change_of_a_large_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(range(100)))
    assert files.checksum(path) == files.sha256(path)
    monkeypatch.setattr(files, "CHUNK_BYTES", 32)
    recorded = files.checksum(path)
    assert recorded.startswith("chunks-")
    assert files.has_checksum(path, recorded)
    path.write_bytes(bytes(range(99)) + b"x")
    assert not files.has_checksum(path, recorded)


def test_runs_pay_where_many_ranges_need_many_parts() -> None:
    gib = 1 << 30
    assert sorted_parts.choose_runs(20, 10, gib) == (0, 0)
    for parts, ranges in ((630, 40), (14_896, 1200)):
        stripes, groups = sorted_parts.choose_runs(parts, ranges, ranges * sorted_parts.RANGE_BYTES)
        assert ranges * sorted_parts.RANGE_BYTES / (stripes * groups) <= 1.01 * sorted_parts.RUN_BYTES
        assert stripes * parts + ranges * groups < parts * ranges / 20


def test_a_range_opens_runs_and_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_parts, "RANGE_BYTES", 64)
    monkeypatch.setattr(sorted_parts, "RUN_BYTES", 5000)
    monkeypatch.setattr(sorted_parts, "_RUNS_FROM", 0)
    write_parts(tmp_path / "parts", make_items(0, 500), 12)
    stream = Stream("table", tmp_path / "table.csv")
    sorted_parts.plan_stream(tmp_path / "parts", 12, stream)
    for number in sorted_parts.list_missing_runs(tmp_path / "parts", stream):
        sorted_parts.write_run(tmp_path / "parts", stream, number)
    for part in range(12):
        (tmp_path / "parts" / f"text_{part}.bin").unlink()
    for number in sorted_parts.list_missing_ranges(tmp_path / "parts", stream):
        sorted_parts.write_range(tmp_path / "parts", stream, number)


def test_a_part_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    write_parts(tmp_path, make_items(0, 50), 1)
    stream = Stream("table", tmp_path / "table.csv")
    sorted_parts.plan_stream(tmp_path, 1, stream)
    text = tmp_path / "text_0.bin"
    text.write_bytes(text.read_bytes()[:-1])
    with pytest.raises(OSError, match="too early"):
        sorted_parts.write_range(tmp_path, stream, 0)
