"""Crops of features for training: from shards of any cell size to the student's token grid."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from hpc_neuro.core import files, run_folder
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.feature_cache.encoding import RAW, FeatureCoding, load_codings
from hpc_neuro.data.feature_cache.manifest import CODING, MANIFEST, CacheMismatch, ShardSpec, read_manifest
from hpc_neuro.data.feature_cache.resample import CropCells
from hpc_neuro.data.orientation import IDENTITY, Orientation, parse_orientation, parse_orientations

MAX_OPEN_FILES = 64
"""Shards that a process keeps open."""


class FeatureCache:
    """Reads crops of features. Files open lazily in each process, without locks; pickling leaves them behind."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the cache is missing or unfinished, or a shard is missing or cut short."""
        self.path = Path(path)
        hint = "build the cache with `hpc-neuro precompute`; an interrupted build goes on with the same command"
        self.manifest = read_manifest(self.path, hint)
        run_folder.require_unchanged(self.path / MANIFEST)
        self.layers: tuple[int, ...] = tuple(self.manifest["layers"])
        self.views: tuple[str, ...] = tuple(self.manifest["views"])
        self.dim = int(self.manifest["dim"])
        self.orientations: tuple[Orientation, ...] = parse_orientations(self.manifest.get("augment_views", ()))

        # The student is compared with normalized features.
        statistics = self.manifest["statistics"]
        self.mean = {v: torch.tensor(statistics[v]["mean"], dtype=torch.float32) for v in self.views}  # [L, D]
        self.std = {v: torch.tensor(statistics[v]["std"], dtype=torch.float32) for v in self.views}  # [L, D]

        self._codings = self._read_codings()
        self._require_whole_shards()

        # (volume, view, layout) -> its shards in slice order
        self._shards: dict[tuple[str, str, str], list[ShardSpec]] = {}
        for entry in self.manifest["shards"]:
            shard = ShardSpec.from_json(entry["unit"])
            self._shards.setdefault((shard.volume, shard.view, shard.layout), []).append(shard)
        self._forget_handles()

    def _read_codings(self) -> dict[str, FeatureCoding]:
        """How the features were compressed, by view."""
        digest = self.manifest.get("coding")
        if digest is None:
            return dict.fromkeys(self.views, RAW)

        path = self.path / CODING

        # Another coding would decode the shards to wrong features without an error.
        if not path.exists() or files.sha256(path) != digest:
            raise InputError(
                f"{path}, without which the features cannot be decoded, is missing or not the one they were made with; "
                "`hpc-neuro precompute` with the same config builds the cache again"
            )
        return load_codings(path)

    def _require_whole_shards(self) -> None:
        damaged = []
        for entry in self.manifest["shards"]:
            file = self.path / entry["file"]

            # Sizes are checked at once; the checksums by `cache verify`, which reads everything.
            if not file.exists() or file.stat().st_size != entry["bytes"]:
                damaged.append(entry["file"])

        if damaged:
            raise InputError(
                f"{self.path} lacks {len(damaged)} of its {len(self.manifest['shards'])} shards, or they were cut "
                f"short ({', '.join(damaged[:3])}); `hpc-neuro precompute` with the same config, or "
                f"`hpc-neuro cache verify {files.quote_path(self.path)}`, rebuilds just those"
            )

    def _forget_handles(self) -> None:
        # File name of a shard -> its open dataset, the one used longest ago first.
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_handles()

    @property
    def volumes(self) -> tuple[str, ...]:
        """Ids of the volumes in the cache."""
        return tuple(dict.fromkeys(volume for volume, _, _ in self._shards))

    def require_match(self, digests: Mapping[str, str], teacher: Mapping[str, Any], views: Sequence[str]) -> None:
        """Raise CacheMismatch unless the cache holds `views` of these volumes, of this content, by this teacher.

        digests: volume -> content digest as the store gives it. teacher: Teacher.identity.
        """
        command = "hpc-neuro precompute store=... out=ANOTHER_FOLDER"
        cached_teacher = self.manifest["teacher"]
        if dict(cached_teacher) != dict(teacher):
            raise CacheMismatch(
                f"{self.path} holds features of the teacher {cached_teacher}, but the config asks for {dict(teacher)}; "
                f"build them with `{command}` and that teacher, or train with "
                f"teacher.model={cached_teacher.get('name')}"
            )

        if missing_views := [view for view in views if view not in self.views]:
            every = f"views=[{','.join(views)}]"
            raise CacheMismatch(
                f"{self.path} has no view {', '.join(missing_views)}; build it with `{command} {every}`"
            )

        if missing := [volume for volume in digests if (volume, self.views[0], "") not in self._shards]:
            raise CacheMismatch(
                f"{self.path} has no features of {', '.join(missing[:5])}; name their split in `splits`, as in "
                f"`{command} splits=[train,val]`"
            )

        if changed := [volume for volume, digest in digests.items() if self.manifest["volumes"][volume] != digest]:
            raise CacheMismatch(
                f"{self.path} was made from other images of {', '.join(changed[:5])} than the store holds now; "
                f"build it again with `{command}`"
            )

    def select_orientations(self, names: Sequence[str] | None) -> tuple[Orientation, ...]:
        """The identity and the named orientations; None: all in the cache. CacheMismatch for one that is missing."""
        if names is None:
            return self.orientations

        if missing := [name for name in names if parse_orientation(name) not in self.orientations]:
            every = ",".join([*self.manifest.get("augment_views", []), *missing])
            raise CacheMismatch(
                f"augment.distilled asks for {', '.join(missing)}, but {self.path} has no features of such slices, and "
                "they cannot be computed from the others; build them in another folder with `hpc-neuro "
                f"precompute store=... out=... augment_views=[{every}]`, or leave {', '.join(missing)} out"
            )
        return parse_orientations(names)

    def read_crop(
        self,
        volume: str,
        box: Box,
        patch: Shape,
        orientation: Orientation = IDENTITY,
        views: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Features of a crop on the student's token grid: view -> [L, D, z, y, x] float16, grid = box.shape / patch.

        With an orientation: the teacher's features of the oriented crop; views and z, y, x are those of the oriented
        volume. The box may reach past the volume's end, where the last cell is repeated. views: all in the cache when
        None. Raises InputError when the box is off the token grid, where resampling would blur the features, and when
        the cache lacks the orientation.
        """
        if any(a % p or n % p for a, n, p in zip(box.start, box.shape, patch, strict=True)):
            raise InputError(f"the crop {box.start} to {box.stop} does not lie on the token grid of {patch} voxels")

        features = {}
        for view in self.views if views is None else views:
            # A mirrored map is not the map of the mirrored slice, so oriented slices are stored on their own.
            source_view, layout = orientation.source_slices(view)
            if (volume, source_view, layout) not in self._shards:
                raise InputError(
                    f"{self.path} has no slices of {volume} along {source_view}"
                    f"{f' in the layout {layout}' if layout else ''}; "
                    "build them with `hpc-neuro precompute` and augment_views"
                )
            tokens = self._read_view(volume, source_view, layout, box, patch)
            features[view] = orientation.apply(tokens).half().contiguous()
        return features

    def _read_view(self, volume: str, view: str, layout: str, box: Box, patch: Shape) -> Tensor:
        """[L, D, z, y, x] float32 in the orientation of the stored volume."""
        shards = self._shards[volume, view, layout]
        cells = CropCells.for_box(box, patch, shards)

        parts = []
        for shard in shards:
            # Slice numbers of the shard within the whole view.
            offset = (shard.first - shards[0].first) // shard.stride
            first = max(cells.slices.start, offset) - offset
            stop = min(cells.slices.stop, offset + shard.count) - offset
            if first < stop:
                parts.append(self._read_codes(shard, (slice(first, stop), slice(None), cells.rows, cells.columns)))
        codes = torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0])  # [s, L, r, c, n]

        # Decoding is affine, so averaging first gives the same and decodes fewer values.
        token_codes = cells.average_onto_tokens(codes).movedim(1, -1)  # [L, z, y, x, n]
        return self._codings[view].decode(token_codes).movedim(-1, 1)

    def _read_codes(self, shard: ShardSpec, window: tuple[slice, ...]) -> Array:
        """[s, L, r, c, n] of a shard, still encoded."""
        try:
            codes: Array = self._open_features(shard)[window]
        except (OSError, KeyError) as error:
            raise InputError(
                f"the shard {self.path / shard.name} cannot be read ({error}); "
                f"`hpc-neuro cache verify {files.quote_path(self.path)}` finds and rebuilds damaged shards"
            ) from error
        return codes

    def _open_features(self, shard: ShardSpec) -> Any:
        """The open dataset of a shard."""
        # An HDF5 handle must not be shared over a fork.
        if self._pid != os.getpid():
            self._forget_handles()

        # Popped and inserted again, it becomes the one used last.
        data = self._open.pop(shard.name, None)
        if data is None:
            while len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].file.close()
            data = h5py.File(self.path / shard.name, "r", locking=False)["features"]
        self._open[shard.name] = data
        return data
