"""Crops from the store (and the feature cache) as batches, read ahead of the training step."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_neuro.core.constants import UNLABELLED
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.types import Batch, Sample
from hpc_neuro.data.crops import CropSampler, VolumePoints
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.data.store import Kind, Store

_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def read_volume_points(store: Store, ids: Sequence[str]) -> list[VolumePoints]:
    """What the sampler needs of each volume."""
    kinds: tuple[Kind, ...] = ("skeleton", "branch", "tip")
    return [
        VolumePoints(
            i, store[i].shape, {k: np.asarray(store[i].points(k), dtype=np.int32).reshape(-1, 3) for k in kinds}
        )
        for i in ids
    ]


class CropDataset(Dataset[tuple[int, Sample]]):
    """`crops[index]` is the training sample of a global index. Files open lazily, once per process."""

    def __init__(
        self,
        store: Store,
        sampler: CropSampler,
        patch: Shape,
        cache: FeatureCache | None = None,
        views: Sequence[str] = (),
    ) -> None:
        """patch: voxels per student token; views: the cached views to read, none without a cache."""
        self.store, self.sampler, self.patch, self.cache, self.views = store, sampler, patch, cache, tuple(views)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        draw = self.sampler(index)
        sample = read_crop(self.store, draw.volume, draw.box)
        if self.cache is None or not draw.distilled:
            return index, sample
        features = self.cache.crop(draw.volume, draw.box, self.patch, draw.orientation, self.views)
        turned = {k: draw.orientation.apply(getattr(sample, k)).contiguous() for k in ("image", "mask", "skeleton")}
        return index, Sample(**{**vars(sample), **turned, "features": features, "distilled": True})

    def collate(self, items: Sequence[tuple[int, Sample]]) -> Batch:
        """Stack samples; those without features get zeros, so that shapes do not depend on the draw."""
        samples = [sample for _, sample in items]
        features: dict[str, Tensor] = {}
        if self.cache is not None:
            grid = [n // p for n, p in zip(self.sampler.cfg.size, self.patch, strict=True)]
            blank = torch.zeros(len(self.cache.layers), self.cache.dim, *grid, dtype=torch.float16)
            features = {v: torch.stack([s.features.get(v, blank) for s in samples]) for v in self.views}
        return stack_samples(samples, [index for index, _ in items], features)


def read_crop(store: Store, volume: str, box: Box) -> Sample:
    """One crop; where the box reaches past the volume the image repeats its border and nothing is labelled."""
    held = store[volume]
    inside = box.clip(Box.whole(held.shape))
    pad = [(a - b, c - d) for a, b, c, d in zip(inside.start, box.start, box.stop, inside.stop, strict=True)]
    image = np.pad(held.normalized_image(inside), pad, mode="edge")
    mask = np.pad(held.mask(inside), pad, constant_values=UNLABELLED)
    skeleton = np.pad(held.skeleton(inside), pad)
    tensors = [torch.from_numpy(np.ascontiguousarray(a))[None] for a in (image, mask, skeleton)]
    return Sample(volume=volume, box=box, image=tensors[0], mask=tensors[1], skeleton=tensors[2])


def stack_samples(samples: Sequence[Sample], index: Sequence[int], features: dict[str, Tensor] | None = None) -> Batch:
    """Samples of one shape as a Batch."""
    return Batch(
        image=torch.stack([s.image for s in samples]),
        mask=torch.stack([s.mask for s in samples]),
        skeleton=torch.stack([s.skeleton for s in samples]),
        features=features or {},
        distilled=torch.tensor([s.distilled for s in samples]),
        index=torch.tensor(index, dtype=torch.int64),
    )


@contextlib.contextmanager
def load_batches(
    crops: CropDataset, indices: Iterable[list[int]], workers: int, ahead: int, pin: bool
) -> Iterator[Iterator[Batch]]:
    """Batches in the order of `indices` (one list of global indices each), read ahead of need.

    workers: processes that read; 0 reads in a thread of this process. ahead: batches ready per worker. pin: page-locked
    memory, for copies to a GPU that do not block. An error while reading is raised where the batch is taken.
    """
    if workers == 0:
        with _threaded(crops, indices, ahead) as ready:
            yield (_pinned(batch) if pin else batch for batch in ready)
        return
    # Started afresh rather than forked: gloo, CUDA and HDF5 do not survive a fork.
    loader: DataLoader[tuple[int, Sample]] = DataLoader(
        crops,
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=crops.collate,
        prefetch_factor=ahead,
        multiprocessing_context="spawn",
    )
    with _signals_blocked():
        ready = iter(loader)
    try:
        yield (_pinned(batch) if pin else batch for batch in ready)
    finally:
        # frees the workers now, not when the garbage collector comes by
        ready._shutdown_workers()  # type: ignore[attr-defined]


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Children started in here keep the signals blocked for life: only the trainer decides what a signal means."""
    resource_tracker.ensure_running()  # its start unblocks the signals again, so it must not happen in between
    old = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


@contextlib.contextmanager
def _threaded(crops: CropDataset, indices: Iterable[list[int]], ahead: int) -> Iterator[Iterator[Batch]]:
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for chunk in indices:
                if stop.is_set():
                    return
                put(crops.collate([crops[i] for i in chunk]))
            put(None)
        except BaseException as error:  # handed over whole and raised in the training thread
            put(error)

    def take() -> Iterator[Batch]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()


def _pinned(batch: Batch) -> Batch:
    """The batch in page-locked memory."""
    features = {view: held.pin_memory() for view, held in batch.features.items()}
    rest = {k: v.pin_memory() for k, v in vars(batch).items() if k != "features"}
    return Batch(features=features, **rest)
