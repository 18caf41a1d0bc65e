"""Small pictures of the fixed validation crops: image, truth and probability as maximum projections side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_neuro.core.types import Batch

_GAP = 2  # pixels between panels


class Shown:
    """The pictures of the first crops of one validation, taken while it predicts."""

    def __init__(self, most: int) -> None:
        """most: crops; 0 takes none and costs nothing."""
        self.most = most
        self.pictures: list[NDArray[np.uint8]] = []

    def watching(self, predict: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
        """`predict` (batch -> logits [1, 1, Z, Y, X]), watched."""

        def watched(batch: Batch) -> Tensor:
            logits = predict(batch)
            if len(self.pictures) < self.most:
                self.pictures.append(panel(batch.image, batch.mask, logits))
            return logits

        return watched


@torch.no_grad()
def panel(image: Tensor, mask: Tensor, logits: Tensor) -> NDArray[np.uint8]:
    """[1, 1, Z, Y, X] each -> grey picture: columns image, truth, probability; above along z, below along y.

    Unlabelled voxels (mask 255) are grey in the truth.
    """
    truth = (mask == 1).float() + 0.3 * (mask == 255).float()
    columns = []
    for volume in (image.float().clamp(0, 1).sqrt(), truth, logits.float().sigmoid()):  # the root lifts faint neurites
        along_z, along_y = volume[0, 0].amax(0), volume[0, 0].amax(1)  # [Y, X], [Z, X]
        columns.append(torch.cat([along_z, torch.ones_like(along_y[:1]).expand(_GAP, -1), along_y]))
    gap = torch.ones_like(columns[0][:, :1]).expand(-1, _GAP)
    whole = torch.cat([columns[0], gap, columns[1], gap, columns[2]], dim=1)
    found: NDArray[np.uint8] = (255 * whole).round().to(torch.uint8).cpu().numpy()
    return found
