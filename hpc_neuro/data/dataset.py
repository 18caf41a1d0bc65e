"""Crops from the store and the feature cache as batches, loaded ahead of the training step."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import resource_tracker, shared_memory

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpc_neuro.core.constants import UNLABELED
from hpc_neuro.core.geometry import Box, Shape
from hpc_neuro.core.schema import InputError
from hpc_neuro.core.types import Batch, Sample
from hpc_neuro.data.crops import CropSampler, VolumePoints
from hpc_neuro.data.feature_cache import FeatureCache
from hpc_neuro.data.store import PointKind, Store

# The signals by which a scheduler or a person stops a run.
_BLOCKED_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def read_volume_points(store: Store, ids: Sequence[str]) -> list[VolumePoints]:
    """Read the points that crops of each volume may be centered on."""
    kinds: tuple[PointKind, ...] = ("skeleton", "branch", "tip")
    volumes = []

    for id_ in ids:
        stored = store[id_]
        points: dict[str, NDArray[np.int32]] = {
            kind: np.asarray(stored.points(kind), dtype=np.int32).reshape(-1, 3) for kind in kinds
        }
        volumes.append(VolumePoints(id_, stored.shape, points))

    return volumes


class CropDataset(Dataset[tuple[int, Sample]]):
    """`crops[index]` is (index, training sample) of a global index. Files open lazily, once per process."""

    def __init__(
        self,
        store: Store,
        sampler: CropSampler,
        patch: Shape,
        cache: FeatureCache | None = None,
        views: Sequence[str] = (),
    ) -> None:
        """patch: voxels per student token. views: the cached views to read; none without a cache."""
        self.store = store
        self.sampler = sampler
        self.patch = patch
        self.cache = cache
        self.views = tuple(views)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        crop = self.sampler(index)

        # Reading is the same for every crop; only distilled ones are oriented here, before augmentation.
        sample = read_crop(self.store, crop.volume, crop.box)
        if self.cache is None or not crop.distilled:
            return index, sample

        # The features of the oriented crop are not the oriented features of the crop: the cache has them.
        orient = crop.orientation.apply
        sample = dataclasses.replace(
            sample,
            image=orient(sample.image).contiguous(),
            mask=orient(sample.mask).contiguous(),
            skeleton=orient(sample.skeleton).contiguous(),
            features=self.cache.read_crop(crop.volume, crop.box, self.patch, crop.orientation, self.views),
            distilled=True,
        )
        return index, sample

    def collate(self, items: Sequence[tuple[int, Sample]]) -> Batch:
        """Stack samples. Samples without features get zeros, so that shapes do not depend on the draw."""
        samples = [sample for _, sample in items]
        features: dict[str, Tensor] = {}

        if self.cache is not None:
            grid = [n // p for n, p in zip(self.sampler.cfg.size, self.patch, strict=True)]
            zeros = torch.zeros(len(self.cache.layers), self.cache.dim, *grid, dtype=torch.float16)
            features = {view: torch.stack([s.features.get(view, zeros) for s in samples]) for view in self.views}

        return stack_samples(samples, [index for index, _ in items], features)


def read_crop(store: Store, volume: str, box: Box) -> Sample:
    """Read one crop. Where the box leaves the volume, the image repeats its border and the mask is unlabelled."""
    stored = store[volume]

    # The store refuses boxes that leave the volume.
    inside = box.clip(Box.whole(stored.shape))
    padding = [(a - b, c - d) for a, b, c, d in zip(inside.start, box.start, box.stop, inside.stop, strict=True)]

    # A repeated border has the intensities of tissue; zeros would look like an edge.
    image = np.pad(stored.normalized_image(inside), padding, mode="edge")
    mask = np.pad(stored.mask(inside), padding, constant_values=UNLABELED)
    skeleton = np.pad(stored.skeleton(inside), padding)

    return Sample(
        volume=volume,
        box=box,
        # Workers share tensors through memory, which must be contiguous.
        image=torch.from_numpy(np.ascontiguousarray(image))[None],
        mask=torch.from_numpy(np.ascontiguousarray(mask))[None],
        skeleton=torch.from_numpy(np.ascontiguousarray(skeleton))[None],
    )


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
    """Yield an iterator over the batches of `indices` (a list of global indices each), in their order, loaded ahead.

    workers: processes that read; 0 reads in a thread of this process. ahead: batches ready per worker. pin: page-locked
    memory, so that copies to a GPU do not block. An error while reading is raised where the batch is taken.
    """
    if workers == 0:
        with _load_in_thread(crops, indices, ahead) as batches:
            yield (_pin_memory(batch) if pin else batch for batch in batches)
        return

    _require_shared_memory(workers)

    # Workers are spawned, not forked: gloo, CUDA and HDF5 do not survive a fork.
    loader: DataLoader[tuple[int, Sample]] = DataLoader(
        crops,
        batch_sampler=indices,
        num_workers=workers,
        collate_fn=crops.collate,
        prefetch_factor=ahead,
        multiprocessing_context="spawn",
    )

    # iter() starts the workers.
    with _block_signals():
        batches = iter(loader)

    try:
        yield (_pin_memory(batch) if pin else batch for batch in batches)
    except InputError as error:
        # torch adds the traceback of the worker; people need the sentence at its end.
        raise InputError(str(error).strip().rpartition("InputError: ")[2]) from error
    finally:
        # End the workers now, not when the garbage collector runs.
        batches._shutdown_workers()  # type: ignore[attr-defined]


def _require_shared_memory(workers: int) -> None:
    """Raise InputError where processes cannot share memory, as in a container with a read-only /dev/shm."""
    try:
        # What the queues and the tensors of the workers need.
        multiprocessing.get_context("spawn").Semaphore()
        memory = shared_memory.SharedMemory(create=True, size=1)
        memory.close()
        memory.unlink()
    except OSError as error:
        raise InputError(
            f"workers={workers}: processes cannot share memory here ({error}); make /dev/shm writable, or "
            "give workers=0"
        ) from None


@contextlib.contextmanager
def _block_signals() -> Iterator[None]:
    """Child processes started inside keep these signals blocked: only the trainer decides what a signal means."""
    # Starting the tracker unblocks the signals, so it must be running before they are blocked.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextlib.contextmanager
def _load_in_thread(crops: CropDataset, indices: Iterable[list[int]], ahead: int) -> Iterator[Iterator[Batch]]:
    loader = _ThreadLoader(crops, indices, ahead)
    thread = threading.Thread(target=loader.fill, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield loader.take()
    finally:
        # The thread may be waiting for room in the queue; it looks at the flag every 0.1 s.
        loader.stop.set()
        thread.join()


class _ThreadLoader:
    """A bounded queue of batches: `fill` runs in the reading thread, `take` in the training thread."""

    def __init__(self, crops: CropDataset, indices: Iterable[list[int]], ahead: int) -> None:
        self.stop = threading.Event()
        self._crops = crops
        self._indices = indices
        self._queue: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=ahead)

    def fill(self) -> None:
        """Read every batch, until `stop` is set; None marks the end."""
        try:
            for batch_indices in self._indices:
                if self.stop.is_set():
                    return
                self._put(self._crops.collate([self._crops[i] for i in batch_indices]))
            self._put(None)

        # The training thread raises the error, whatever it is.
        except BaseException as error:
            self._put(error)

    def take(self) -> Iterator[Batch]:
        """The batches in order; raises what `fill` raised."""
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _put(self, item: Batch | BaseException | None) -> None:
        while not self.stop.is_set():
            # A timeout instead of waiting for ever: the consumer may have left.
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return


def _pin_memory(batch: Batch) -> Batch:
    """Copy the batch to page-locked memory."""
    features = {view: values.pin_memory() for view, values in batch.features.items()}
    rest = {name: values.pin_memory() for name, values in vars(batch).items() if name != "features"}
    return Batch(features=features, **rest)
