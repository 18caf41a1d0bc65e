"""What a student costs before it is built: parameters, operations and memory of a training step, by part.

A forward pass runs on fake tensors, which have shapes and no values, under torch's operation counter: two operations
per product, as papers count them. The backward pass computes twice as many. Memory is what it keeps of the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hpc_neuro.core.files import format_bytes
from hpc_neuro.core.geometry import Shape
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import Student, blank_student

_STATE_BYTES = 16
"""Bytes per parameter: float32 weight and gradient, and two Adam moments."""
_PARTS = {
    "encoder": ("encoder",),
    "tokenizer": ("tokenizer", "to_tokens"),
    "transformer": ("vit", "from_tokens", "token_gain"),
    "decoder": ("decoder",),
}
"""Part -> the student's modules that it holds."""
_FIRST_LAYER = "encoder.first"
"""The convolution that reads the image."""


@dataclass(frozen=True)
class Cost:
    """One part of the student at a crop and batch."""

    part: str
    parameters: int
    # In operations, two for each product.
    forward: int
    # In bytes that are held from forward to backward.
    kept: int


@dataclass(frozen=True)
class Costs:
    """A training step."""

    parts: list[Cost]
    step: int
    """Operations of the forward and the backward pass, recomputation included."""

    @property
    def total(self) -> Cost:
        """The sum of all parts."""
        return Cost(
            "total",
            sum(part.parameters for part in self.parts),
            sum(part.forward for part in self.parts),
            sum(part.kept for part in self.parts),
        )


def estimate_costs(cfg: StudentConfig, crop: Shape, batch: int, value_bytes: int = 4) -> Costs:
    """Cost of a training step. `crop` in voxels, a multiple of the patch; `value_bytes` 4 for float32, 2 for bf16."""
    student = blank_student(cfg).train()

    # Fake tensors carry shapes alone, so that a student larger than the memory is priced, too.
    with FakeTensorMode():
        # The student's own parameters lie on meta. Fake ones stand in for them on the CPU, where the image lies.
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in student.named_parameters()}
        image = torch.empty(batch, 1, *crop)

        kept = _KeptBytes(student, weights.values())
        with kept:
            functional_call(student, weights, (image,))

        # The counter knows plain attention, which is two products, but not the fused kernels of some devices.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            functional_call(student, weights, (image,))

    forward = _operations_by_child(counter)

    parts = []
    for part, names in _PARTS.items():
        modules = [module for name in names if (module := getattr(student, name, None)) is not None]
        # A student without a transformer lacks some parts.
        if modules:
            parameters = sum(p.numel() for module in modules for p in module.parameters())
            operations = sum(forward.get(name, 0) for name in names)

            # The pass ran in float32. Training keeps the same values at `value_bytes` each.
            kept_bytes = sum(kept.bytes.get(name, 0) for name in names) * value_bytes // 4
            parts.append(Cost(part, parameters, operations, kept_bytes))

    # The backward pass has a product for the gradient of each of the two factors; the image needs none.
    step = 3 * sum(part.forward for part in parts) - forward.get(_FIRST_LAYER, 0)

    # A checkpointed transformer runs its forward pass twice.
    if cfg.checkpointing:
        step += sum(part.forward for part in parts if part.part == "transformer")

    return Costs(parts, step)


def summarize_costs(cfg: StudentConfig, crop: Shape, batch: int, value_bytes: int = 4) -> list[str]:
    """`estimate_costs` as a table for people, with the total and what weights, gradients and optimizer need."""
    costs = estimate_costs(cfg, crop, batch, value_bytes)
    grid = " x ".join(str(n // p) for n, p in zip(crop, cfg.patch, strict=True))

    lines = [
        f"student {cfg.size}, crop {' x '.join(map(str, crop))}, batch {batch}: {grid} tokens",
        f"{'part':<12}{'parameters':>12}{'GFLOP forward':>15}{'kept for backward':>19}",
    ]

    for row in (*costs.parts, costs.total):
        numbers = f"{row.forward / 1e9:>15.2f}{format_bytes(row.kept):>19}"
        lines.append(f"{row.part:<12}{row.parameters / 1e6:>10.2f} M{numbers}")

    lines.append(f"a step, forward and backward: {costs.step / 1e9:.2f} GFLOP")

    # The state is divided over the ranks. The sum holds for any number of them.
    state = format_bytes(_STATE_BYTES * costs.total.parameters)
    lines.append(f"weights, gradients and Adam in float32: {state} over all ranks")

    return lines


def _operations_by_child(counter: FlopCounterMode) -> dict[str, int]:
    """Forward operations so far, by direct child of the student, and of the first layer."""
    counts: dict[str, int] = {}
    for name, operations in counter.get_flop_counts().items():
        root, _, path = name.partition(".")
        # The counter lists modules of every depth. Only direct children are disjoint.
        if root == Student.__name__ and path and ("." not in path or path == _FIRST_LAYER):
            counts[path] = sum(operations.values())

    return counts


class _KeptBytes:
    """Counts the bytes that a forward pass keeps for the backward pass, parameters not counted.

    `bytes`: direct child of the student -> bytes; a tensor that several children keep counts for the first.
    """

    def __init__(self, student: Student, weights: Iterable[Tensor]) -> None:
        self.bytes: dict[str, int] = {}
        self._child = ""

        # Parameters take their memory with or without a backward pass.
        self._own = {weight.untyped_storage()._cdata for weight in weights}

        # By storage. The tensors are held, because the address of a freed storage would be given out again.
        self._kept: dict[int, Tensor] = {}

        self._children = list(student.named_children())
        self._handles: list[Any] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> _KeptBytes:
        for name, child in self._children:
            self._handles.append(child.register_forward_pre_hook(functools.partial(self._enter_child, name)))

        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_child(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._child = name

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()

        # Several operations may keep views of one storage, which takes its memory once.
        if storage._cdata not in self._own and storage._cdata not in self._kept:
            self._kept[storage._cdata] = tensor
            self.bytes[self._child] = self.bytes.get(self._child, 0) + storage.nbytes()

        return tensor
