"""The engine by itself, in one process: offload, fp16, and a student that is shared out while it is built.

DeepSpeed's CPU accelerator runs offload as well, host memory to host memory; fp16 it runs once it is told that it can.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.train.checkpoint import saver
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import engine, internals
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import group_parameters
from hpc_neuro.train.train_module import TrainModule
from tests.helpers import torchrun

STUDENT = StudentConfig(size="tiny", depth=1, channels=(4, 4, 8))
FP32 = torch.float32


@pytest.fixture
def half(monkeypatch):
    """A CPU that computes in fp16, as DeepSpeed sees it."""
    internals.import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setattr(get_accelerator(), "supported_dtypes", lambda: dtypes)


@pytest.fixture
def make():
    """make(dtype, stage=.., ...) -> Engine; what was made is closed in the end."""
    made = []

    def build(dtype, values=None, scale=None, **keys):
        engine.join_group(EngineConfig())
        cfg, optim = EngineConfig(**keys), OptimConfig(batch=2)
        module = module_of(cfg.stage)
        sizes = [p.numel() for p in module.parameters()]
        settings = build_deepspeed_settings(cfg, optim, dtype, 1, 2, sizes)
        if scale is not None:
            settings["fp16"] |= {"initial_scale_power": scale, "hysteresis": 1}
        wanted = group_parameters(module.named_parameters(), optim.weight_decay, {})
        made.append(engine.Engine(lambda: module_of(cfg.stage), values or {}, wanted, settings, dtype))
        made[-1].set_lr(1e-3)
        return made[-1]

    yield build
    for one in made:
        one.close()


def module_of(stage):
    torch.manual_seed(0)
    return TrainModule(build_student(STUDENT), None, sharded=stage == 3)


def steps(network, count):
    """(loss, gradient's norm) of so many steps of two passes."""
    image = torch.rand(1, 1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    none, flag = torch.zeros_like(image, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    batch = {"image": image, "mask": none, "skeleton": none, "features": {}, "distilled": flag, "index": flag.long()}
    rows = []
    for _ in range(count):
        for _ in range(2):
            loss = (network(batch)[0].float() - 1).square().mean()
            network.backward(loss)
            norm = network.step()
        rows.append((loss.item(), float(norm)))
    return rows


@pytest.mark.parametrize(
    "keys",
    [
        {"stage": 1, "offload_optimizer": True},
        {"stage": 2, "offload_optimizer": True},
        {"stage": 3, "offload_optimizer": True},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": "cpu"},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_offload_trains_alike_and_its_checkpoints_fit_others(make, keys, tmp_path):
    plain, spared = make(FP32, stage=2), make(FP32, **keys)
    for one, other in zip(steps(plain, 3), steps(spared, 3), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    snapshot = saver.take_snapshot(spared.state, None, copy=True)
    snapshot.write(tmp_path)
    saver.restore_snapshot(tmp_path, plain.state, snapshot.engine, None)
    restored, others = plain.gather_weights(""), spared.gather_weights("")
    assert all(torch.equal(restored[name], others[name]) for name in others)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_skips_a_step_that_overflows_and_goes_on(make, half, stage, tmp_path):
    """The scale of 2^20 is too large, and halved; each stage then trains, and what is saved holds the scale."""
    half_precision, plain = make(torch.float16, stage=stage, scale=20), make(FP32, stage=2)
    before = half_precision.gather_weights("")
    results = steps(half_precision, 12)
    skipped = sum(norm in (-1.0, float("inf")) or norm != norm for _, norm in results)
    assert 0 < skipped < 12
    assert half_precision.state.count_updates() == 12 - skipped
    state = half_precision.state.read_loss_scale()
    assert state["cur_scale"] == 2 ** (20 - skipped)
    reference = steps(plain, 12 - skipped)
    assert results[0][0] == results[skipped][0]  # nothing was learnt from what overflowed
    assert [loss for loss, _ in results[skipped:]] == pytest.approx([loss for loss, _ in reference], rel=1e-2)
    assert any(not torch.equal(half_precision.gather_weights("")[name], before[name]) for name in before)
    snapshot = saver.take_snapshot(half_precision.state, None, copy=False)
    snapshot.write(tmp_path)
    other = make(torch.float16, stage=stage)
    saver.restore_snapshot(tmp_path, other.state, snapshot.engine, None)
    assert other.state.read_loss_scale() == state
    assert steps(other, 2) == steps(half_precision, 2)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
def test_stage_3_starts_from_the_same_bits_as_stage_0(make, dtype):
    values = {"student.vit.blocks.0.attn.qkv.weight": torch.randn(576, 192), "student.vit.norm.bias": torch.ones(192)}
    first, last = (make(dtype, values, stage=stage).gather_weights("") for stage in (0, 3))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert all(torch.equal(last[name], value) for name, value in values.items())


def test_fp16_is_for_devices_that_compute_in_it(half):
    cfg = EngineConfig(dtype="fp16")
    assert engine.check_engine(cfg, batch=4, world=1).dtype == torch.float16
    with pytest.raises(ConfigError, match=r"stage 0 .* engine\.stage=1"):
        engine.check_engine(EngineConfig(dtype="fp16", stage=0), batch=4, world=1)


@pytest.mark.parametrize(("stage", "passes"), [(1, 4), (2, 4), (3, 4)])
def test_gradients_of_bf16_are_summed_in_float32_over_ranks_and_passes(tmp_path, stage, passes):
    done = torchrun.launch("gradient_sums.py", 2, tmp_path, stage, passes)
    assert done.returncode == 0, done.stderr
    expected = (1 + (2 * passes - 1) * 2**-9) / (2 * passes)
    for rank in (0, 1):
        norm = json.loads((tmp_path / f"norm{rank}.json").read_text())
        assert norm == pytest.approx(expected, rel=1e-4), (norm, expected)


def test_bf16_is_for_devices_that_compute_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert engine.check_engine(EngineConfig(), 2, 1).dtype == torch.float32
    with pytest.raises(ConfigError, match="Tesla V100 emulates bf16"):
        engine.check_engine(EngineConfig(dtype="bf16"), 2, 1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert engine.check_engine(EngineConfig(), 2, 1).dtype == torch.bfloat16


def test_a_rank_uses_the_gpu_that_it_sees(monkeypatch):
    """Rank 3 of a node, to which the launcher shows one GPU only."""
    joined = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(engine.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(engine.dist, "init_process_group", lambda backend, **keys: joined.update(keys, backend=backend))
    monkeypatch.setattr(engine.atexit, "register", lambda function: None)
    for name, value in {"LOCAL_RANK": "3", "WORLD_SIZE": "4", "RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    engine.join_group(EngineConfig())
    assert joined["device_id"] == torch.device("cuda", 0)
    assert joined["backend"] == "cpu:gloo,cuda:nccl"
    assert os.environ["LOCAL_RANK"] == "0"
