"""`infer` and `infer verify` on a journal that was cut, flipped, doubled, mixed with another one, or edited.

HPC_NEURO_FUZZ sets how often each kind of harm is done; each time is at another place.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc_neuro import cli
from hpc_neuro.core.record_log import Record, decode
from hpc_neuro.data.run_journal import JOURNAL, name_block
from tests.helpers.bright_student import save_bright_student
from tests.helpers.journal import list_logs
from tests.helpers.small_volumes import write_crossing

COUNT = int(os.environ.get("HPC_NEURO_FUZZ", "1"))
KEYS = ["block=[8,32,32]", "chunk=[4,16,16]", "page=false", "trees=true"]
KEYS += ["trace.threshold=0.01", "trace.root_snap=100", "trace.min_voxels=1", "trace.signal_gap=0"]
LOG = "000001_0123abcd.log"
"""A name of a log, for decoding lines; records do not depend on it."""
VICTIM = "../../victim"


class Case:
    """A finished run, and the journal of the same image in another grid."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        save_bright_student(folder / "train" / "weights" / "best")
        item = write_crossing(folder / "cells.tif")
        self.command = ["infer", f"model={folder / 'train'}", f"out={self.out}", f"inputs=[{item}]", *KEYS]
        assert cli.main(self.command) == 0
        shutil.copytree(self.out, folder / "reference")
        self.contents = list_contents(self.out)
        assert cli.main([*self.command, f"out={folder / 'other'}", "block=[16,16,32]"]) == 0
        self.other = b"".join(path.read_bytes() for path in list_logs(folder / "other"))

    def restore(self) -> Path:
        """The run as it was; the path of its log."""
        shutil.rmtree(self.out)
        shutil.copytree(self.folder / "reference", self.out)
        (log,) = list_logs(self.out)
        return log


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("journal")
    (root / "work").mkdir()
    # Where names with `..` lead from OUT and from its folders.
    for folder in (root, root / "work"):
        (folder / "victim.ome.zarr").mkdir()
        (folder / "victim.ome.zarr" / "zarr.json").write_text("{}")
        (folder / "victim.json").write_text("{}")
    return Case(root / "work")


def list_contents(out: Path) -> dict[str, bytes]:
    kinds = ("*.ome.zarr/**/*", "swc/**/*", "proofread/*", "predictions.json")
    return {p.relative_to(out).as_posix(): p.read_bytes() for k in kinds for p in out.glob(k) if p.is_file()}


def list_neighbors(case: Case) -> list[tuple[Path, bytes]]:
    """All that lies around OUT."""
    paths = sorted(case.folder.parent.rglob("*"))
    return [(p, p.read_bytes()) for p in paths if p.is_file() and case.out not in p.parents]


# --- Harm to the lines of a log ---

Harm = Callable[[random.Random, list[bytes], bytes], list[bytes]]


def cut_lines(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    data = b"".join(lines)
    return [data[: draw.randrange(len(data))]]


def flip_bits(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    data = bytearray(b"".join(lines))
    for _ in range(draw.choice([1, 3])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return [bytes(data)]


def double_line(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    place = draw.randrange(len(lines))
    return [*lines[:place], draw.choice(lines), *lines[place:]]


def double_all(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    return lines * 2


def drop(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    place = draw.randrange(len(lines))
    return [*lines[:place], *lines[place + 1 :]]


def reverse(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    return lines[::-1]


def insert_other_grid(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    foreign = other.splitlines(keepends=True)
    return draw.choice([[*lines, *foreign], [*foreign, *lines], foreign, [*lines, draw.choice(foreign)]])


def insert_garbage(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
    garbage = draw.choice([draw.randbytes(400), b"\n", b"hello\n", b"\t" * 9 + b"\n", b"0" * 100_000 + b"\n"])
    return draw.choice([[*lines, garbage], [garbage, *lines], [garbage]])


def edit(kind: str, change: Callable[[random.Random, Record], Record]) -> Harm:
    """Another record in the place of one of this kind, with its checksum: another program, or another version."""

    def harm(draw: random.Random, lines: list[bytes], other: bytes) -> list[bytes]:
        records = [(place, decode(line, LOG)) for place, line in enumerate(lines)]
        place, record = draw.choice([(place, r) for place, r in records if r is not None and r.kind == kind])
        return [*lines[:place], change(draw, record).encode(), *lines[place + 1 :]]

    return harm


def edit_facts(**changes: Any) -> Harm:
    def change(draw: random.Random, record: Record) -> Record:
        facts = json.loads(record.body)
        name = draw.choice(sorted(changes))
        return record._replace(body=json.dumps({**facts, name: draw.choice(changes[name])}).encode())

    return edit("block", change)


BODIES = (b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 9000, b"1" * 6000, b'{"index": [0, 0, 0]}')
FILES = ({}, None, {VICTIM: "0" * 64}, {"0/c/9/9/9": "0" * 64}, {"/etc/passwd": "0" * 64})
HARMS: dict[str, Harm] = {
    "cut": cut_lines,
    "flipped": flip_bits,
    "line twice": double_line,
    "all twice": double_all,
    "line lost": drop,
    "reversed": reverse,
    "another grid": insert_other_grid,
    "garbage": insert_garbage,
    "block of another form": edit("block", lambda draw, record: record._replace(body=draw.choice(BODIES))),
    "other settings": edit("block", lambda draw, record: record._replace(key=draw.choice(["", "x" * 4000]))),
    "block of no grid": edit("block", lambda draw, record: record._replace(name=draw.choice(["9_9_9", "", VICTIM]))),
    "another volume": edit("block", lambda draw, record: record._replace(group="nobody")),
    "a task of nothing": edit("begin", lambda draw, record: record._replace(name=draw.choice(["", VICTIM, "x" * 999]))),
    "other facts": edit_facts(index=[[9, 9, 9], "x"], sha256=[None, 5], foreground=[-1, 1e300], skipped=["x", True]),
    "other files": edit_facts(files=FILES),
    "other sizes": edit_facts(sizes=[{"0/c/0/0/0": -1}, {"0/c/0/0/0": 10**30}, None, []]),
    "other times": edit("block", lambda draw, record: record._replace(time=draw.choice([-1.0, 1e300]))),
}


@pytest.mark.parametrize("seed", range(COUNT))
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_journal_is_made_whole(
    case: Case, harm: str, seed: int, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(f"{harm} {seed}")
    log = case.restore()
    before = list_neighbors(case)
    log.write_bytes(b"".join(HARMS[harm](draw, log.read_bytes().splitlines(keepends=True), case.other)))
    # A run that was killed has no index, and goes on.
    if seed % 2:
        (case.out / "predictions.json").unlink()

    assert cli.main(["infer", "verify", str(case.out), "--check"]) in (0, 3)
    assert cli.main(case.command) == 0
    assert list_contents(case.out) == case.contents
    assert cli.main(["infer", "verify", str(case.out)]) == 0
    assert list_contents(case.out) == case.contents
    assert cli.main(["infer", "verify", str(case.out), "--check"]) == 0
    assert list_neighbors(case) == before
    assert "Traceback" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda record: record._replace(kind="renew"),
            "a record of the kind 'renew', which this version does not know",
        ),
        (lambda record: record._replace(group=VICTIM), f"a record of the volume '{VICTIM}'"),
        (lambda record: record._replace(group="a/b"), "a record of the volume 'a/b'"),
        (lambda record: record._replace(group="a\x0bb"), r"a record of the volume 'a\x0bb'"),
        (lambda record: record._replace(group=""), "a record of the volume ''"),
    ],
    ids=["another version", "outside", "deeper", "control character", "no name"],
)
def test_records_that_this_version_cannot_have_written_are_refused(
    case: Case, change: Callable[[Record], Record], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = case.restore()
    lines = log.read_bytes().splitlines(keepends=True)
    record = decode(lines[0], LOG)
    assert record is not None
    log.write_bytes(b"".join([*lines, change(record).encode()]))
    before = list_neighbors(case)

    for words in (case.command, ["infer", "verify", str(case.out)], ["infer", "verify", str(case.out), "--check"]):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["history", str(case.out)]) == 3
    assert list_neighbors(case) == before

    # The advice: remove OUT, then the same command.
    shutil.rmtree(case.out)
    assert cli.main(case.command) == 0
    assert list_contents(case.out) == case.contents


@pytest.mark.parametrize("name", ["000099_89abcdef.log", "000099_all_89abcdef.log", "9" * 40 + "_89abcdef.log"])
@pytest.mark.parametrize("content", ["own", "other", "nothing"])
def test_further_logs(case: Case, name: str, content: str) -> None:
    log = case.restore()
    (case.out / JOURNAL / name).write_bytes({"own": log.read_bytes(), "other": case.other, "nothing": b""}[content])
    assert cli.main(case.command) == 0
    assert list_contents(case.out) == case.contents
    assert cli.main(["infer", "verify", str(case.out)]) == 0
    assert list_contents(case.out) == case.contents


def test_names_of_blocks_are_those_of_the_records(case: Case) -> None:
    lines = case.restore().read_bytes().splitlines(keepends=True)
    records = [record for line in lines if (record := decode(line, LOG)) is not None]
    names = [record.name for record in records if record.kind == "block"]
    assert name_block((0, 0, 0)) in names
    assert len(names) == len(set(names)) == 8
