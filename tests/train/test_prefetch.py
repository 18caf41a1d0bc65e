"""Batches are handed out in order, each once, and one is on its way before it is asked for."""

from __future__ import annotations

import pytest
import torch

from hpc_neuro.core.types import Batch
from hpc_neuro.train.batches import DevicePrefetcher


def test_one_batch_is_brought_over_ahead_and_each_is_handed_out_once():
    read = []

    def batches():
        for i in range(3):
            read.append(i)
            image = torch.full((1, 1, 2, 2, 2), float(i))
            yield Batch(image, image, image, {}, torch.tensor([False]), torch.tensor([i]))

    ready = DevicePrefetcher(batches(), torch.device("cpu"))
    assert [int(ready.take().index), read] == [0, [0]]
    ready.fetch()
    ready.fetch()  # no more than one
    assert read == [0, 1]
    assert [int(ready.take().index), int(ready.take().image[0, 0, 0, 0, 0]), read] == [1, 2, [0, 1, 2]]
    ready.fetch()  # after the last step
    with pytest.raises(StopIteration):
        ready.take()
