"""`hpc-neuro infer verify OUT`: everything checked against the checksums of its read-back, and repaired.

    --check   only say what is wrong

Found are shards that are missing, have other bytes, or that nobody wrote; done markers that are missing or torn; levels
of the pyramid; the images' metadata; trees and the tables beside them. A repair forgets what is broken and runs `infer`
with the config in OUT, which makes just that again. Trees and tables that are other than written, or that nobody wrote,
may be somebody's work: they are moved to OUT/set_aside. Exit code 0: all is whole (again); 3: something is not.
"""

from __future__ import annotations

import functools
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core import files, run_folder, schema
from hpc_neuro.core.geometry import Block, Shape, VoxelSize, tile_volume
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import ome_zarr
from hpc_neuro.infer.config import InferConfig
from hpc_neuro.infer.done_markers import Marks
from hpc_neuro.infer.tiling import MASK
from hpc_neuro.infer.trees import entry_path, set_aside, tree_files
from hpc_neuro.infer.verb import INDEX, run

log = logging.getLogger(__name__)
_USAGE = "hpc-neuro infer verify OUT [--check]"
_AGAIN = "run the same `hpc-neuro infer` again"


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written, and how to forget it, so that it is made again."""

    text: str
    forget: Callable[[], None]


@dataclass(frozen=True)
class _Image:
    """One volume of a run folder, as its own folder describes it."""

    name: str
    folder: Path
    marks: Marks
    shape: Shape
    voxel_size: VoxelSize
    shard: Shape
    chunk: Shape

    @property
    def blocks(self) -> list[Block]:
        return list(tile_volume(self.shape, self.shard))


def main(args: Sequence[str]) -> int:
    """Check OUT and repair it. Raises InputError for a folder that `infer` did not write."""
    words, flags = [a for a in args if not a.startswith("-")], [a for a in args if a.startswith("-")]
    if flags in (["-h"], ["--help"]):
        sys.stdout.write(f"{_USAGE}\n{__doc__}")
        return 0
    if len(words) != 1 or flags not in ([], ["--check"]):
        raise ConfigError(f"wanted: {_USAGE}")
    out = Path(words[0])
    found = check(out)
    for problem in found:
        log.warning("%s", problem.text)
    if not found or flags:
        log.info("%s: %s", out, f"{len(found)} problems" if found else "whole")
        return 3 if found else 0
    cfg = schema.load(InferConfig, out / "config.yaml", [f"out={out}"])
    for problem in found:
        problem.forget()
    (out / INDEX).unlink(missing_ok=True)
    code = run(cfg)
    left = check(out)
    for problem in left:
        log.error("not repaired: %s", problem.text)
    log.info("%s: %d problems, %s", out, len(found), "not all repaired" if left or code else "all repaired")
    return 3 if left or code else 0


def check(out: Path) -> list[Problem]:
    """Everything that is not as `infer` wrote it. Reads every byte of every shard once."""
    if files.read_json(out / "run.json", f"give a folder that `infer` wrote, or {_AGAIN}").get("verb") != "infer":
        raise InputError(f"{out} was not written by `infer`; give a folder that was")
    found, names = list[Problem](), {p.name.removesuffix(".ome.zarr") for p in out.glob("*.ome.zarr")}
    names |= {p.name for p in (out / "blocks").glob("*")}
    for name in sorted(names, key=run_folder.natural_key):
        image = _described(out, name)
        if isinstance(image, Problem):
            found.append(image)
        else:
            found += [*_metadata(image), *_blocks(image), *_levels(image), *_strangers(image)]
    return found + list(_trees(out))


def _described(out: Path, name: str) -> _Image | Problem:
    folder = out / f"{name}.ome.zarr"

    def forget() -> None:
        if folder.exists():
            ome_zarr.remove(folder)

    try:
        record = ome_zarr.read_record(folder)
    except (InputError, KeyError, TypeError) as error:
        return Problem(f"{name}: what its folder holds cannot be read ({error})", forget)
    if record is None:
        return Problem(f"{name}: {folder} is missing or says nothing of itself", forget)
    marks = Marks(out, name, record["key"])
    z, y, x = record["shape"]
    return _Image(
        name, folder, marks, (z, y, x), tuple(record["voxel_size"]), tuple(record["shard"]), tuple(record["chunk"])
    )


def _metadata(image: _Image) -> Iterator[Problem]:
    """The zarr.json files, compared with what would be written today."""
    with tempfile.TemporaryDirectory() as fresh:
        same = Path(fresh) / image.folder.name
        record = ome_zarr.read_record(image.folder)
        ome_zarr.create(same, "probability", image.shape, image.voxel_size, image.shard, image.chunk, MASK, record)
        for file in sorted(same.rglob("zarr.json")):
            held, wanted = image.folder / file.relative_to(same), file.read_text(encoding="utf-8")
            if not held.exists() or held.read_text(encoding="utf-8", errors="replace") != wanted:
                state = "other than written" if held.exists() else "missing"
                what = f"{image.name}: the metadata {held.relative_to(image.folder)} is {state}"
                yield Problem(what, functools.partial(files.write_text, held, wanted))


def _blocks(image: _Image) -> Iterator[Problem]:
    for block in image.blocks:
        mark, path = image.marks.read(block.index), image.marks.path(block.index)
        where = f"{image.name} block {block.index}"
        if mark is None:
            state = "cannot be read or is of another run" if path.exists() else "is missing"

            def unmarked(path: Path = path) -> None:
                # what the trees and the pyramid were made from is not known any more
                path.unlink(missing_ok=True)
                image.marks.drop_levels()
                entry_path(path.parents[2], image.name).unlink(missing_ok=True)

            yield Problem(f"{where}: its done marker {path.name} {state}", unmarked)
            continue
        for shard in (ome_zarr.shard_path(block.index), ome_zarr.shard_path(block.index, label=MASK)):
            if fault := _fault(image, shard, mark.files.get(shard, "")):
                yield Problem(f"{where}: {fault}", functools.partial(path.unlink, missing_ok=True))


def _levels(image: _Image) -> Iterator[Problem]:
    for number, pieces in enumerate(ome_zarr.plan_shards(image.shape, image.voxel_size, image.shard, MASK), start=1):
        sums = image.marks.level(number)
        if sums is None:
            yield Problem(f"{image.name} level {number}: its done marker is missing or torn", image.marks.drop_levels)
            continue
        for piece in pieces:
            if piece.path not in sums:
                fault = f"the shard {piece.path} is in no marker"
            else:
                fault = _fault(image, piece.path, sums[piece.path])
            if fault:

                def forget(number: int = number, shard: str = piece.path) -> None:
                    held = image.marks.level(number) or {}
                    image.marks.write_level(number, {k: v for k, v in held.items() if k != shard})

                yield Problem(f"{image.name} level {number}: {fault}", forget)


def _fault(image: _Image, shard: str, wanted: str) -> str:
    """What is wrong with a shard of which `wanted` is the SHA-256 (none: it has no file); nothing if all is well."""
    path = image.folder / shard
    if not path.exists():
        return f"the shard {shard} is missing" if wanted else ""
    if not wanted:
        return ""  # a file where none should be is a stranger
    return "" if files.sha256(path) == wanted else f"the shard {shard} has other bytes than were written"


def _strangers(image: _Image) -> Iterator[Problem]:
    """Files that no marker names: where a block is empty, they would show."""
    known = {shard for mark in image.marks.all(image.blocks) for shard in mark.files}
    for number, _ in enumerate(ome_zarr.plan_levels(image.shape, image.voxel_size)):
        known |= {k for k, v in (image.marks.level(number) or {}).items() if v}
    marked = {image.marks.path(b.index) for b in image.blocks if image.marks.read(b.index) is not None}
    unmarked = {
        ome_zarr.shard_path(b.index, label=label)
        for b in image.blocks
        if image.marks.path(b.index) not in marked
        for label in (None, MASK)
    }
    for path in sorted(image.folder.rglob("*")):
        shard = path.relative_to(image.folder).as_posix()
        if path.is_file() and path.name != "zarr.json" and shard not in known | unmarked:
            yield Problem(f"{image.name}: nobody wrote {shard}", path.unlink)


def _trees(out: Path) -> Iterator[Problem]:
    """predictions.json, and the files of trees that the volumes' entries name, each and no others."""
    try:
        index, known = files.read_json(out / INDEX, _AGAIN), set[Path]()
    except InputError as error:
        yield Problem(str(error), lambda: None)
        return
    for name in index:
        path = entry_path(out, name)
        try:
            record = files.read_json(path, _AGAIN)
            written = {out / file: digest for file, digest in record["files"].items()}
        except (InputError, KeyError, TypeError, AttributeError):
            known |= set(tree_files(out, name))
            yield Problem(
                f"{name}: its entry {path.name} is missing or torn", functools.partial(path.unlink, missing_ok=True)
            )
            continue
        known |= set(written)
        if record["entry"] != index[name]:
            yield Problem(f"{name}: {INDEX} says other than its entry does", lambda: None)
        for file, wanted in written.items():
            if not file.exists() or files.sha256(file) != wanted:
                state = "has other bytes than were written" if file.exists() else "is missing"
                forget = functools.partial(set_aside, out, file, path)
                yield Problem(f"{name}: {file.relative_to(out)} {state}", forget)
    for kind in ("swc", "proofread"):
        for file in sorted((out / kind).rglob("*")):
            if file.is_file() and file not in known:
                yield Problem(f"nobody wrote {file.relative_to(out)}", functools.partial(set_aside, out, file))
