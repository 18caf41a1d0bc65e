"""How features are stored: as float16, as fewer principal components, as int8, or both; decoded on reading."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypedDict

from hpc_neuro.core import files
from hpc_neuro.core.schema import InputError

INT8_MARGIN = 1.25
"""int8 reaches this factor beyond the largest value of the sample."""


@dataclass(frozen=True)
class FeatureCoding:
    """The coding of one view, layer by layer. Decoding is affine, so cells may be averaged before they are decoded."""

    mean: Tensor | None = None  # [L, D]
    basis: Tensor | None = None  # [L, n, D], orthonormal rows, the strongest first
    scale: Tensor | None = None  # [L, n or D]: one step of int8

    def width(self, dim: int) -> int:
        """Values stored per token and layer."""
        return dim if self.basis is None else int(self.basis.shape[1])

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Of the stored values."""
        return np.dtype(np.float16 if self.scale is None else np.int8)

    def encode(self, values: Tensor) -> tuple[Tensor, int]:
        """Features [L, ..., D] -> (codes [L, ..., n or D] in `dtype`, how many of them were clipped)."""
        if self.mean is None:
            return values.half(), 0

        # Without a mean there is no coding, only the cast to float16.
        flat = values.float().flatten(1, -2) - self.mean[:, None]  # [L, M, D]
        if self.basis is not None:
            flat = flat @ self.basis.transpose(1, 2)

        clipped = 0
        if self.scale is not None:
            # -128 is not used, so that the range is symmetric.
            steps = (flat / self.scale[:, None]).round()
            clipped = int((steps.abs() > 127).sum())
            flat = steps.clamp(-127, 127)

        codes = flat.to(torch.float16 if self.scale is None else torch.int8)
        return codes.reshape(*values.shape[:-1], -1), clipped

    def decode(self, codes: Tensor) -> Tensor:
        """Codes, or averages of codes, [L, ..., n or D] -> features [L, ..., D] float32."""
        if self.mean is None:
            return codes.float()

        # The steps of `encode` in reverse.
        flat = codes.float().flatten(1, -2)
        if self.scale is not None:
            flat = flat * self.scale[:, None]
        if self.basis is not None:
            flat = flat @ self.basis
        return (flat + self.mean[:, None]).reshape(*codes.shape[:-1], -1)


RAW = FeatureCoding()
"""float16 of every channel."""


class LayerQuality(TypedDict):
    """What a coding keeps of features: one number per layer."""

    explained_variance: list[float]
    cosine: list[float]
    """Between features before and after."""
    relative_error: list[float]


def fit_coding(seen: Tensor, unseen: Tensor, components: int | None, int8: bool) -> tuple[FeatureCoding, LayerQuality]:
    """Fit the coding that loses least of the tokens `seen` [L, M, D], and judge it on `unseen` [L, N, D].

    Raises InputError when the sample has fewer tokens than components are asked for.
    """
    if components is not None and components > min(seen.shape[1:]):
        raise InputError(
            f"pca={components}: the features have {seen.shape[2]} channels, the sample {seen.shape[1]} tokens; "
            "ask for fewer components, or prepare more or larger volumes"
        )

    # Sums over thousands of tokens lose digits in single precision.
    seen = seen.double()
    mean = seen.mean(1)
    residuals = seen - mean[:, None]

    basis = None
    if components is not None:
        basis = _principal_axes(residuals, components)
        residuals = residuals @ basis.double().transpose(1, 2)

    scale = None
    if int8:
        # One step size per component: the strongest are orders of magnitude larger than the weakest.
        scale = (residuals.abs().amax(1) * INT8_MARGIN / 127).clamp(min=1e-12).float()

    coding = FeatureCoding(mean.float(), basis, scale)
    return coding, _measure_loss(coding, unseen.float())


def _principal_axes(residuals: Tensor, components: int) -> Tensor:
    """[L, components, D] float32, the strongest axis first."""
    # numpy's eigh gives ascending eigenvalues, and the same vectors on every run of one machine.
    axes = [np.linalg.eigh((layer.T @ layer).numpy())[1][:, ::-1][:, :components].T for layer in residuals]
    return torch.from_numpy(np.stack(axes)).float()


def _measure_loss(coding: FeatureCoding, values: Tensor) -> LayerQuality:
    """What a coding loses of features [L, N, D], per layer."""
    # The loss is measured on tokens that the fit has not seen.
    decoded = coding.decode(coding.encode(values)[0])
    lost = (decoded - values).double().square().sum((1, 2))
    variance = (values.double() - values.double().mean(1, keepdim=True)).square().sum((1, 2))
    energy = values.double().square().sum((1, 2))
    return {
        "explained_variance": (1 - lost / variance.clamp(min=1e-30)).tolist(),
        "cosine": torch.cosine_similarity(decoded, values, dim=-1).mean(1).double().tolist(),
        "relative_error": (lost / energy.clamp(min=1e-30)).sqrt().tolist(),
    }


def save_codings(path: Path, codings: Mapping[str, FeatureCoding]) -> None:
    """Write the codings of all views, atomically; the same codings give the same bytes."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for view, coding in codings.items():
        for name, values in (("mean", coding.mean), ("basis", coding.basis), ("scale", coding.scale)):
            if values is not None:
                arrays[f"{view}_{name}"] = values.numpy()

    # np.savez adds .npz to a path, but not to a buffer; the part file has another ending.
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with files.atomic(path) as part:
        part.write_bytes(buffer.getvalue())


def load_codings(path: Path) -> dict[str, FeatureCoding]:
    """The codings by view. Raises InputError when the file cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise InputError(
            f"{path}, without which the features cannot be decoded, is not readable ({error}); remove the cache and "
            "build it again with `hpc-neuro precompute`"
        ) from None

    # The names are VIEW_PART.
    views = sorted({name.partition("_")[0] for name in arrays})
    parts = ("mean", "basis", "scale")
    return {view: FeatureCoding(*(arrays.get(f"{view}_{part}") for part in parts)) for view in views}
