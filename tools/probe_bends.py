"""Do the tubes of distillation bend towards neurites? The distance of their taps to the centerline, bent and straight.

    python -m tools.probe_bends RUN... [--split test] [--batch 8]

RUN: training runs with `distill.axes=deformable`; their newest checkpoint, store and crop size are used. Around every
token of the split that contains centerline a crop is cut with the token in its middle. Of its three tubes the one along
the axis that the neurite follows most there is measured, among the axes with room for all taps. Printed, in um, are the
mean distances of the two outermost taps to the gold tree:

    straight    tubes without bends
    bent        as the run bends them
    dealt       the same bends, permuted at random among the tokens of the same axis

and the mean bend, in tokens per step. Bends that follow the neurite are nearer than both. The last line is JSON.
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
from hpc_neuro.core.constants import EXIT_BAD_INPUT, EXIT_DONE
from hpc_neuro.core.geometry import Box, Shape, VoxelSize
from hpc_neuro.core.schema import ConfigError, InputError
from hpc_neuro.data.dataset import read_crop
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.data.store import Store, StoredVolume
from hpc_neuro.losses.distill import Distiller
from hpc_neuro.models.student import Student
from hpc_neuro.models.tubular import gather
from hpc_neuro.train import train_module
from hpc_neuro.train.checkpoint import folder as checkpoints
from hpc_neuro.train.checkpoint.tensor_files import stream_tensors
from hpc_neuro.train.config import TrainConfig

_STEP = 0.25
"""[um] Distance of the points that represent the centerline."""


def main() -> int:
    """Command line; exit code 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--split", default="test")
    parser.add_argument("--batch", type=int, default=8, help="crops at a time")
    args = parser.parse_args()

    rows = []
    try:
        for run in args.runs:
            rows.append({"run": str(run), **probe_run(run, args.split, args.batch)})
            print(
                "{run}: {tubes} tubes; outer taps straight {straight_um:.2f} um, bent {bent_um:.2f}, dealt "
                "{dealt_um:.2f}; mean bend {bend:.2f} token per step".format(**rows[-1]),
                flush=True,
            )
    except (InputError, ConfigError) as error:
        sys.stderr.write(f"probe_bends: {error}\n")
        return EXIT_BAD_INPUT
    print(json.dumps(rows))
    return EXIT_DONE


@torch.no_grad()
def probe_run(run: Path, split: str, batch: int) -> dict[str, Any]:
    """The row of a run. Raises InputError or ConfigError when it has no deformable tubes, or the split no tokens."""
    cfg = schema.load(TrainConfig, run / "config.yaml")
    if cfg.distill is None or cfg.distill.axes != "deformable" or cfg.cache is None:
        raise InputError(f"{run} was trained without tubes that bend; give a run with distill.axes=deformable")

    student, distiller = _load_trained(run, cfg, FeatureCache(cfg.cache))

    store = Store(cfg.store)
    rng = np.random.default_rng(0)
    distances, tubes, bend = np.zeros(3), 0, 0.0
    for id_ in store.split(split):
        volume = store[id_]
        line, directions = read_centerline(volume)
        tokens, axes = find_tokens(line, directions, volume.voxel_size, cfg, cfg.distill.taps)
        if not len(tokens):
            continue

        bends = torch.cat(list(_predict_bends(student, distiller, volume, tokens, axes, cfg, batch)))  # [N, 2*(K-1)]
        distances += _sum_distances(cKDTree(line), volume.voxel_size, cfg, tokens, axes, bends, rng)
        tubes += len(tokens)
        bend += float(bends.abs().mean(1).sum())

    if not tubes:
        raise InputError(
            f"{cfg.store}: no token of the split {split!r} holds centerline along an axis on which a crop of "
            f"{list(cfg.crop.size)} has room for {cfg.distill.taps} taps; give another --split or a run of larger crops"
        )

    straight, bent, dealt = (float(total) / tubes for total in distances)
    return {"tubes": tubes, "straight_um": straight, "bent_um": bent, "dealt_um": dealt, "bend": bend / tubes}


def _load_trained(run: Path, cfg: TrainConfig, cache: FeatureCache) -> tuple[Student, Distiller]:
    """Student and distiller with the weights of the run's newest checkpoint."""
    checkpoint = checkpoints.find_newest(run / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{run} has no complete checkpoint; give a run whose checkpoints are still there")

    shapes = checkpoints.read_training_state(checkpoint).shapes
    module = train_module.build_train_module(cfg, cache).eval()
    module.load_state_dict(dict(zip(shapes, stream_tensors(checkpoint, "weight", shapes), strict=True)))
    # The config has a cache and `distill`.
    assert module.distiller is not None
    return module.student, module.distiller


def read_centerline(volume: StoredVolume) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points close together on the gold tree and the unit directions of its edges there, [N, 3] z y x in um."""
    tree = morphology.resample_tree(morphology.scale_tree(volume.tree(), volume.voxel_size), _STEP)
    edges = tree.edges
    vectors = tree.points[edges[:, 1]] - tree.points[edges[:, 0]]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)

    # Repeated points have no direction.
    keep = lengths[:, 0] > 0
    return tree.points[edges[keep, 0]], vectors[keep] / lengths[keep]


def find_tokens(
    line: NDArray[np.float64], directions: NDArray[np.float64], voxel_size: VoxelSize, cfg: TrainConfig, taps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens [N, 3] of the volume's token grid that the centerline passes, and the axis that it follows most.

    Tokens are left out where that axis has no room in a crop for all taps.
    """
    indices = np.floor((line / voxel_size + 0.5) / cfg.student.patch).astype(np.int64)
    tokens, token_of_point = np.unique(indices, axis=0, return_inverse=True)

    along = np.zeros((len(tokens), 3))
    np.add.at(along, token_of_point.reshape(-1), np.abs(directions))
    axes = along.argmax(1)

    grid = np.array(cfg.crop.size) // cfg.student.patch
    has_room = (grid >= taps)[axes]
    return tokens[has_room], axes[has_room]


def _predict_bends(
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
    z, y, x = middle

    for first in range(0, len(tokens), batch):
        starts = (tokens[first : first + batch] - middle) * patch
        boxes = [Box.at(_to_shape(start), cfg.crop.size) for start in starts]
        image = torch.stack([read_crop(volume.store, volume.id, box).image for box in boxes])
        maps = student(image, [block]).features[block].float()

        # The run has tubes.
        bends = distiller.bends(0, maps)
        assert bends is not None
        yield torch.stack([bends[axis][i, :, z, y, x] for i, axis in enumerate(axes[first : first + batch])])


def _to_shape(values: NDArray[np.int64]) -> Shape:
    z, y, x = (int(v) for v in values)
    return z, y, x


def _sum_distances(
    line: cKDTree,
    voxel_size: VoxelSize,
    cfg: TrainConfig,
    tokens: NDArray[np.int64],
    axes: NDArray[np.int64],
    bends: Tensor,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """[um] Distances [straight, bent, dealt] of the outer taps to the centerline, summed over the tubes."""
    assert cfg.distill is not None
    half = cfg.distill.taps // 2
    sums = np.zeros(3)

    for axis in np.unique(axes):
        members = np.flatnonzero(axes == axis)
        bent = bends[members]
        variants = (torch.zeros_like(bent), bent, bent[rng.permutation(len(members))])
        for i, offsets in enumerate(variants):
            taps = locate_outer_taps(offsets, int(axis), half) + tokens[members, None]  # [n, 2, 3] in tokens
            voxels = (taps + 0.5) * cfg.student.patch - 0.5
            sums[i] += np.asarray(line.query(voxels * voxel_size)[0]).mean(1).sum()
    return sums


def locate_outer_taps(offsets: Tensor, axis: int, half: int) -> NDArray[np.float64]:
    """Positions of the first and last tap of tubes from their token: [N, 2*(K-1)] -> [N, 2, 3] in tokens."""
    # A volume whose values are its own coordinates: what the operator gathers there is where its taps lie.
    reach = half * (1 + math.ceil(float(offsets.abs().max())))
    index = torch.arange(-reach, reach + 1.0)
    space = torch.stack(torch.meshgrid(index, index, index, indexing="ij"))[None]
    place = torch.full((3, len(offsets), 1, 1), reach)

    taps = gather(space, offsets.T[None, :, :, None, None], axis, place)[0, :, :, :, 0, 0]  # [3, K, N]
    positions: NDArray[np.float64] = taps[:, [0, -1]].permute(2, 1, 0).double().numpy()
    return positions


if __name__ == "__main__":
    sys.exit(main())
