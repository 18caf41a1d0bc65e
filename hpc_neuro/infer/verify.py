"""`hpc-neuro infer verify OUT`: check everything against the checksums of its read-back, and repair it.

    --check   only report what is wrong

Reported are shards that are missing, have other bytes, or that no marker names; done markers that are missing or of
another form; damaged lines of the journal; levels of the pyramid; the images' metadata; trees and the tables beside
them. A repair forgets what is broken and runs
`infer` with the config in OUT, which writes just that again. Trees and tables that differ from what was written, or
that `infer` did not write, may be the work of people: they are moved to OUT/set_aside. Exit code 0: all is whole
(again); 3: something is not.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hpc_neuro.core import files, folder_lock, run_folder, schema
from hpc_neuro.core.constants import EXIT_DONE, EXIT_FAILURES
from hpc_neuro.core.files import format_count
from hpc_neuro.core.geometry import Block, Shape, VoxelSize, tile_volume
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr
from hpc_neuro.data.predictions import INDEX, read_predictions
from hpc_neuro.data.run_journal import JOURNAL, RunJournal, describe_damage, require_current_form
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.done_markers import DoneMarkers
from hpc_neuro.infer.tiling import MASK
from hpc_neuro.infer.trees import EntryRecord, entry_path, list_tree_files, read_entry_record, set_aside
from hpc_neuro.infer.verb import run

log = logging.getLogger(__name__)
_USAGE = "hpc-neuro infer verify OUT [--check]"
_HINT = "run the same `hpc-neuro infer` again"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written, and how to forget it, so that it is written again."""

    text: str
    forget: Callable[[], None]


_Size = Annotated[int, Field(ge=1, lt=2**31)]
"""[voxel] Coordinates of voxels are 32-bit integers."""


@dataclass(frozen=True)
class _ImageRecord:
    """What the folder of an image says of it; see VolumeRun.record."""

    key: str
    shape: tuple[_Size, _Size, _Size]
    voxel_size: tuple[float, float, float]
    shard: tuple[_Size, _Size, _Size]
    chunk: tuple[_Size, _Size, _Size]


@dataclass(frozen=True)
class _ProbabilityImage:
    """The image of one volume of a run folder, as its own folder describes it."""

    name: str
    folder: Path
    markers: DoneMarkers
    shape: Shape
    voxel_size: VoxelSize
    shard: Shape
    chunk: Shape

    @property
    def blocks(self) -> list[Block]:
        return list(tile_volume(self.shape, self.shard))


def main(args: Sequence[str]) -> int:
    """Check OUT and repair it. Raises InputError for a folder that `infer` did not write."""
    words = [arg for arg in args if not arg.startswith("-")]
    flags = [arg for arg in args if arg.startswith("-")]

    if flags in (["-h"], ["--help"]):
        sys.stdout.write(f"{_USAGE}\n{__doc__}")
        return EXIT_DONE

    if len(words) != 1 or flags not in ([], ["--check"]):
        raise ConfigError(f"expected: {_USAGE}")

    out = Path(words[0])
    problems = check(out)
    for problem in problems:
        log.warning("%s", problem.text)

    # What failed left nothing behind that could be compared.
    failures = [] if problems else run_folder.read_record(out, _HINT).get("failures", [])
    if failures:
        for line in failures:
            log.warning("failed when it ran: %s", line)
        log.info("%s: what was written is whole; %s failed, which the same command tries again", out, len(failures))
        return EXIT_FAILURES

    # --check is the only flag; without it, faults are repaired.
    if not problems or flags:
        log.info("%s: %s", out, format_count(len(problems), "problem") if problems else "whole")
        return EXIT_FAILURES if problems else EXIT_DONE
    return _repair(out, problems)


def check(out: Path) -> list[Problem]:
    """Everything that is not as `infer` wrote it. Reads every byte of every shard once."""
    record = run_folder.read_record(out, f"give a folder that `infer` wrote, or {_HINT}")
    if record["verb"] != "infer":
        raise InputError(f"{out} was not written by `infer`; give a folder that was")

    require_current_form(out)
    journal = RunJournal(out)
    journal.refresh()
    problems = [
        Problem(f"{JOURNAL}/{line.log}: {describe_damage(line)}", functools.partial(_forget_damage, out, journal))
        for line in journal.damaged_lines
    ]

    # A volume whose image is gone still has its markers.
    names = {path.name.removesuffix(".ome.zarr") for path in out.glob("*.ome.zarr")} | set(journal.list_volumes())

    for name in sorted(names, key=run_folder.natural_key):
        image = _open_image(out, name, journal)

        # Without its record nothing else of an image can be checked.
        if isinstance(image, Problem):
            problems.append(image)
        else:
            problems += [
                *_check_metadata(image),
                *_check_blocks(image),
                *_check_levels(image),
                *_check_unknown_files(image),
            ]
    return problems + list(_check_trees(out))


def _repair(out: Path, problems: list[Problem]) -> int:
    # The folder may have been moved since its config was written.
    cfg = schema.load(InferConfig, out / "config.yaml", [f"out={out}"])

    with folder_lock.hold_folder(out):
        for problem in problems:
            problem.forget()

        # Without the index the run is not taken for complete.
        (out / INDEX).unlink(missing_ok=True)
        exit_code = run(cfg)

    # Repaired files are read once more: a faulty disk may be the cause.
    remaining = check(out)
    for problem in remaining:
        log.error("not repaired: %s", problem.text)

    is_repaired = not remaining and exit_code == EXIT_DONE
    outcome = "all repaired" if is_repaired else "not all repaired"
    log.info("%s: %s, %s", out, format_count(len(problems), "problem"), outcome)
    return EXIT_DONE if is_repaired else EXIT_FAILURES


def _forget_damage(out: Path, journal: RunJournal) -> None:
    """Without a record it is unknown to what values pyramids and trees belong, so they go with the damaged lines."""
    for name in journal.list_volumes():
        entry_path(out, name).unlink(missing_ok=True)
    journal.forget_damage()


def _open_image(out: Path, name: str, journal: RunJournal) -> _ProbabilityImage | Problem:
    folder = out / f"{name}.ome.zarr"

    def forget() -> None:
        # Records of a volume that the run does not have stay otherwise, and are found again.
        DoneMarkers(out, name, "", journal).clear()
        if folder.exists():
            ome_zarr.remove(folder)

    try:
        content = ome_zarr.read_record(folder)
        if content is None:
            return Problem(f"{name}: {folder} is missing, or does not say what it belongs to", forget)
        record = files.check_form(content, _ImageRecord, str(folder / "zarr.json"), "it is made again")
    except InputError as error:
        return Problem(f"{name}: what its folder holds cannot be read ({error})", forget)

    return _ProbabilityImage(
        name=name,
        folder=folder,
        markers=DoneMarkers(out, name, record.key, journal),
        shape=record.shape,
        voxel_size=record.voxel_size,
        shard=record.shard,
        chunk=record.chunk,
    )


def _check_metadata(image: _ProbabilityImage) -> Iterator[Problem]:
    """Compare the zarr.json files with what would be written today."""
    with tempfile.TemporaryDirectory() as fresh:
        expected_folder = Path(fresh) / image.folder.name
        record = ome_zarr.read_record(image.folder)

        ome_zarr.create(
            expected_folder, "probability", image.shape, image.voxel_size, image.shard, image.chunk, MASK, record
        )

        # Metadata follow from the record, so they can be restored without predicting anything.
        for file in sorted(expected_folder.rglob("zarr.json")):
            path, expected = image.folder / file.relative_to(expected_folder), file.read_text(encoding="utf-8")

            # A torn file may hold bytes that are no text.
            if path.exists() and path.read_text(encoding="utf-8", errors="replace") == expected:
                continue

            state = "other than written" if path.exists() else "missing"
            text = f"{image.name}: the metadata {path.relative_to(image.folder)} is {state}"
            yield Problem(text, functools.partial(files.write_text, path, expected))


def _check_blocks(image: _ProbabilityImage) -> Iterator[Problem]:
    """Compare the shards of level 0 with the checksums in their markers."""
    for block in image.blocks:
        marker, is_recorded = image.markers.read(block.index), image.markers.has_record(block.index)
        label = f"{image.name} block {block.index}"

        if marker is None:
            state = "cannot be read or is of another run" if is_recorded else "is missing"
            text = f"{label}: its done marker in {JOURNAL} {state}"

            yield Problem(text, functools.partial(_forget_block, image, block.index))
            continue

        # Without its marker a block is written again, both shards of it.
        for shard in (ome_zarr.shard_path(block.index), ome_zarr.shard_path(block.index, label=MASK)):
            if fault := _find_shard_fault(image, shard, marker.files.get(shard, "")):
                yield Problem(f"{label}: {fault}", functools.partial(image.markers.forget_block, block.index))


def _forget_block(image: _ProbabilityImage, index: Shape) -> None:
    """Without its marker it is unknown whether the pyramid and the trees belong to a block, so they go too."""
    image.markers.forget_block(index)
    image.markers.forget_levels()
    entry_path(image.markers.out, image.name).unlink(missing_ok=True)


def _check_levels(image: _ProbabilityImage) -> Iterator[Problem]:
    """Compare the shards of the pyramid with the checksums in their markers."""
    checksums = image.markers.read_levels()
    levels = ome_zarr.plan_shards(image.shape, image.voxel_size, image.shard, MASK)
    for number, shards in enumerate(levels, start=1):
        # Shards of a level are built one by one, so only the faulty ones are forgotten.
        for shard in shards:
            if shard.path in checksums:
                fault = _find_shard_fault(image, shard.path, checksums[shard.path])
            else:
                fault = f"the shard {shard.path} is in no marker"

            if fault:
                forget = functools.partial(image.markers.forget_shard, shard.path)
                yield Problem(f"{image.name} level {number}: {fault}", forget)


def _find_shard_fault(image: _ProbabilityImage, shard: str, checksum: str) -> str:
    """What is wrong with a shard whose SHA-256 is `checksum` ("": it has no file); "" when nothing is."""
    path = image.folder / shard
    if not path.exists():
        return f"the shard {shard} is missing" if checksum else ""

    # A file where none should be is found by `_check_unknown_files`.
    if not checksum or files.sha256(path) == checksum:
        return ""
    return f"the shard {shard} has other bytes than were written"


def _check_unknown_files(image: _ProbabilityImage) -> Iterator[Problem]:
    """Report files that no marker names: a viewer would show them where a block is empty."""
    expected = set[str]()
    for block in image.blocks:
        marker = image.markers.read(block.index)
        shards = [ome_zarr.shard_path(block.index, label=label) for label in (None, MASK)]
        # The shards of a block without a marker are written again, whatever they hold.
        expected |= set(shards if marker is None else marker.files)

    expected |= {shard for shard, checksum in image.markers.read_levels().items() if checksum}

    for path in sorted(image.folder.rglob("*")):
        shard = path.relative_to(image.folder).as_posix()

        # The metadata are compared in a check of their own.
        if path.is_file() and path.name != "zarr.json" and shard not in expected:
            yield Problem(f"{image.name}: `infer` did not write {shard}", path.unlink)


def _check_trees(out: Path) -> Iterator[Problem]:
    """Compare predictions.json and the files of trees with the volumes' entries."""
    try:
        index = read_predictions(out, _HINT, compare=False)
    except InputError as error:
        # A repair writes the index anyhow, so there is nothing to forget.
        yield Problem(str(error), lambda: None)
        return

    expected = set[Path]()
    for name in index:
        record = read_entry_record(out, name)

        # Without the record no file can be told from that of a person, so none is reported.
        if record is None:
            expected |= set(list_tree_files(out, name))
            path = entry_path(out, name)
            forget = functools.partial(path.unlink, missing_ok=True)
            yield Problem(f"{name}: its entry {path.name} is missing or torn", forget)
        else:
            expected |= {out / file for file in record.files}
            yield from _check_entry(out, name, record, index[name])

    for kind in ("swc", "proofread"):
        for file in sorted((out / kind).rglob("*")):
            if file.is_file() and file not in expected:
                forget = functools.partial(set_aside, out, file)
                yield Problem(f"`infer` did not write {file.relative_to(out)}", forget)


def _check_entry(out: Path, name: str, record: EntryRecord, indexed: Any) -> Iterator[Problem]:
    """Compare one volume's entry with the index, and its files with their checksums."""
    # The index is written again by every repair.
    if record.entry != indexed:
        yield Problem(f"{name}: {INDEX} differs from its entry", lambda: None)

    for file, checksum in record.files.items():
        path = out / file
        if not path.exists() or not files.has_checksum(path, checksum):
            state = "has other bytes than were written" if path.exists() else "is missing"

            # The file may be the corrected work of a person, so it is moved and not removed.
            forget = functools.partial(set_aside, out, path, entry_path(out, name))
            yield Problem(f"{name}: {file} {state}", forget)
