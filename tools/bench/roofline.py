"""Operations, bytes and kernel launches of a training step, and what named GPUs make of them; no GPU is needed.

    python -m tools.bench.roofline --size base --crop 96 96 96 --batch 16 [--inductor] [--repeats 5]

Forward, losses and backward are traced on fake tensors under bf16 autocast as one graph. In `eager` each operation that
makes a new tensor is a kernel, which reads its inputs and writes its outputs. In `compiled` the graph is broken down as
torch.compile does, and neighbors over the same voxels become one kernel, which reads and writes what crosses its
border; matrix products, convolutions and attention stay kernels of their own. Augmentation runs eagerly in both, and
AdamW is fused. A kernel takes the larger of its operations at the card's peak and its bytes at the card's bandwidth,
and at least the time of an empty kernel; the host takes a fixed time per launch, and the slower of both decides. These
are lower bounds: kernels reach 60 to 90 % of either. MFU counts three times the operations of forward at the card's
peak.

--inductor compiles the step on this CPU for one small crop, and counts the kernels that are generated for it. Where a
GPU is at hand the same step is measured beside the prediction, eager and compiled. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from hpc_neuro.core.geometry import Shape
from hpc_neuro.core.types import Batch, StudentOutput
from hpc_neuro.data.augment import augment
from hpc_neuro.data.config import AugmentConfig
from hpc_neuro.losses import sum_losses
from hpc_neuro.losses.segmentation import CrossEntropy, Dice
from hpc_neuro.models.config import SIZES, StudentConfig
from hpc_neuro.models.cost import estimate_costs
from hpc_neuro.models.student import Student, blank_student, build_student

_LAUNCH = 2e-6
"""[s] Of an empty kernel on the device."""
_HOST = {"eager": 8e-6, "compiled": 3e-6}
"""[s] Of the host per launch: dispatcher and autograd, or a compiled call."""
_ADAM_BYTES = 28
"""Per parameter: AdamW reads weight, gradient and two moments, and writes weight and moments, in float32."""
_ROW = 8192
"""[element] Longest reduction whose result the same kernel can use."""
_SMALL: Shape = (16, 64, 64)
"""[voxel] Crop that is compiled and augmented to count kernels, whose number no size changes."""

_ATTENTION = "_scaled_dot_product"
_MATRIX = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
_VIEWS = (
    "view", "_unsafe_view", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "alias",
    "detach", "unbind", "split", "split_with_sizes", "as_strided", "getitem", "reshape", "lift_fresh",
)  # fmt: skip
_CONSTANTS = (
    "full", "iota", "arange", "scalar_tensor", "zeros", "ones", "new_zeros", "ones_like", "zeros_like", "empty",
)  # fmt: skip
_REDUCTIONS = ("sum", "mean", "amax", "amin", "var_mean", "var", "any", "argmax")
_OPAQUE = ("upsample", "_upsample", "index_put", "sort", "topk", "cumsum", "grid_sampler", "scatter", "nonzero")


@dataclass(frozen=True)
class Card:
    """A GPU, by its maker's data sheet."""

    name: str
    peak: float
    """[1/s] Operations in bf16, dense, with float32 sums."""
    bandwidth: float
    """[byte/s] Of its memory."""
    source: str


CARDS = (
    Card("H200", 989e12, 4.8e12, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    Card("A100", 312e12, 2.039e12, "NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM"),
    Card("L40S", 362e12, 0.864e12, "NVIDIA L40S data sheet"),
)


@dataclass(frozen=True)
class Kernel:
    """One launch."""

    name: str
    operations: float
    bytes: float

    def seconds(self, card: Card) -> float:
        """The least time on a card."""
        return max(self.operations / card.peak, self.bytes / card.bandwidth, _LAUNCH)


@dataclass(frozen=True)
class Prediction:
    """What a card makes of the kernels of a step."""

    milliseconds: float
    device_milliseconds: float
    host_milliseconds: float
    mfu: float
    """Model operations over what the card could do meanwhile, 0 to 1."""


def predict_time(kernels: list[Kernel], mode: str, card: Card, model_operations: float) -> Prediction:
    """Time and utilization of a step."""
    device = sum(kernel.seconds(card) for kernel in kernels)
    host = _HOST[mode] * len(kernels)
    return Prediction(
        1e3 * max(device, host), 1e3 * device, 1e3 * host, model_operations / max(device, host) / card.peak
    )


def list_kernels(cfg: StudentConfig, crop: Shape, batch: int, mode: str) -> list[Kernel]:
    """The kernels of a step: augmentation, forward, losses and backward, optimizer."""
    student = blank_student(cfg).train()
    parameters = sum(p.numel() for p in student.parameters())

    graph = trace_step(student, crop, batch, select_decomp_table() if mode == "compiled" else None)
    step = list_eager_kernels(graph) if mode == "eager" else list_fused_kernels(graph)
    return [*list_augment_kernels(crop, batch), *step, Kernel("AdamW", 16.0 * parameters, _ADAM_BYTES * parameters)]


def trace_step(student: Student, crop: Shape, batch: int, decompositions: Mapping[Any, Any] | None) -> fx.Graph:
    """Forward, losses and gradients as one graph of aten operations; nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, requires_grad=True) for name, p in student.named_parameters()}
        image = torch.empty(batch, 1, *crop)
        mask = torch.empty(image.shape, dtype=torch.uint8)
        step = make_step(student, batch)
        module = make_fx(step, decomposition_table=dict(decompositions or {}))(weights, image, mask)

    # What nothing uses is never computed by a compiled program.
    if decompositions:
        module.graph.eliminate_dead_code()
    graph: fx.Graph = module.graph
    return graph


def make_step(student: Student, batch: int) -> Callable[[dict[str, Tensor], Tensor, Tensor], list[Tensor]]:
    """A function of weights, image and mask that gives all gradients."""

    def step(weights: dict[str, Tensor], image: Tensor, mask: Tensor) -> list[Tensor]:
        with torch.autocast(image.device.type, torch.bfloat16):
            output = functional_call(student, weights, (image,))
        no_distillation = torch.zeros(batch, dtype=torch.int64)
        data = Batch(image, mask, mask, {}, no_distillation.bool(), no_distillation)
        loss, _ = sum_losses((Dice(), CrossEntropy()), StudentOutput(output.logits, {}), data)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]

    return step


def list_eager_kernels(graph: fx.Graph) -> list[Kernel]:
    """A kernel for each operation that makes a new tensor."""
    kernels = []
    for node in graph.nodes:
        if node.op == "call_function" and _classify(node) != "view":
            read = sum(map(_count_bytes, node.all_input_nodes))
            kernels += _split_matrix_kernel(node, read + _count_bytes(node))
    return kernels


def list_fused_kernels(graph: fx.Graph) -> list[Kernel]:
    """The kernels after fusion; see the module's text."""
    groups, kernels = _Groups(graph), list[Kernel]()
    for members in groups.list_groups():
        inside = set(members)

        read = {groups.find_base(source) for node in members for source in node.all_input_nodes}
        read = {node for node in read if node not in inside and _classify(node) != "constant"}
        written = [node for node in members if any(user not in inside for user in groups.list_users(node))]
        size = sum(map(_count_bytes, read)) + sum(map(_count_bytes, written))

        # A matrix product is alone in its group.
        if _classify(members[0]) == "matrix":
            kernels += _split_matrix_kernel(members[0], size)
        else:
            names = sorted({_read_name(node) for node in members})
            kernels.append(Kernel("+".join(names[:4]), sum(_count_elements(node) for node in members), size))
    return kernels


class _Groups:
    """The operations of a graph that become one kernel each."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = [node for node in graph.nodes if node.op == "call_function"]
        self._parent: dict[fx.Node, fx.Node] = {}
        self._depth: dict[fx.Node, int] = {}
        for node in graph.nodes:
            self._place(node)

    def find_base(self, node: fx.Node) -> fx.Node:
        """The operation whose values a view shows."""
        while node.op == "call_function" and _classify(node) == "view":
            node = node.all_input_nodes[0]
        return node

    def list_users(self, node: fx.Node) -> Iterator[fx.Node]:
        """The operations and outputs that use a node, also by way of views."""
        for user in node.users:
            if user.op == "call_function" and _classify(user) == "view":
                yield from self.list_users(user)
            else:
                yield user

    def list_groups(self) -> list[list[fx.Node]]:
        """The members of each kernel, in the order of the graph."""
        groups: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self._nodes:
            if _classify(node) not in ("view", "constant"):
                groups[self._find_top(node)].append(node)
        return list(groups.values())

    def _place(self, node: fx.Node) -> None:
        """Give a node its depth: how many kernels must end before it. Neighbors of one depth and domain are fused."""
        sources = [self.find_base(source) for source in node.all_input_nodes]
        self._depth[node] = max((self._depth[source] + self._is_kernel_end(source) for source in sources), default=0)
        if node.op != "call_function" or _classify(node) != "fusable":
            return

        for source in sources:
            is_fusable = source.op == "call_function" and _classify(source) == "fusable"
            is_level = is_fusable and self._depth[source] == self._depth[node]
            if is_level and _count_domain(source) == _count_domain(node):
                self._parent[self._find_top(source)] = self._find_top(node)

    def _is_kernel_end(self, node: fx.Node) -> bool:
        """Whether what uses a node must be another kernel: a matrix product, or a reduction over more than a row."""
        if node.op != "call_function" or _classify(node) in ("view", "constant"):
            return False
        if _classify(node) != "fusable":
            return True
        return _read_name(node) in _REDUCTIONS and _count_domain(node) > _ROW * max(_count_elements(node), 1)

    def _find_top(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent.get(node, node)) is not node:
            node = parent
        return node


def _classify(node: fx.Node) -> str:
    """`view`, `constant`, `matrix` (a library's kernel of its own), `opaque` or `fusable`."""
    name = _read_name(node)
    if name in _VIEWS:
        return "view"
    if name in _CONSTANTS:
        return "constant"
    if name in _MATRIX or name.startswith(_ATTENTION):
        return "matrix"
    return "opaque" if name.startswith(_OPAQUE) else "fusable"


def _read_name(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "__name__", target)).split(".")[0]


def _list_values(node: fx.Node) -> list[Tensor]:
    return [value for value in tree_flatten(node.meta.get("val"))[0] if isinstance(value, Tensor)]


def _count_bytes(node: fx.Node) -> float:
    return float(sum(value.numel() * value.element_size() for value in _list_values(node)))


def _count_elements(node: fx.Node) -> int:
    return max((value.numel() for value in _list_values(node)), default=0)


def _count_domain(node: fx.Node) -> int:
    """The elements over which a kernel of a node runs."""
    if _read_name(node) not in _REDUCTIONS:
        return _count_elements(node)
    return max(_count_elements(source) for source in node.all_input_nodes)


def _split_matrix_kernel(node: fx.Node, size: float) -> list[Kernel]:
    """The kernels of one operation: backward passes have one for the input's gradient and one for the weight's."""
    name, count = _read_name(node), 1
    if name == "convolution_backward" or (name.startswith(_ATTENTION) and name.endswith("backward")):
        count = 2

    operations = _count_operations(node)
    return [Kernel(name, operations / count, size / count) for _ in range(count)]


def _count_operations(node: fx.Node) -> float:
    """Operations of a node, two per product."""
    name, target = _read_name(node), node.target

    arguments = [[getattr(a, "meta", {}).get("val", a) for a in group] for group in (node.args, node.kwargs.values())]
    if name.startswith(_ATTENTION):
        # The counter knows the kernels of GPUs, and not this one of CPUs.
        tensors = [value for value in arguments[0] if isinstance(value, Tensor) and value.dim() == 4]
        # A backward pass is given the output's gradient first.
        query, key, value = tensors[1:4] if name.endswith("backward") else tensors[:3]
        forward = float(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]
        return 2.5 * forward if name.endswith("backward") else forward

    packet = getattr(target, "overloadpacket", None)
    if packet not in flop_registry:
        return float(_count_elements(node))
    kwargs = dict(zip(node.kwargs, arguments[1], strict=True))
    return float(flop_registry[packet](*arguments[0], **kwargs, out_val=node.meta["val"]))


class _EagerKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records a kernel for each operation that makes a new tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and record it."""
        output = func(*args, **(kwargs or {}))

        name = func.__name__.split(".")[0]
        if name not in _VIEWS:
            tensors = [t for t in tree_flatten((args, kwargs, output))[0] if isinstance(t, Tensor)]
            size = float(sum(t.numel() * t.element_size() for t in tensors))
            self.kernels.append(Kernel(name, max((t.numel() for t in tensors), default=0), size))
        return output


def list_augment_kernels(crop: Shape, batch: int) -> list[Kernel]:
    """The kernels of augmentation: counted on two small crops, their bytes scaled to the voxels of the batch."""
    few = 2
    image = torch.rand(few, 1, *_SMALL)
    mask = (image > 0.9).to(torch.uint8)
    index = torch.arange(few)

    with _EagerKernels() as counter:
        augment(Batch(image, mask, mask.clone(), {}, torch.zeros(few, dtype=torch.bool), index), AugmentConfig(), 0)

    scale = batch * math.prod(crop) / (few * math.prod(_SMALL))
    return [Kernel(f"augment {k.name}", k.operations * scale, k.bytes * scale) for k in counter.kernels]


def count_inductor_kernels(cfg: StudentConfig) -> int:
    """Kernels that torch's compiler generates on this CPU for one small crop; products are not among them."""
    from torch._inductor import metrics

    metrics.reset()
    _make_training_step(cfg, _SMALL, 1, "cpu", is_compiled=True)()
    return int(metrics.generated_kernel_count)


def measure_step(cfg: StudentConfig, crop: Shape, batch: int, device: str, is_compiled: bool, repeats: int) -> float:
    """Milliseconds of forward, losses, backward and AdamW on a device, the least of the repeats."""
    step = _make_training_step(cfg, crop, batch, device, is_compiled)
    step()
    step()

    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def _make_training_step(
    cfg: StudentConfig, crop: Shape, batch: int, device: str, is_compiled: bool
) -> Callable[[], None]:
    torch.manual_seed(0)
    student = build_student(cfg).to(device).train()

    image = torch.rand(batch, 1, *crop, device=device)
    mask = (image > 0.99).to(torch.uint8)
    no_distillation = torch.zeros(batch, dtype=torch.int64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def compute_loss(image: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            logits = student(image).logits
        data = Batch(image, mask, mask, {}, no_distillation.bool(), no_distillation)
        return sum_losses((Dice(), CrossEntropy()), StudentOutput(logits, {}), data)[0]

    compute = torch.compile(compute_loss) if is_compiled else compute_loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        compute(image).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def main() -> None:
    """Print the table of a step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="base", choices=list(SIZES))
    parser.add_argument("--crop", type=int, nargs=3, default=(96, 96, 96), help="[voxel]")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--patch", type=int, nargs=3, help="[voxel] none: the default of the student")
    parser.add_argument("--inductor", action="store_true", help="compile on this CPU and count kernels; minutes")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps where there is a GPU")
    args = parser.parse_args()

    z, y, x = args.crop
    cfg = StudentConfig(size=args.size)
    if args.patch:
        pz, py, px = args.patch
        cfg = replace(cfg, patch=(pz, py, px))

    facts = describe_step(cfg, (z, y, x), args.batch)
    if args.inductor:
        facts["inductor_kernels"] = count_inductor_kernels(cfg)
        print(f"inductor generates {facts['inductor_kernels']} kernels on this CPU, products aside")
    if torch.cuda.is_available():
        for mode in _HOST:
            milliseconds = measure_step(cfg, (z, y, x), args.batch, "cuda", mode == "compiled", args.repeats)
            facts[mode]["measured_milliseconds"] = milliseconds
            print(f"{torch.cuda.get_device_name()}, {mode}, without augmentation: {milliseconds:.1f} ms")
    print(json.dumps(facts))


def describe_step(cfg: StudentConfig, crop: Shape, batch: int) -> dict[str, Any]:
    """The figures of a step, printed."""
    model = 3.0 * estimate_costs(cfg, crop, batch).total.forward
    voxels = batch * math.prod(crop)
    facts: dict[str, Any] = {"size": cfg.size, "crop": list(crop), "batch": batch, "model_operations": model}
    print(f"student {cfg.size}, patch {cfg.patch}, crop {crop}, batch {batch}: {model / 1e12:.2f} TFLOP of the model")
    for card in CARDS:
        print(f"{card.name:>6}: {card.peak / 1e12:.0f} TFLOP/s, {card.bandwidth / 1e12:.2f} TB/s ({card.source})")

    for mode in _HOST:
        kernels = list_kernels(cfg, crop, batch, mode)
        operations, size = sum(k.operations for k in kernels), sum(k.bytes for k in kernels)
        per_voxel = f"{size / 1e9:.1f} GB, {size / voxels:.0f} B/voxel"
        print(f"{mode}: {len(kernels)} launches, {operations / 1e12:.2f} TFLOP, {per_voxel}")

        facts[mode] = {"launches": len(kernels), "operations": operations, "bytes": size, "cards": {}}
        for card in CARDS:
            prediction = predict_time(kernels, mode, card, model)
            facts[mode]["cards"][card.name] = asdict(prediction)
            device, host = prediction.device_milliseconds, prediction.host_milliseconds
            both = f"(device {device:.1f}, host {host:.1f})"
            print(
                f"{card.name:>6}: {prediction.milliseconds:6.1f} ms at least {both}, MFU {prediction.mfu:.1%} at most"
            )

        for name, share in list_largest(kernels, CARDS[0]):
            print(f"        {share:5.1%} of the device's time: {name}")
    return facts


def list_largest(kernels: list[Kernel], card: Card, count: int = 6) -> list[tuple[str, float]]:
    """The kinds of kernels that take most time, with their share of it."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        seconds[kernel.name] += kernel.seconds(card)

    total = sum(seconds.values())
    largest = sorted(seconds.items(), key=lambda item: -item[1])[:count]
    return [(name, value / total) for name, value in largest]


if __name__ == "__main__":
    main()
