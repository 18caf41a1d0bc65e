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

from hpc_neuro.core import files
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Array
from hpc_neuro.data.feature_cache import encoding as codings
from hpc_neuro.data.feature_cache.layout import CODING, CacheMismatch, Unit, read_manifest
from hpc_neuro.data.feature_cache.resample import Cells
from hpc_neuro.data.orientation import IDENTITY, Orientation, parse_orientation, parse_orientations

_OPEN_FILES = 64


class FeatureCache:
    """Reads crops of features. Files are opened lazily per process and dropped on pickling; nothing is locked."""

    def __init__(self, path: Path) -> None:
        """Raises InputError when the cache is missing, unfinished, or a shard is gone or cut short."""
        self.path = Path(path)
        hint = "build the cache with `hpc-neuro precompute`; an interrupted build goes on with the same command"
        self.manifest = read_manifest(self.path, hint)
        self.layers: tuple[int, ...] = tuple(self.manifest["layers"])
        self.views: tuple[str, ...] = tuple(self.manifest["views"])
        self.dim = int(self.manifest["dim"])
        kinds = self.manifest["statistics"]
        self.mean = {v: torch.tensor(kinds[v]["mean"], dtype=torch.float32) for v in self.views}  # [L, D]
        self.std = {v: torch.tensor(kinds[v]["std"], dtype=torch.float32) for v in self.views}  # [L, D]
        self.orientations: tuple[Orientation, ...] = parse_orientations(self.manifest.get("augment_views", ()))
        self._codings = self._read_codings()
        self._units: dict[tuple[str, str, str], list[Unit]] = {}
        damaged = []
        for shard in self.manifest["shards"]:
            unit = Unit.read(shard["unit"])
            self._units.setdefault((unit.volume, unit.view, unit.how), []).append(unit)
            file = self.path / shard["file"]
            if not file.exists() or file.stat().st_size != shard["bytes"]:
                damaged.append(shard["file"])
        if damaged:
            raise InputError(
                f"{self.path} lacks {len(damaged)} of its {len(self.manifest['shards'])} shards, or they were cut "
                f"short ({', '.join(damaged[:3])}); `hpc-neuro precompute` with the same config, or "
                f"`hpc-neuro cache verify {self.path}`, rebuilds just those"
            )
        self._forget()

    def _read_codings(self) -> dict[str, codings.Coding]:
        """How the features were compressed, by view."""
        wanted = self.manifest.get("coding")
        if wanted is None:
            return dict.fromkeys(self.views, codings.RAW)
        path = self.path / CODING
        if not path.exists() or files.sha256(path) != wanted:
            raise InputError(
                f"{path}, without which the features cannot be decoded, is missing or not the one they were made with; "
                "`hpc-neuro precompute` with the same config builds the cache again"
            )
        return codings.load(path)

    def _forget(self) -> None:
        self._open: OrderedDict[str, Any] = OrderedDict()  # shard -> its dataset
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def volumes(self) -> tuple[str, ...]:
        """Identifiers of the volumes held."""
        return tuple(dict.fromkeys(volume for volume, _, _ in self._units))

    def require_match(
        self,
        digests: Mapping[str, str],
        teacher: Mapping[str, Any],
        views: Sequence[str],
    ) -> None:
        """Raise CacheMismatch unless the cache holds `views` of all the volumes, of this content, by this teacher.

        digests: volume -> content digest as the store gives it; teacher: Teacher.identity.
        """
        command = f"hpc-neuro precompute store=... out={self.path}"
        held = self.manifest["teacher"]
        if dict(held) != dict(teacher):
            raise CacheMismatch(
                f"{self.path} holds features of the teacher {held}, but the config asks for {dict(teacher)}; build "
                f"them in another folder with `{command}` and that teacher, or train with "
                f"teacher.model={held.get('name')}"
            )
        if lacking := [v for v in views if v not in self.views]:
            raise CacheMismatch(f"{self.path} has no view {', '.join(lacking)}; rebuild it with views={list(views)}")
        if absent := [v for v in digests if (v, self.views[0], "") not in self._units]:
            raise CacheMismatch(
                f"{self.path} has no features of {', '.join(absent[:5])}; add their split to `splits` of "
                f"`{command}`, in another folder"
            )
        if changed := [v for v, digest in digests.items() if self.manifest["volumes"][v] != digest]:
            raise CacheMismatch(
                f"{self.path} was made from other images of {', '.join(changed[:5])} than the store holds now; "
                f"build it again in another folder with `{command}`"
            )

    def select_orientations(self, names: Sequence[str] | None) -> tuple[Orientation, ...]:
        """The volume as it stands and the named mirrors and turns (None: all held). Raises CacheMismatch for others."""
        if names is None:
            return self.orientations
        if more := [name for name in names if parse_orientation(name) not in self.orientations]:
            every = ",".join([*self.manifest.get("augment_views", []), *more])
            raise CacheMismatch(
                f"augment.distilled asks for {', '.join(more)}, but {self.path} has no features of slices laid so, and "
                "they cannot be had from the slices as they stand; build them in another folder with `hpc-neuro "
                f"precompute store=... out=... augment_views=[{every}]`, or leave {', '.join(more)} out"
            )
        return parse_orientations(names)

    def crop(
        self,
        volume: str,
        box: Box,
        patch: Shape,
        orientation: Orientation = IDENTITY,
        views: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Features of a crop on the student's token grid: view -> [L, D, z, y, x] float16, grid = box.shape / patch.

        With an orientation, what the teacher makes of the turned crop: the views are those of the turned volume, and so
        are z, y, x. The box may reach past the volume's end; cells out there repeat the last one. `views`: all held, if
        left out. Raises InputError when the box does not lie on the token grid, where resampling would blur the
        features, and when the orientation is not held.
        """
        if any(a % p or n % p for a, n, p in zip(box.start, box.shape, patch, strict=True)):
            raise InputError(f"the crop {box.start} to {box.stop} does not lie on the token grid of {patch} voxels")
        found = {}
        for view in self.views if views is None else views:
            held, how = orientation.source_slices(view)
            if (volume, held, how) not in self._units:
                raise InputError(
                    f"{self.path} has no slices of {volume} along {held}{f' laid {how}' if how else ''}; "
                    "build them with `hpc-neuro precompute` and augment_views"
                )
            found[view] = orientation.apply(self._view(volume, held, how, box, patch)).half().contiguous()
        return found

    def _view(self, volume: str, view: str, how: str, box: Box, patch: Shape) -> Tensor:
        """[L, D, z, y, x] float32 as the volume stands."""
        units = self._units[volume, view, how]
        cells, parts = Cells.under(box, patch, units), []
        for unit in units:
            offset = (unit.first - units[0].first) // unit.stride
            a, b = max(cells.slices.start, offset) - offset, min(cells.slices.stop, offset + unit.count) - offset
            if a < b:
                parts.append(self._read(unit, (slice(a, b), slice(None), cells.rows, cells.columns)))
        values = torch.from_numpy(np.concatenate(parts) if len(parts) > 1 else parts[0])  # [s, L, r, c, n]
        kept = cells.on_tokens(values).movedim(1, -1)  # [L, z, y, x, n]
        return self._codings[view].decode(kept).movedim(-1, 1)

    def _read(self, unit: Unit, place: tuple[slice, ...]) -> Array:
        """Values [s, L, r, c, n] of a shard, as they are kept."""
        try:
            values: Array = self._features(unit)[place]
        except (OSError, KeyError) as error:
            raise InputError(
                f"the shard {self.path / unit.name} cannot be read ({error}); "
                f"`hpc-neuro cache verify {self.path}` finds and rebuilds what is damaged"
            ) from error
        return values

    def _features(self, unit: Unit) -> Any:
        """The open dataset of a shard."""
        if self._pid != os.getpid():
            self._forget()  # an HDF5 handle must not be shared over a fork
        data = self._open.pop(unit.name, None)
        if data is None:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].file.close()
            data = h5py.File(self.path / unit.name, "r", locking=False)["features"]
        self._open[unit.name] = data
        return data
