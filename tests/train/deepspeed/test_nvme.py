"""Parameters in files: the same training, weights that other runs take over, and one sentence where it cannot be."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch.utils import cpp_extension

from hpc_neuro.core.schema import ConfigError
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.train.checkpoint import saver
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import engine, nvme
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import group_parameters
from hpc_neuro.train.train_module import TrainModule

STUDENT = StudentConfig(size="small", depth=1, channels=(4, 4, 8))  # whose matrices have more than 1 MiB


def is_compiled() -> bool:
    """Whether the operator lies there as this environment's DeepSpeed has it; any other is compiled anew."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    sources = str(Path(deepspeed.__file__).parent)
    return any(
        (how := built.with_name("build.ninja")).exists()
        and sources in how.read_text(encoding="utf-8")
        and built.stat().st_mtime >= how.stat().st_mtime
        for built in (*root.glob("async_io/*.so"), *root.glob("*/async_io/*.so"))
    )


def module() -> TrainModule:
    torch.manual_seed(0)
    return TrainModule(build_student(STUDENT), None, sharded=True)


def make_engine(cfg: EngineConfig) -> engine.Engine:
    engine.join_group(EngineConfig())
    named = dict(module().named_parameters())
    settings = build_deepspeed_settings(
        cfg, OptimConfig(batch=1), torch.float32, 1, 1, [p.numel() for p in named.values()]
    )
    wanted = group_parameters(named.items(), OptimConfig().weight_decay, {})
    return engine.Engine(module, {}, wanted, settings, torch.float32)


def crop() -> dict[str, Any]:
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    none, flag = torch.zeros_like(image, dtype=torch.uint8), torch.zeros(1, dtype=torch.bool)
    return {"image": image, "mask": none, "skeleton": none, "features": {}, "distilled": flag, "index": flag.long()}


def losses(network: engine.Engine, count: int) -> list[float]:
    values = []
    for _ in range(count):
        loss = (network(crop())[0] - 1).square().mean()
        network.backward(loss)
        network.step()
        values.append(loss.item())
    return values


def test_parameters_in_files_train_to_the_same_bits(tmp_path):
    """Also after a forward without a backward, which reads parameters ahead, and after new weights are loaded."""
    lacks = engine.find_missing_for_nvme()
    if lacks is not None:
        pytest.skip(f"DeepSpeed's async_io needs {lacks}")
    if not is_compiled():
        pytest.skip("DeepSpeed's async_io is not compiled here, which takes minutes; one run with engine.nvme does it")
    disk = nvme.folder_of_run(tmp_path, tmp_path / "run")
    plain = make_engine(EngineConfig(stage=3))
    filed = make_engine(EngineConfig(stage=3, offload_parameters="nvme", nvme=disk))
    try:
        sizes = [p.stat().st_size for p in disk.rglob("*.swp")]
        assert len(sizes) > 3
        assert min(sizes) >= 2**20
        assert losses(plain, 3) == losses(filed, 3)
        snapshot = saver.take_snapshot(plain.state, None, copy=True)
        snapshot.write(tmp_path)
        assert losses(plain, 1) == losses(filed, 1)
        for network in (plain, filed):
            with torch.no_grad():
                network(crop())
            saver.restore_snapshot(tmp_path, network.state, snapshot.engine, None)
        assert losses(plain, 2) == losses(filed, 2)
        in_memory, others = plain.gather_weights(""), filed.gather_weights("")
        assert all(torch.equal(in_memory[name], others[name]) for name in in_memory)
    finally:
        plain.close()
        filed.close()
    assert not disk.exists()


def test_runs_that_share_a_disk_have_folders_of_their_own(tmp_path):
    assert nvme.folder_of_run(tmp_path, Path("a")) == nvme.folder_of_run(tmp_path, Path("a").resolve())
    assert nvme.folder_of_run(tmp_path, Path("a")) != nvme.folder_of_run(tmp_path, Path("b"))


def test_buffers_hold_the_largest_part_and_what_is_live():
    sizes = [1 << 18] * 10 + [1 << 20, 1000]
    assert nvme.plan_buffers(sizes, 4, 1 << 18) == {"max_in_cpu": 0, "buffer_size": 1 << 20, "buffer_count": 9}
    assert nvme.plan_buffers(sizes, 4, 1 << 30)["buffer_count"] == 19
    assert nvme.plan_buffers([1000], 4, 1 << 30)["buffer_count"] == 8


def test_a_disk_or_a_limit_that_is_too_small_is_said(tmp_path, monkeypatch):
    buffers = nvme.plan_buffers([1 << 18, 10], 4, 1 << 18)
    path = tmp_path / "run"
    assert nvme.require_room(path, [1 << 18, 10], 4, buffers).startswith("1 of 2 parameters wait in")
    with pytest.raises(ConfigError, match=r"parameters take .* of this node's disk"):
        nvme.require_room(path, [1 << 60], 4, buffers)
    monkeypatch.setattr(nvme, "_can_lock", lambda size: size < 1 << 21)
    with pytest.raises(ConfigError, match=r"DeepSpeed's buffers are 10\.5 MB .*ulimit -l"):
        nvme.require_room(path, [1 << 18], 4, buffers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: patch.setenv("CXX", "no-such-compiler"), "apt install g"),
        (lambda patch: patch.setattr(cpp_extension, "is_ninja_available", lambda: False), "pip install ninja"),
        (lambda patch: None, "apt install libaio-dev"),
    ],
)
def test_what_the_operator_lacks_is_said_with_its_remedy(monkeypatch, change, message):
    monkeypatch.setenv("CXX", "python3")
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: True)
    change(monkeypatch)
    assert message in str(nvme.find_missing_tool(lambda: False))


def _compile_and_die(root: Path) -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)

    def load() -> None:
        (root / "async_io").mkdir()
        (root / "async_io" / "lock").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    nvme.compile_once(load)


def test_a_compiler_that_was_killed_blocks_nobody(tmp_path, monkeypatch):
    dying = multiprocessing.get_context("fork").Process(target=_compile_and_die, args=(tmp_path,))
    dying.start()
    dying.join()
    assert dying.exitcode == -signal.SIGKILL
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    left = tmp_path / "async_io" / "lock"
    assert left.exists()
    seen = []
    nvme.compile_once(lambda: seen.append(left.exists()))
    assert seen == [False]
