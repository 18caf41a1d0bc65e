"""Image + SWC pairs, each cut to a box around its tree: the same neurons in a fraction of the voxels.

    python -m tools.cut_pairs FOLDER OUT [--margin 16] [--noise 0.5]

For studies of many small trainings, which would otherwise spend their time on empty surroundings. FOLDER holds pairs
of the same stem and meta.json where there is one, as for `hpc-neuro prepare`. OUT gets ID.tif, ID.swc (voxels) and a
meta.json with voxel sizes and roots, so that `hpc-neuro prepare images=OUT` takes it as it is. What lies outside the
boxes can no longer be mistaken for neurite: scores are those of the boxes, not of the stacks.

With --noise, Gaussian noise is added and ID.tif has float32. Its standard deviation is this share of the neurite's
brightness: the median of the image along the tree, above the median of the image. The noise depends on the ID alone.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from hpc_neuro.core import files
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.prepare import PrepareConfig
from hpc_neuro.prepare.check import OpenedPair, open_pair
from hpc_neuro.prepare.pairs import find_pairs


def compute_box(pair: OpenedPair, margin: int) -> Box:
    """The box of a tree and of the place to trace it from, `margin` voxels wider on every side, within the image."""
    points = pair.tree.points if pair.root is None else np.vstack([pair.tree.points, pair.root])
    size = np.asarray(pair.image.shape)

    # `prepare` refuses a volume of less than two slices.
    low = np.clip(np.floor(points.min(0)).astype(int) - margin, 0, size - 2)
    high = np.clip(np.ceil(points.max(0)).astype(int) + margin + 1, low + 2, size)
    return Box((int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2])))


def cut_pairs(folder: Path, out: Path, margin: int, noise: float = 0.0) -> list[str]:
    """Write OUT, whole or not at all; a line per pair. Raises InputError for an OUT that exists and for bad pairs."""
    if out.exists():
        raise InputError(f"{out} exists; give a folder that does not, or remove it")

    cfg = PrepareConfig(out=out, images=folder)
    pairs = [open_pair(pair, cfg) for pair in find_pairs(cfg)]

    lines: list[str] = []
    meta: dict[str, Any] = {}
    with files.atomic(out) as part:
        part.mkdir()
        for pair in pairs:
            box = compute_box(pair, margin)
            meta[pair.pair.id] = _write_cut(part, pair, box, noise)
            size, share = " x ".join(map(str, box.shape)), box.size / np.prod(pair.image.shape, dtype=np.int64)
            lines.append(f"{pair.pair.id}: {size} of {pair.image.shape}, {share:.0%} of the voxels")
        files.write_json(part / "meta.json", meta)
    return lines


def add_noise(image: NDArray[Any], points: NDArray[Any], noise: float, name: str) -> NDArray[np.float32]:
    """The image [Z, Y, X] with noise that depends on `name`; see the top of this file. points: [N, 3] of the tree."""
    places = np.clip(np.rint(points).astype(int), 0, np.asarray(image.shape) - 1)
    brightness = np.median(image[tuple(places.T)]) - np.median(image)

    grain = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(image.shape, dtype=np.float32)
    return image.astype(np.float32) + np.float32(noise * brightness) * grain


def _write_cut(folder: Path, pair: OpenedPair, box: Box, noise: float) -> dict[str, Any]:
    """Write the image and the tree of one box; return what meta.json says of it."""
    name, start = pair.pair.id, np.asarray(box.start)
    image = np.ascontiguousarray(pair.image[box])
    if noise:
        image = add_noise(image, pair.tree.points - start, noise, name)
    tifffile.imwrite(
        folder / f"{name}.tif", image, compression="zlib", metadata={"axes": "ZYX"}, photometric="minisblack"
    )

    # The tree moves with the box; its voxels keep their size.
    tree = replace(pair.tree, points=pair.tree.points - start)
    swc.write(folder / f"{name}.swc", tree, unit="voxel", voxel_size=pair.size)

    entry: dict[str, Any] = {"voxel_size_um_xyz": [float(v) for v in reversed(pair.size)], "swc_unit": "voxel"}
    if pair.root is not None:
        entry["root_xyz"] = [float(v) for v in (np.asarray(pair.root) - start)[::-1]]
    return entry


def main() -> int:
    """Command line; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image + SWC pairs")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--margin", type=int, default=16, help="voxels around the tree, at least 0 (default 16)")
    parser.add_argument("--noise", type=float, default=0.0, help="of the neurite's brightness (default 0: none)")
    args = parser.parse_args()

    if args.margin < 0 or args.noise < 0:
        parser.error(f"--margin {args.margin} --noise {args.noise}: want 0 or more of each")

    try:
        lines = cut_pairs(args.folder, args.out, args.margin, args.noise)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"cut_pairs: {error}\n")
        return EXIT_BAD_INPUT

    sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
