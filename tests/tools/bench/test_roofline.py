"""The roofline counts operations, bytes and kernels that can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.cost import estimate_costs
from tools.bench.roofline import (
    CARDS,
    Kernel,
    list_eager_kernels,
    list_fused_kernels,
    list_kernels,
    measure_step,
    predict_time,
)

H200 = CARDS[0]
SMALL = StudentConfig(depth=2, patch=(8, 16, 16))


def count(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels of a function, eager and fused."""
    eager = make_fx(function)(x).graph  # type: ignore[no-untyped-call]
    broken_down = make_fx(function, decomposition_table=select_decomp_table())(x).graph  # type: ignore[no-untyped-call]
    return list_eager_kernels(eager), list_fused_kernels(broken_down)


def test_a_chain_over_the_same_voxels_is_one_kernel_that_reads_and_writes_once() -> None:
    eager, fused = count(lambda x: (x * 2 + 1).relu(), torch.rand(100, 10))
    assert [kernel.bytes for kernel in eager] == [8000, 8000, 8000]
    assert [kernel.bytes for kernel in fused] == [8000]


def test_a_product_is_a_kernel_of_its_own() -> None:
    weight = torch.rand(10, 20)
    eager, fused = count(lambda x: ((x + 1) @ weight).relu(), torch.rand(100, 10))
    assert [kernel.name for kernel in eager] == ["add", "mm", "relu"]
    assert [kernel.name for kernel in fused] == ["add", "mm", "relu"]
    assert fused[1].operations == 2 * 100 * 10 * 20
    assert fused[1].bytes == 4 * (100 * 10 + 10 * 20 + 100 * 20)


def test_a_sum_over_a_row_is_fused_and_one_over_the_volume_is_not() -> None:
    x = torch.rand(1000, 64)
    assert len(count(lambda x: x / x.sum(1, keepdim=True), x)[1]) == 1
    assert len(count(lambda x: x / x.sum(), x)[1]) == 2


def test_views_cost_nothing_and_their_values_are_read() -> None:
    eager, fused = count(lambda x: x.reshape(10, 100).t() + 1, torch.rand(100, 10))
    assert [kernel.bytes for kernel in eager] == [kernel.bytes for kernel in fused] == [8000]


def test_the_slower_of_device_and_host_decides() -> None:
    product = Kernel("mm", H200.peak * 1e-3, 1.0)
    copy = Kernel("copy", 1.0, H200.bandwidth * 2e-3)
    prediction = predict_time([product, copy], "compiled", H200, H200.peak * 1e-3)
    assert prediction.device_milliseconds == pytest.approx(3.0)
    assert prediction.mfu == pytest.approx(1 / 3)
    tiny = predict_time([Kernel("add", 1.0, 1.0)] * 1000, "eager", H200, 1.0)
    assert tiny.milliseconds == tiny.host_milliseconds > tiny.device_milliseconds


@pytest.mark.slow
def test_a_step_has_the_operations_of_the_model_and_fewer_kernels_when_compiled() -> None:
    crop = (32, 64, 64)
    eager, fused = (list_kernels(SMALL, crop, 2, mode) for mode in ("eager", "compiled"))
    model = 3 * estimate_costs(SMALL, crop, 2).total.forward
    for kernels in (eager, fused):
        products = sum(k.operations for k in kernels if k.name in ("mm", "addmm", "bmm") or "conv" in k.name)
        assert products == pytest.approx(model, rel=0.1)
    assert len(fused) < len(eager)
    assert sum(k.bytes for k in fused) < sum(k.bytes for k in eager)


def test_a_step_is_measured_where_it_runs() -> None:
    assert measure_step(SMALL, (16, 32, 32), 1, "cpu", is_compiled=False, repeats=1) > 0
