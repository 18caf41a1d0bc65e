"""Compare the Triton kernels with plain PyTorch, on the CPU by Triton's interpreter. Run with TRITON_INTERPRET=1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpc_neuro.models.tubular import Backend, gather, triton_impl, tube_conv, tube_sum

# axis, taps, channels, output channels, coarse grid, wide indices
CASES = [
    (0, 3, 5, 7, False, False),
    (1, 4, 1, 1, False, False),
    (2, 5, 18, 20, False, True),
    (1, 1, 3, 2, False, False),
    (0, 3, 66, 65, True, False),
]


def results(backend: Backend, device: str, case: tuple[int, int, int, int, bool, bool]) -> Iterator[tuple[str, Tensor]]:
    """Every value and gradient of the three operations for one case, by name."""
    axis, taps, channels, width, coarse, _ = case
    g = torch.Generator().manual_seed(taps)
    size = (5, 3, 7) if taps == 4 else (3, 2, 7)  # more than one block of tubes, and less than one
    grid = (2, 1, 3) if coarse else size

    def draw_leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(device).requires_grad_()

    x, offsets = draw_leaf(2, channels, *size), draw_leaf(2, 2 * (taps - 1), *grid)
    weight = draw_leaf(width, channels, taps, scale=(channels * taps) ** -0.5)
    bias, window = draw_leaf(width), draw_leaf(taps)
    positions = torch.randint(0, 2, (3, *grid), generator=g).to(device) if coarse else None
    for name, out, mix in (
        ("conv", tube_conv(x, offsets, weight, bias, axis, positions, backend=backend), [weight, bias]),
        ("sum", tube_sum(x, offsets, window, axis, positions, backend=backend), [window]),
        ("taps", gather(x, offsets, axis, positions, backend=backend), []),
    ):
        yield name, out
        up = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        wanted = [x, offsets, *mix]
        for i, grad in enumerate(torch.autograd.grad(out, wanted, up)):
            yield f"{name} gradient {i}", grad


def compare(device: str) -> None:
    """AssertionError where the two implementations differ by more than 1e-5 of the largest value."""
    plain = triton_impl._plan

    def plan_wide(*args: object) -> object:
        plan = plain(*args)  # type: ignore[arg-type]
        plan.tiles["WIDE"] = True
        return plan

    for case in CASES:
        triton_impl._plan = plan_wide if case[-1] else plain  # type: ignore[assignment]
        for (name, a), (_, b) in zip(results("triton", device, case), results("torch", device, case), strict=True):
            scale = max(1.0, float(b.detach().abs().max()) if b.numel() else 1.0)
            torch.testing.assert_close(
                a / scale, b / scale, rtol=0, atol=1e-5, msg=lambda m, n=name, c=case: f"{c} {n}: {m}"
            )
    triton_impl._plan = plain


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare("cpu")
    print("equal")
