"""The tube operator where it is hard: thin and empty volumes, half precision, huge volumes, memory, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.tubular import gather, torch_impl, tube_conv, tube_sum
from hpc_neuro.models.tubular.torch_impl import Tubes
from tests.models.tubular.test_tubular import AXES, by_grid_sample, example


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 1), (1, 1, 3)])
@pytest.mark.parametrize("taps", [1, 3, 255])
def test_volumes_one_voxel_thin(shape: tuple[int, int, int], taps: int) -> None:
    x, offsets = (t.requires_grad_() for t in example(shape, taps))
    for axis in AXES:
        torch.testing.assert_close(gather(x, offsets, axis), by_grid_sample(x, offsets, axis))
        grads = torch.autograd.grad(gather(x, offsets, axis).sum(), [x, offsets])
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(("batch", "channels", "grid"), [(2, 3, (0, 2, 2)), (0, 3, (2, 2, 2)), (2, 0, (2, 2, 2))])
def test_empty_batches_channels_and_position_grids(batch: int, channels: int, grid: tuple[int, int, int]) -> None:
    x = torch.randn(batch, channels, 4, 4, 4, requires_grad=True)
    offsets = torch.zeros(batch, 4, *grid, requires_grad=True)
    weight = torch.randn(5, channels, 3, requires_grad=True)
    assert gather(x, offsets, 2).shape == (batch, channels, 3, *grid)
    assert tube_sum(x, offsets, torch.ones(3), 2).shape == (batch, channels, *grid)
    out = tube_conv(x, offsets, weight, None, 2)
    assert out.shape == (batch, 5, *grid)
    out.sum().backward()
    for tensor in (x, offsets, weight):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.any()


def test_a_volume_without_voxels_may_be_asked_for_nothing_only() -> None:
    x = torch.randn(1, 2, 0, 4, 4)
    assert gather(x, torch.zeros(1, 4, 0, 4, 4), 0).shape == (1, 2, 3, 0, 4, 4)
    with pytest.raises(InputError, match="a volume without voxels"):
        gather(x, torch.zeros(1, 4, 1, 1, 1), 0, torch.zeros(3, 1, 1, 1, dtype=torch.int64))


def test_bfloat16_values_are_sampled_at_float32_positions() -> None:
    """In bf16 a position beyond 256 would lie up to a voxel off."""
    ramp = torch.arange(1000.0).remainder(7).expand(1, 1, 2, 2, 1000).bfloat16()
    offsets = torch.full((1, 4, 2, 2, 1000), 0.3)
    want = gather(ramp.float(), offsets, 0)
    for given_ in (offsets, offsets.bfloat16()):
        values = gather(ramp, given_, 0)
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float(), want, atol=0.03, rtol=0)
    wave = (torch.arange(1000.0).remainder(8) - 4).abs().expand(1, 1, 1, 1, 1000).bfloat16()
    steps, middle = torch.full((1, 508, 1, 1, 1), 0.3), torch.tensor([0, 0, 500]).view(3, 1, 1, 1)  # 38.1 voxels in all
    torch.testing.assert_close(
        gather(wave, steps, 0, middle).float(), gather(wave.float(), steps, 0, middle), atol=0.03, rtol=0
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gather(ramp.float(), offsets, 0), want, rtol=0, atol=0)
        weight = torch.randn(2, 1, 3)
        exact = torch.einsum("ock,bckzyx->bozyx", weight.double(), want.double()).float()
        torch.testing.assert_close(tube_conv(ramp.float(), offsets, weight, None, 0), exact)


def test_gradients_come_in_the_dtype_of_their_tensors() -> None:
    x, offsets = example(dtype=torch.float32)
    x, weight = x.bfloat16().requires_grad_(), torch.randn(2, 3, 5).bfloat16().requires_grad_()
    offsets.requires_grad_()
    tube_conv(x, offsets, weight, None, 0).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert offsets.grad is not None
    assert (x.grad.dtype, weight.grad.dtype, offsets.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_more_voxels_than_float32_can_count() -> None:
    """Beyond 2^24 elements a float32 index names a wrong voxel."""
    n = 2**24 + 64
    x = torch.arange(n, dtype=torch.int32).remainder_(1009).float().view(1, 1, 1, 1, n)
    positions = torch.tensor([0, 0, n - 9]).view(3, 1, 1, 1)
    offsets = torch.zeros(1, 8, 1, 1, 1)
    offsets[0, 4:] = 0.25
    values = gather(x, offsets, 0, positions).flatten()
    at = n - 9 + torch.tensor([0.5, 0.25, 0, 0.25, 0.5], dtype=torch.float64)
    assert values.tolist() == pytest.approx((at % 1009).tolist())
    assert gather(x, torch.zeros(1, 4, 1, 1, 1), 2, positions).flatten().tolist() == [
        (n - 9 + i) % 1009 for i in (-1, 0, 1)
    ]


def test_rows_beyond_32_bits_are_named_by_64() -> None:
    size = (2048, 1024, 1024)  # 2^31 voxels
    center = torch.tensor([[2047], [1023], [5]])
    tubes = Tubes(size, 2, 3, center)
    index, share, _ = torch_impl._corners(torch.zeros(1, 4, 1), tubes, slice(1, 2), slice(0, 1))
    assert index.dtype == torch.int64
    assert index[0, :, 0].tolist() == [2**32 - 1024 + x for x in (4, 5, 6)]
    assert share[0, :, 0].tolist() == [1, 1, 1]
    small = Tubes((64, 64, 64), 2, 3, center % 64)
    assert torch_impl._corners(torch.zeros(1, 4, 1), small, slice(1, 2), slice(0, 1))[0].dtype == torch.int32


def test_a_coarser_grid_takes_the_middle_voxel_of_each_block() -> None:
    x, _ = example((4, 6, 8))
    offsets = x.new_zeros(2, 4, 2, 2, 2)
    torch.testing.assert_close(gather(x, offsets, 0)[:, :, 1], x[:, :, 1::2, 1::3, 2::4][:, :, :2, :2, :2])
    positions = torch.tensor([0, 5, 7]).view(3, 1, 1, 1).expand(3, 2, 2, 2)
    torch.testing.assert_close(
        gather(x, offsets, 0, positions)[:, :, 1], x[:, :, 0, 5, 7].view(2, 3, 1, 1, 1).expand(2, 3, 2, 2, 2)
    )


def test_results_do_not_depend_on_the_size_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offsets = (t.requires_grad_() for t in example(batch=3, taps=9))
    weight = torch.randn(4, 3, 9, dtype=torch.float64, requires_grad=True)
    window = torch.rand(9, dtype=torch.float64, requires_grad=True)

    def results() -> list[Tensor]:
        tensors = []
        for out, mix in ((tube_conv(x, offsets, weight, None, 1), weight), (tube_sum(x, offsets, window, 2), window)):
            tensors += [out, *torch.autograd.grad(out.square().sum(), [x, offsets, mix])]
        return tensors

    whole = results()
    for tubes in (16, 17, 210, 500):  # pieces of a volume, one volume, two volumes and a rest
        monkeypatch.setitem(torch_impl._CHUNK_BYTES, "cpu", tubes * 9 * 4 * 8)
        for a, b in zip(results(), whole, strict=True):
            torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made meanwhile has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_all_taps_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_impl._CHUNK_BYTES, "cpu", 1 << 13)
    x, offsets = (t.requires_grad_() for t in example((8, 8, 10), 5, batch=1, channels=8, dtype=torch.float32))
    weight = torch.randn(8, 8, 5, requires_grad=True)
    with Largest() as largest:
        tube_conv(x, offsets, weight, None, 0).sum().backward()
        tube_sum(x, offsets, torch.ones(5), 0).sum().backward()
    assert largest.elements <= max(x.numel(), offsets.numel())
    with Largest() as largest:
        gather(x, offsets, 0)
    assert largest.elements == 5 * x.numel()


def test_what_needs_no_gradient_gets_none() -> None:
    x, offsets = example()
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    for needed in range(3):
        tensors = [x, offsets, weight]
        tensors = [t.detach().requires_grad_(i == needed) for i, t in enumerate(tensors)]
        tube_conv(*tensors, None, 0).sum().backward()
        assert [t.grad is not None for t in tensors] == [i == needed for i in range(3)]
    assert not tube_conv(x, offsets, weight, None, 0).requires_grad


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, offsets = (t.requires_grad_() for t in example())
    (first,) = torch.autograd.grad(gather(x, offsets, 0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_nan_offset_is_seen_not_hidden() -> None:
    x, offsets = example()
    offsets[0, :, 2, 2, 2] = float("nan")
    values = gather(x, offsets, 0)
    assert values[0, :, 0, 2, 2, 2].isnan().all()
    assert values[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": 3}, "axis is 3; want 0, 1 or 2"),
        ({"x": torch.zeros(1, 2, 4, 4)}, r"want \[B, C, Z, Y, X\]"),
        ({"offsets": torch.zeros(2, 4, 4, 4, 4)}, "want"),
        ({"offsets": torch.zeros(1, 3, 4, 4, 4)}, "want"),
        ({"offsets": torch.zeros(1, 4, 3, 4, 4)}, "does not divide"),
        ({"offsets": torch.zeros(1, 4, 4, 4, 4, dtype=torch.int64)}, "want floating point"),
        ({"positions": torch.zeros(3, 4, 4, 4)}, "want integers"),
        ({"positions": torch.zeros(3, 4, 4, 3, dtype=torch.int64)}, "want integers"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good = {"x": torch.zeros(1, 2, 4, 4, 4), "offsets": torch.zeros(1, 4, 4, 4, 4), "axis": 0}
    with pytest.raises(InputError, match=message):
        gather(**{**good, **change})


def test_kernels_that_do_not_fit_are_named() -> None:
    x, offsets = example(taps=3)
    with pytest.raises(InputError, match=r"want \[O, C, K\]"):
        tube_conv(x, offsets, torch.zeros(2, 3, 5), None, 0)
    with pytest.raises(InputError, match="the window is"):
        tube_sum(x, offsets, torch.zeros(5), 0)
