"""The Triton kernels: interpreted on the CPU, compiled for real GPUs without one, and run where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_neuro.core.schema import InputError
from hpc_neuro.models.tubular import gather

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
REPO = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_interpreted_kernels_equal_plain_torch() -> None:
    """In a process of its own, for the interpreter is chosen when Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    script = REPO / "tests" / "helpers" / "tubular_interpreted.py"
    run = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "equal"


def compile_kernel(kernel: Any, values: str, constants: dict[str, object]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    pointers = dict.fromkeys(("rows", "matrix", "grad", "out", "weight", "x", "bias"), f"*{values}")
    pointers |= dict.fromkeys(
        ("path", "steps", "slope", "window", "grad_rows", "grad_path", "grad_window", "grad_matrix"), "*fp32"
    )
    pointers |= {"grad_weight": "*fp32"}
    pointers |= {"centers": "*i32", "box": ("i32",) * 7, **dict.fromkeys(constants, "constexpr")}
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    return build(ASTSource(kernel, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))


@pytest.mark.slow
@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu(values: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter does not know what a GPU cannot do; the compiler does, and needs no GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    from hpc_neuro.models.tubular import triton_kernels as t

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile: dict[str, object] = {"WIDE": False, "BP": 64, "BC": 32}
    product = {**tile, "BO": 32, "PRECISION": "tf32x3"}
    gradient = {**product, "MODE": "conv", "ROWS": True, "PATH": True, "WEIGHT": False}
    for kernel, constants in (
        (t.sample_kernel, {**tile, "WINDOW": True}),
        (t.conv_kernel, product),
        (t.input_grad_kernel, gradient),
        (t.weight_grad_kernel, product),
    ):
        assert compile_kernel(kernel, values, constants).asm["cubin"]
    if values == "fp32":
        assert compile_kernel(t.path_kernel, values, {"BP": 256}).asm["cubin"]
        assert compile_kernel(t.step_grad_kernel, values, {"BP": 256}).asm["cubin"]
        assert compile_kernel(t.sample_kernel, values, {**tile, "WINDOW": False, "WIDE": True}).asm["cubin"]
        sums = {**gradient, "MODE": "window", "WEIGHT": True}
        assert compile_kernel(t.input_grad_kernel, values, sums).asm["cubin"]
        assert compile_kernel(t.input_grad_kernel, values, {**gradient, "MODE": "taps"}).asm["cubin"]


def test_float64_is_refused_by_name() -> None:
    x = torch.zeros(1, 1, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="use backend='torch'"):
        gather(x, torch.zeros(1, 4, 2, 2, 2, dtype=torch.float64), 0, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu_equal_plain_torch() -> None:
    from tests.helpers.tubular_interpreted import compare

    compare("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_gpu_is_near_float32(dtype: torch.dtype) -> None:
    from hpc_neuro.models.tubular import tube_conv

    x, offsets = torch.randn(2, 32, 17, 18, 19, device="cuda"), torch.rand(2, 16, 17, 18, 19, device="cuda")
    weight = torch.randn(32, 32, 9, device="cuda") / 17
    want = tube_conv(x, offsets, weight, None, 1)
    values = tube_conv(x.to(dtype), offsets, weight.to(dtype), None, 1)
    assert values.dtype == dtype
    torch.testing.assert_close(values.float(), want, atol=0.1, rtol=0.05)
