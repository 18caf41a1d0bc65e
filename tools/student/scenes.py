"""The volumes of the bundled student on disk: synthetic scenes, real pairs, and one store of both."""

from __future__ import annotations

import csv
import functools
import json
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tifffile

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Shape
from hpc_neuro.data import swc
from hpc_neuro.data.store.reader import INDEX
from tools.student.domain import Scene, draw_scene

log = logging.getLogger(__name__)
MANIFEST = "manifest.csv"
"""The list of the scenes, for `prepare`."""
_SHAPE: Shape = (32, 160, 160)
"""[voxel] Size of a scene."""
_LEAST_NODES = 20
"""Nodes of a scene's trees, at least; a scene that shows less is drawn again."""


def write_scenes(folder: Path, seed: int, count: int, gold: Sequence[Path], workers: int) -> None:
    """Write scenes that are missing, and the manifest. The same arguments give the same files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"scene_{number:05d}" for number in range(count)]
    missing = [number for number, name in enumerate(names) if not (folder / f"{name}.json").exists()]
    log.info("scenes: %d of %d are there", count - len(missing), count)

    write = functools.partial(_write_scene, folder, seed, tuple(gold))
    for written, _ in enumerate(_map_numbers(write, missing, workers), start=1):
        if written % 50 == 0:
            log.info("scenes: %d of %d", count - len(missing) + written, count)

    rows = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    with files.atomic(folder / MANIFEST) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "swc", "voxel_size", "split", "swc_unit"])
        writer.writeheader()
        for name, row in zip(names, rows, strict=True):
            size = " ".join(f"{value:.5f}" for value in row["voxel_size"])
            writer.writerow(
                {
                    "id": name,
                    "image": f"{name}.tif",
                    "swc": f"{name}.swc",
                    "voxel_size": size,
                    "split": row["split"],
                    "swc_unit": "voxel",
                }
            )


def _map_numbers(write: Any, numbers: list[int], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(write, numbers)
        return

    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(write, numbers, chunksize=4)


def _write_scene(folder: Path, seed: int, gold: tuple[Path, ...], number: int) -> None:
    name = f"scene_{number:05d}"
    scene = draw_visible(seed, number, gold)

    with files.atomic(folder / f"{name}.tif") as part:
        tifffile.imwrite(part, scene.image, compression="zlib", metadata={"axes": "ZYX"}, photometric="minisblack")
    swc.write(folder / f"{name}.swc", scene.tree, unit="voxel", voxel_size=scene.voxel_size)

    # The record comes last: with it the scene counts as written.
    split = "val" if is_validation(number) else "train"
    record = {"voxel_size": scene.voxel_size, "split": split, **scene.facts}
    files.write_json(folder / f"{name}.json", record)


def is_validation(number: int) -> bool:
    """Whether a scene is held out of training: every fortieth is."""
    return number % 40 == 39


def draw_visible(seed: int, number: int, gold: tuple[Path, ...]) -> Scene:
    """The scene of a number; one that shows too little is drawn anew from another seed."""
    for attempt in range(100):
        scene = draw_scene(seed + 1_000_003 * attempt, number, _SHAPE, gold)
        if len(scene.tree) >= _LEAST_NODES and scene.image.min() < scene.image.max():
            return scene
    raise AssertionError(f"scene {number} of seed {seed} shows nothing in 100 draws")


def join_stores(out: Path, stores: Sequence[Path]) -> None:
    """Write a store of links to all volumes of `stores`, which keep their splits. Ids must differ."""
    out.mkdir(parents=True, exist_ok=True)

    joint: dict[str, Any] = {}
    for store in stores:
        index = files.read_json(store / INDEX, "prepare it again", dict)
        for name, record in index["volumes"].items():
            if name in joint.get("volumes", {}):
                raise ValueError(f"{name} is in two stores")

            link = out / record["file"]
            link.unlink(missing_ok=True)
            link.symlink_to((store / record["file"]).resolve())

        joint = {**index, "volumes": {**joint.get("volumes", {}), **index["volumes"]}}
    files.write_json(out / INDEX, joint)
