"""Memory of a pass, event by event: traced through a forward and a backward pass that compute nothing.

Tensors are counted between operations, each storage once. What an operation needs inside (workspaces of convolutions)
and what an allocator wastes are not counted.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.losses import Loss, sum_losses


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors created while it is entered: those alive now, and the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storage_bytes: dict[int, int] = {}
        # gloo's threads release tensors, too.
        self._lock = threading.RLock()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count its results."""
        result = func(*args, **(kwargs or {}))

        # Tensors on meta have no memory.
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._count(leaf.untyped_storage())
        return result

    def settle(self, quiet: float = 0.1, limit: float = 10.0) -> None:
        """Return once no tensor has been released for `quiet` seconds, after `limit` seconds at the latest.

        A reduction is over for its caller a little before gloo's thread releases the tensors it worked on.
        """
        end = time.monotonic() + limit
        last_bytes, since = self.live_bytes, time.monotonic()

        # Each release restarts the quiet time, as others may follow.
        while (now := time.monotonic()) < end and now - since < quiet:
            time.sleep(quiet / 10)
            if self.live_bytes != last_bytes:
                last_bytes, since = self.live_bytes, now

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        # Views share a storage, which counts once and is released once.
        if key not in self._storage_bytes:
            weakref.finalize(storage, self._release, key)

        with self._lock:
            # A storage may grow.
            self.live_bytes += size - self._storage_bytes.get(key, 0)
            self._storage_bytes[key] = size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _release(self, key: int) -> None:
        with self._lock:
            self.live_bytes -= self._storage_bytes.pop(key)


@dataclass(frozen=True)
class BackwardEvent:
    """The gradient of a parameter is complete."""

    numel: int
    """Elements of the parameter."""
    peak_bytes: int
    """Most memory of the pass since the event before, without gradients and weights."""
    live_bytes: int
    """Memory of the pass at the event, without gradients and weights."""


def trace_backward(
    module: nn.Module,
    losses: Sequence[Loss],
    crop: Shape,
    crops: int,
    dtype: torch.dtype,
    features: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[BackwardEvent, ...]:
    """Trace one pass of `crops` crops through a TrainModule and the losses, in the order in which gradients complete.

    module: its student may be on meta; features: view -> [L, D, z, y, x] of a distilled crop, all crops being so.
    """
    fake: Any = copy.deepcopy(module).to(dtype).train()
    taps = 1 if fake.distiller is None else fake.distiller.cfg.taps

    # Tensors that are no parameters, such as a cache's statistics, have numbers: they are let into the fake mode.
    with FakeTensorMode(allow_non_fake_inputs=True), _FakeLiveTensors(taps) as live:
        # Off meta, attention is the fused one, as on every device; on meta it would keep all scores.
        fake._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))

        recorder = _EventRecorder(live)
        recorder.watch(fake)
        batch = _make_fake_batch(crop, crops, features or {})

        # What was needed to build module and batch must not count as the peak of the pass.
        live.peak_bytes = live.live_bytes
        logits, distillation, _ = fake(vars(batch))
        loss, _ = sum_losses(losses, StudentOutput(logits, {}), batch)
        torch.autograd.backward(loss if distillation is None else loss + distillation)

    return tuple(recorder.events)


class _EventRecorder:
    """Records an event for each parameter's gradient, and drops the gradient."""

    def __init__(self, live: LiveTensors) -> None:
        self.events: list[BackwardEvent] = []
        self._live = live
        self._weight_bytes = live.live_bytes

    def watch(self, module: nn.Module) -> None:
        """Record the events of a module's parameters."""
        for parameter in module.parameters():
            parameter.register_post_accumulate_grad_hook(self._record)  # type: ignore[no-untyped-call]

    def _record(self, parameter: Tensor) -> None:
        gradient_bytes = 0 if parameter.grad is None else parameter.grad.untyped_storage().nbytes()

        # Gradients are planned by stage elsewhere, so they are dropped here.
        parameter.grad = None
        peak, live = self._live.peak_bytes, self._live.live_bytes

        self.events.append(
            BackwardEvent(parameter.numel(), peak - self._weight_bytes - gradient_bytes, live - self._weight_bytes)
        )

        self._live.peak_bytes = live


def _make_fake_batch(crop: Shape, crops: int, features: Mapping[str, tuple[int, ...]]) -> Batch:
    """A batch without numbers in which every crop is distilled."""
    image = torch.empty(crops, 1, *crop)
    mask = torch.empty(image.shape, dtype=torch.uint8)
    index = torch.empty(crops, dtype=torch.int64)
    cached = {view: torch.empty(crops, *shape, dtype=torch.float16) for view, shape in features.items()}
    distilled: Any = _AllDistilled(crops)
    return Batch(image, mask, torch.empty_like(mask), cached, distilled, index)


class _AllDistilled:
    """Stands for the flags of a batch in which every crop is distilled: a fake tensor has no flags to read.

    The distiller asks a batch only for the indices of its distilled crops.
    """

    def __init__(self, crops: int) -> None:
        self._crops = crops

    def nonzero(self) -> Tensor:
        """Indices [crops, 1] of the crops that are distilled."""
        return torch.arange(self._crops)[:, None]


class _FakeLiveTensors(LiveTensors):  # type: ignore[no-untyped-call]
    """LiveTensors for fake tensors. The backward of a tube needs the number of tokens that its taps touch."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        # Entries of a tube: four neighbors of every tap.
        self._entries = 4 * taps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; of a tube's entries as many are distinct as there are tubes."""
        if func is torch.ops.aten.unique_consecutive.default:
            values = args[0].new_empty(args[0].numel() // self._entries)
            return values, values.new_empty(0), torch.empty_like(values)
        return super().__torch_dispatch__(func, types, args, kwargs)
