"""Image + SWC pairs, each cut to a box around its tree: the same neurons in a fraction of the voxels.

    python -m tools.cut_pairs FOLDER OUT [--margin 16]

For studies of many small trainings, whose time would else go into predicting empty surroundings. FOLDER holds pairs of
the same stem and meta.json where there is one, as for `hpc-neuro prepare`; OUT gets ID.tif, ID.swc (voxels) and a
meta.json with voxel sizes and roots, so that `hpc-neuro prepare images=OUT` takes it as it is. What lies outside the
boxes can no longer be mistaken for neurite: scores are those of the boxes, not of the stacks.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data import swc
from hpc_neuro.prepare import PrepareConfig
from hpc_neuro.prepare.check import OpenedPair, open_pair
from hpc_neuro.prepare.pairs import find_pairs


def around(one: OpenedPair, margin: int) -> Box:
    """The box of a tree and of the place to trace it from, `margin` voxels wider on every side, within the image."""
    points = one.tree.points if one.root is None else np.vstack([one.tree.points, one.root])
    size = np.asarray(one.image.shape)
    low = np.clip(np.floor(points.min(0)).astype(int) - margin, 0, size - 2)
    high = np.clip(np.ceil(points.max(0)).astype(int) + margin + 1, low + 2, size)  # prepare wants two slices or more
    return Box((int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2])))


def cut(folder: Path, out: Path, margin: int) -> list[str]:
    """Write OUT, whole or not at all; a line per pair. Raises InputError for an OUT that exists and for bad pairs."""
    if out.exists():
        raise InputError(f"{out} exists; give a folder that does not, or remove it")
    cfg = PrepareConfig(out=out, images=folder)
    opened = [open_pair(pair, cfg) for pair in find_pairs(cfg)]
    lines, meta = [], dict[str, Any]()
    with files.atomic(out) as part:
        part.mkdir()
        for one in opened:
            name, box = one.pair.id, around(one, margin)
            image = np.ascontiguousarray(one.image[box])
            tifffile.imwrite(
                part / f"{name}.tif", image, compression="zlib", metadata={"axes": "ZYX"}, photometric="minisblack"
            )
            start = np.asarray(box.start)
            moved = replace(one.tree, points=one.tree.points - start)
            swc.write(part / f"{name}.swc", moved, unit="voxel", voxel_size=one.size)
            meta[name] = {"voxel_size_um_xyz": [float(v) for v in reversed(one.size)], "swc_unit": "voxel"}
            if one.root is not None:
                meta[name]["root_xyz"] = [float(v) for v in (np.asarray(one.root) - start)[::-1]]
            share = image.size / np.prod(one.image.shape, dtype=np.int64)
            lines.append(f"{name}: {' x '.join(map(str, image.shape))} of {one.image.shape}, {share:.0%} of the voxels")
        files.write_json(part / "meta.json", meta)
    return lines


def main() -> int:
    """Command line; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="image + SWC pairs")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--margin", type=int, default=16, help="voxels around the tree, at least 0 (default 16)")
    args = parser.parse_args()
    if args.margin < 0:
        parser.error(f"--margin {args.margin}: want 0 or more")
    try:
        lines = cut(args.folder, args.out, args.margin)
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"cut_pairs: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
