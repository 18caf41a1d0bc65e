"""Do the tubes of distillation bend towards neurites? The distance of their taps to the centreline, bent and straight.

    python -m tools.probe_bends RUN... [--split test] [--batch 8]

RUN: training runs with `distill.axes=deformable`; their newest checkpoint, store and crop size are taken. Around every
token of the split that holds centreline a crop is cut, the token in its middle, and of its tubes the one along the axis
that the neurite follows most there is taken, among the axes with room for all taps. Printed, in um, are the mean
distances of the two outermost taps to the gold tree:

    straight    tubes without bends
    bent        as the run bends them
    dealt       the same bends, dealt out to the other tokens of the same axis at random

and the mean bend, in tokens per step. Bends that know where the neurite lies are nearer than both. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from hpc_neuro.core import morphology, schema
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.dataset import read_crop
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models.student import Student
from hpc_neuro.models.tubular import gather
from hpc_neuro.train import setup
from hpc_neuro.train.checkpoint import folder as checkpoints
from hpc_neuro.train.checkpoint.tensor_files import stream_tensors
from hpc_neuro.train.config import TrainConfig

_STEP = 0.25  # [um] between the points that stand for the centreline


def main() -> int:
    """Command line; exit code 2 for bad input."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    ask.add_argument("--split", default="test")
    ask.add_argument("--batch", type=int, default=8, help="crops at a time")
    args = ask.parse_args()
    rows = []
    try:
        for run in args.runs:
            rows.append({"run": str(run), **probe(run, args.split, args.batch)})
            print(
                "{run}: {tubes} tubes; outer taps straight {straight_um:.2f} um, bent {bent_um:.2f}, dealt "
                "{dealt_um:.2f}; mean bend {bend:.2f} token per step".format(**rows[-1]),
                flush=True,
            )
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"probe_bends: {error}\n")
        return 2
    print(json.dumps(rows))
    return 0


@torch.no_grad()
def probe(run: Path, split: str, batch: int) -> dict[str, Any]:
    """The row of a run. Raises InputError or ConfigError when it has no deformable tubes, or nothing to look at."""
    cfg = schema.load(TrainConfig, run / "config.yaml")
    if cfg.distill is None or cfg.distill.axes != "deformable" or cfg.cache is None:
        raise InputError(f"{run} was trained without tubes that bend; give a run with distill.axes=deformable")
    student, distiller = _trained(run, cfg, FeatureCache(cfg.cache))
    store = Store(cfg.store)
    rng, half = np.random.default_rng(0), cfg.distill.taps // 2
    sums, tubes, bend = np.zeros(3), 0, 0.0
    for name in store.split(split):
        volume = store[name]
        line, towards = centreline(volume)
        tokens, axes = met(line, towards, volume.voxel_size, cfg, cfg.distill.taps)
        if not len(tokens):
            continue
        near = cKDTree(line)
        bends = torch.cat(list(_bends(student, distiller, volume, tokens, axes, cfg, batch)))  # [N, 2*(K-1)]
        for axis in np.unique(axes):
            mine = np.flatnonzero(axes == axis)
            own = bends[mine]
            for i, offsets in enumerate((torch.zeros_like(own), own, own[rng.permutation(len(mine))])):
                taps = outer(offsets, int(axis), half) + tokens[mine, None]  # [n, 2, 3] in tokens
                voxels = (taps + 0.5) * cfg.student.patch - 0.5
                sums[i] += np.asarray(near.query(voxels * volume.voxel_size)[0]).mean(1).sum()
        tubes += len(tokens)
        bend += float(bends.abs().mean(1).sum())
    if not tubes:
        raise InputError(
            f"{cfg.store}: no token of the split {split!r} holds centreline along an axis on which a crop of "
            f"{list(cfg.crop.size)} has room for {cfg.distill.taps} taps; give another --split or a run of larger crops"
        )
    straight, bent, dealt = (float(s) / tubes for s in sums)
    return {"tubes": tubes, "straight_um": straight, "bent_um": bent, "dealt_um": dealt, "bend": bend / tubes}


def centreline(volume: StoredVolume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points close together on the gold tree and the unit directions of its edges there, [N, 3] z y x in um."""
    tree = morphology.resample_tree(morphology.scale_tree(volume.tree(), volume.voxel_size), _STEP)
    ends = tree.edges
    along = tree.points[ends[:, 1]] - tree.points[ends[:, 0]]
    length = np.linalg.norm(along, axis=1, keepdims=True)
    kept = length[:, 0] > 0
    return tree.points[ends[kept, 0]], along[kept] / length[kept]


def met(
    line: NDArray[np.float64], towards: NDArray[np.float64], voxel_size: VoxelSize, cfg: TrainConfig, taps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens [N, 3] that the centreline passes, of the volume's token grid, and the axis that it follows most.

    Tokens are left out where that axis has no room in a crop for all taps.
    """
    grid = np.array(cfg.crop.size) // cfg.student.patch
    at = np.floor((line / voxel_size + 0.5) / cfg.student.patch).astype(np.int64)
    tokens, which = np.unique(at, axis=0, return_inverse=True)
    share = np.zeros((len(tokens), 3))
    np.add.at(share, which.reshape(-1), np.abs(towards))
    axes = share.argmax(1)
    kept = (grid >= taps)[axes]
    return tokens[kept], axes[kept]


def outer(offsets: Tensor, axis: int, half: int) -> NDArray[np.float64]:
    """Where the first and the last tap of tubes lie, from their token: [N, 2*(K-1)] -> [N, 2, 3] in tokens."""
    reach = half * (1 + math.ceil(float(offsets.abs().max())))
    index = torch.arange(-reach, reach + 1.0)
    space = torch.stack(torch.meshgrid(index, index, index, indexing="ij"))[None]
    place = torch.full((3, len(offsets), 1, 1), reach)
    taps = gather(space, offsets.T[None, :, :, None, None], axis, place)[0, :, :, :, 0, 0]  # [3, K, N]
    found: NDArray[np.float64] = taps[:, [0, -1]].permute(2, 1, 0).double().numpy()
    return found


def _bends(
    student: Student,
    distiller: Distiller,
    volume: StoredVolume,
    tokens: NDArray[np.int64],
    axes: NDArray[np.int64],
    cfg: TrainConfig,
    batch: int,
) -> Iterator[Tensor]:
    """[n, 2*(K-1)] of the tubes along `axes` through `tokens`, a batch at a time."""
    patch, block = np.array(cfg.student.patch), distiller.pairs[0][0]
    middle = np.array(cfg.crop.size) // patch // 2
    for first in range(0, len(tokens), batch):
        part = tokens[first : first + batch]
        crops = [read_crop(volume.store, volume.id, Box.at(_shape((t - middle) * patch), cfg.crop.size)) for t in part]
        image = torch.stack([c.image for c in crops])
        maps = student(image, [block]).features[block].float()
        found = distiller.bends(0, maps)
        assert found is not None  # the run has tubes
        z, y, x = middle
        yield torch.stack([found[a][i, :, z, y, x] for i, a in enumerate(axes[first : first + batch])])


def _shape(values: NDArray[np.int64]) -> Shape:
    z, y, x = (int(v) for v in values)
    return z, y, x


def _trained(run: Path, cfg: TrainConfig, cache: FeatureCache) -> tuple[Student, Distiller]:
    """Student and distiller with the weights of the run's newest checkpoint."""
    folder = checkpoints.find_newest(run / "checkpoints")
    if folder is None:
        raise InputError(f"{run} has no complete checkpoint; give a run whose checkpoints are still there")
    shapes = checkpoints.read_training_state(folder).shapes
    held = setup.build_train_module(cfg, cache).eval()
    held.load_state_dict(dict(zip(shapes, stream_tensors(folder, "weight", shapes), strict=True)))
    assert held.distiller is not None  # there are a cache and `distill`
    return held.student, held.distiller


if __name__ == "__main__":
    sys.exit(main())
