"""What a pass holds, moment by moment: followed through a forward and a backward that compute nothing.

Tensors are counted between operations, each storage once. What an operation needs inside (workspaces of convolutions)
and what an allocator wastes are not in it.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
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
    """Counts the bytes of tensors made while it is entered, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, int] = {}  # storage -> bytes
        self._lock = threading.RLock()  # gloo's threads let go of tensors too

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            weakref.finalize(storage, self._gone, key)
        with self._lock:
            self.now += size - self._seen.get(key, 0)  # a storage may grow
            self._seen[key] = size
            self.most = max(self.most, self.now)

    def _gone(self, key: int) -> None:
        with self._lock:
            self.now -= self._seen.pop(key)

    def settle(self, quiet: float = 0.1, limit: float = 10.0) -> None:
        """Return once no tensor has been let go of for `quiet` seconds, after `limit` seconds at the latest.

        A reduction is over for its caller a little before gloo's thread drops the tensors it worked on.
        """
        end, held, since = time.monotonic() + limit, self.now, time.monotonic()
        while (now := time.monotonic()) < end and now - since < quiet:
            time.sleep(quiet / 10)
            if self.now != held:
                held, since = self.now, now


@dataclass(frozen=True)
class BackwardEvent:
    """The gradient of a parameter has come out of a backward."""

    numel: int  # of the parameter
    most: int  # [bytes] held for the pass since the moment before: gradients and weights not counted
    now: int


class _Followed(LiveTensors):  # type: ignore[no-untyped-call]
    """LiveTensors without numbers, on which the backward of a tube asks how many tokens its taps touch."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self._entries = 4 * taps  # of a tube: four neighbours of every tap

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation; as many tokens are touched as there are tubes."""
        if func is torch.ops.aten.unique_consecutive.default:
            found = args[0].new_empty(args[0].numel() // self._entries)
            return found, found.new_empty(0), torch.empty_like(found)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Every:
    """All crops of a pass are distilled, which a tensor without numbers cannot say."""

    def __init__(self, crops: int) -> None:
        self._crops = crops

    def nonzero(self) -> Tensor:
        """As that of a tensor of `crops` times True."""
        return torch.arange(self._crops)[:, None]


def trace_backward(
    module: nn.Module,
    losses: Sequence[Loss],
    crop: Shape,
    crops: int,
    dtype: torch.dtype,
    features: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[BackwardEvent, ...]:
    """One pass of so many crops through a TrainModule and the losses, in the order in which gradients are ready.

    module: its student may be on meta; features: view -> [L, D, z, y, x] of a distilled crop, all of them being so.
    """
    traced: Any = copy.deepcopy(module).to(dtype).train()
    found: list[BackwardEvent] = []
    # what is no parameter, such as a cache's statistics, has numbers
    taps = 1 if traced.distiller is None else traced.distiller.cfg.taps
    with FakeTensorMode(allow_non_fake_inputs=True), _Followed(taps) as alive:
        # its attention is then the fused one, as on every device; on meta it would be the one that keeps all scores
        traced._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        weights = alive.now
        for parameter in traced.parameters():
            parameter.register_post_accumulate_grad_hook(_noting(found, alive, weights))
        image = torch.empty(crops, 1, *crop)
        mask, index = torch.empty(image.shape, dtype=torch.uint8), torch.empty(crops, dtype=torch.int64)
        cached = {view: torch.empty(crops, *shape, dtype=torch.float16) for view, shape in (features or {}).items()}
        distilled: Any = _Every(crops)
        batch = Batch(image, mask, torch.empty_like(mask), cached, distilled, index)
        alive.most = alive.now
        logits, distillation, _ = traced(vars(batch))
        loss, _ = sum_losses(losses, StudentOutput(logits, {}), batch)
        torch.autograd.backward(loss if distillation is None else loss + distillation)
    return tuple(found)


def _noting(found: list[BackwardEvent], alive: LiveTensors, weights: int) -> Callable[[nn.Parameter], None]:
    def hook(parameter: nn.Parameter) -> None:
        own = 0 if parameter.grad is None else parameter.grad.untyped_storage().nbytes()
        parameter.grad = None
        found.append(BackwardEvent(parameter.numel(), alive.most - weights - own, alive.now - weights))
        alive.most = alive.now

    return hook
