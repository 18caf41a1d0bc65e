"""The neurons of a downloaded data set: an image and a tree each, and the fold that holds it out."""

from __future__ import annotations

import csv
import fnmatch
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_neuro.core import files
from hpc_neuro.core.image_names import is_system_file
from hpc_neuro.core.schema import InputError
from hpc_neuro.data.formats import image_stem

COLUMNS = ("id", "image", "swc", "voxel_size", "split", "swc_unit")
"""Columns of the manifest, as `hpc-neuro prepare manifest=` reads them."""


@dataclass(frozen=True)
class Neuron:
    """An image and the tree that people traced in it."""

    id: str
    image: Path
    tree: Path


def find_neurons(data: Path, part: str, tree: str) -> list[Neuron]:
    """Every neuron below a folder, sorted by id.

    A folder holds pairs of one stem, or one image and one tree among several SWC files. part: text that the path of a
    neuron has to hold, in any case; "" for all. tree: pattern of the name of the tree, where a folder has several.
    Raises InputError for a folder without neurons, and for one whose image or tree is not decided.
    """
    if not data.is_dir():
        raise InputError(f"{data} is not a folder; docs/reproduce.md says where to download the data")

    neurons: dict[str, Neuron] = {}
    for folder in sorted({path.parent for path in data.rglob("*.swc")}):
        if part.lower() not in str(folder.relative_to(data)).lower():
            continue
        for neuron in _find_in_folder(data, folder, tree):
            if neuron.id in neurons:
                raise InputError(f"{neuron.image} and {neurons[neuron.id].image} would both be {neuron.id}; rename one")
            neurons[neuron.id] = neuron

    if not neurons:
        condition = f" with {part!r} in their path" if part else ""
        raise InputError(
            f"{data} holds no folders{condition} with an image and an SWC file; unpack the archives, or --part"
        )
    return [neurons[name] for name in sorted(neurons)]


def _find_in_folder(data: Path, folder: Path, tree: str) -> list[Neuron]:
    entries = [path for path in sorted(folder.iterdir()) if not is_system_file(path)]
    images = {stem: path for path in entries if (stem := image_stem(path)) is not None}
    trees = [path for path in entries if path.suffix.lower() == ".swc"]

    pairs = [Neuron(path.stem, images[path.stem], path) for path in trees if path.stem in images]
    if pairs:
        return pairs
    if not images:
        return []

    # Releases of BigNeuron have a folder for each neuron, and trees of several stages of work beside the image.
    chosen = [path for path in trees if fnmatch.fnmatch(path.name, tree)]
    if len(images) != 1 or len(chosen) != 1:
        raise InputError(
            f"{folder} holds {files.format_count(len(images), 'image')} and {files.format_count(len(chosen), 'tree')} "
            f"that match {tree!r}, want one of each (SWC files: {', '.join(path.name for path in trees)}); name the "
            "trees of the gold standard with --tree 'PATTERN'"
        )

    (image,) = images.values()
    name = folder.relative_to(data).as_posix().replace("/", "_") if folder != data else folder.resolve().name
    return [Neuron(name, image, chosen[0])]


def assign_splits(names: Sequence[str], folds: int, fold: int) -> dict[str, str]:
    """Split of each neuron: fold number `fold` of `folds` is the test split, the next one the validation split.

    A neuron's place in the order of the SHA-256 of its id decides its fold, so that the folds are those of everybody
    who has the same neurons. Raises InputError for fewer neurons than folds.
    """
    if len(names) < folds:
        raise InputError(
            f"{files.format_count(len(names), 'neuron')} cannot be divided into {folds} folds; give --folds"
        )

    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    kinds = {fold: "test", (fold + 1) % folds: "val"}
    return {name: kinds.get(place % folds, "train") for place, name in enumerate(order)}


def read_splits(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Splits from a CSV file with the columns id and split, such as the authors' own. Raises InputError."""
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [(row.get("id", ""), row.get("split", "")) for row in csv.DictReader(handle)]
    splits = dict(rows)
    if wrong := sorted({split for split in splits.values() if split not in ("train", "val", "test")}):
        raise InputError(f"{path} names the split {wrong[0]!r}; want lines of id,split with train, val or test")

    missing = [name for name in names if name not in splits]
    extra = [name for name in splits if name not in set(names)]
    if missing or extra:
        raise InputError(
            f"{path} does not list the neurons of the data: {len(missing)} without a split ({', '.join(missing[:3])}), "
            f"{len(extra)} that are not there ({', '.join(extra[:3])})"
        )
    return splits


def write_manifest(path: Path, neurons: Sequence[Neuron], splits: dict[str, str], voxel_size: str) -> None:
    """Write the list of pairs that `hpc-neuro prepare manifest=` reads. voxel_size: z y x [um], "" where files say."""
    with files.atomic(path) as part, part.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS)
        for neuron in neurons:
            image, tree = neuron.image.absolute(), neuron.tree.absolute()
            writer.writerow([neuron.id, image, tree, voxel_size, splits[neuron.id], "voxel"])
