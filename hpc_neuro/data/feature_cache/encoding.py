"""How features are kept on disk: as float16, as fewer principal components, as int8, or both; decoded on reading."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError

_MARGIN = 1.25  # int8 reaches this much farther than the largest value of the sample


@dataclass(frozen=True)
class Coding:
    """Of one view, layer by layer. Decoding is affine, so that it may follow the averaging of cells."""

    mean: Tensor | None = None  # [L, D]
    basis: Tensor | None = None  # [L, n, D], orthonormal rows, the strongest first
    scale: Tensor | None = None  # [L, n or D]: one step of int8

    def width(self, dim: int) -> int:
        """Values kept per token and layer."""
        return dim if self.basis is None else int(self.basis.shape[1])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the values kept."""
        return np.dtype(np.float16 if self.scale is None else np.int8)

    def encode(self, values: Tensor) -> tuple[Tensor, int]:
        """Features [L, ..., D] -> (values to keep [L, ..., n or D] in `dtype`, how many of them were clipped)."""
        if self.mean is None:
            return values.half(), 0
        flat = values.float().flatten(1, -2) - self.mean[:, None]  # [L, M, D]
        flat = flat if self.basis is None else flat @ self.basis.transpose(1, 2)
        clipped = 0
        if self.scale is not None:
            steps = (flat / self.scale[:, None]).round()
            clipped = int((steps.abs() > 127).sum())
            flat = steps.clamp(-127, 127)
        kept = flat.to(torch.float16 if self.scale is None else torch.int8)
        return kept.reshape(*values.shape[:-1], -1), clipped

    def decode(self, kept: Tensor) -> Tensor:
        """Values kept, or averages of them, [L, ..., n or D] -> features [L, ..., D] float32."""
        if self.mean is None:
            return kept.float()
        flat = kept.float().flatten(1, -2)
        flat = flat if self.scale is None else flat * self.scale[:, None]
        flat = flat if self.basis is None else flat @ self.basis
        return (flat + self.mean[:, None]).reshape(*kept.shape[:-1], -1)


RAW = Coding()


def fit(seen: Tensor, unseen: Tensor, components: int | None, int8: bool) -> tuple[Coding, dict[str, list[float]]]:
    """The coding that loses least of the tokens `seen` [L, M, D], judged on `unseen` [L, N, D].

    -> (coding, {"explained_variance", "cosine", "relative_error"}: one number per layer).
    Raises InputError when the sample has fewer tokens than components are asked for.
    """
    seen, unseen = seen.double(), unseen.float()
    if components is not None and components > min(seen.shape[1:]):
        raise InputError(
            f"pca={components}: the features have {seen.shape[2]} channels, the sample {seen.shape[1]} tokens; "
            "ask for fewer components, or for a larger `sample`"
        )
    mean = seen.mean(1)
    centred = seen - mean[:, None]
    basis = scale = None
    if components is not None:
        # numpy's eigh: ascending eigenvalues, and the same on every run of one machine
        vectors = [np.linalg.eigh((c.T @ c).numpy())[1][:, ::-1][:, :components].T for c in centred]
        basis = torch.from_numpy(np.stack(vectors)).float()
        centred = centred @ basis.double().transpose(1, 2)
    if int8:
        scale = (centred.abs().amax(1) * _MARGIN / 127).clamp(min=1e-12).float()
    coding = Coding(mean.float(), basis, scale)
    again = coding.decode(coding.encode(unseen)[0])
    lost = (again - unseen).double().square().sum((1, 2))
    spread = (unseen.double() - unseen.double().mean(1, keepdim=True)).square().sum((1, 2))
    return coding, {
        "explained_variance": (1 - lost / spread.clamp(min=1e-30)).tolist(),
        "cosine": torch.cosine_similarity(again, unseen, dim=-1).mean(1).double().tolist(),
        "relative_error": (lost / unseen.double().square().sum((1, 2)).clamp(min=1e-30)).sqrt().tolist(),
    }


def save(path: Path, codings: Mapping[str, Coding]) -> None:
    """Write the codings of all views, atomically; the same codings give the same bytes."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for view, coding in codings.items():
        parts = {"mean": coding.mean, "basis": coding.basis, "scale": coding.scale}
        arrays |= {f"{view}_{name}": part.numpy() for name, part in parts.items() if part is not None}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with files.atomic(path) as part:
        part.write_bytes(buffer.getvalue())


def load(path: Path) -> dict[str, Coding]:
    """The codings by view. Raises InputError when the file cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"{path}, without which the features cannot be decoded, is not readable ({error}); remove the cache and "
            "build it again with `hpc-neuro precompute`"
        ) from None
    views = sorted({name.partition("_")[0] for name in arrays})
    parts = ("mean", "basis", "scale")
    return {v: Coding(*(arrays.get(f"{v}_{part}") for part in parts)) for v in views}
