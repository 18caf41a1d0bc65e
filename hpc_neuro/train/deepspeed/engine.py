"""DeepSpeed behind one config section and one class."""

from __future__ import annotations

import atexit
import datetime as dt
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.train.config import EngineConfig
from hpc_neuro.train.deepspeed import internals, nvme
from hpc_neuro.train.optim import ParameterGroup

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# --- Before a run: checks, and the process group ---


@dataclass(frozen=True)
class Workload:
    """How the crops of a step are spread over ranks and passes, and the precision."""

    dtype: torch.dtype
    micro: int
    """[crop] Crops per rank and pass."""
    passes: int
    """Passes per step."""


def check_engine(cfg: EngineConfig, batch: int, world: int) -> Workload:
    """The workload of `world` ranks on this machine. Raises ConfigError with every fault at once."""
    name = cfg.dtype
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() and has_native_bf16() else "fp32"

    # All faults are reported together, so that one correction is enough.
    faults = [*_check_bf16(name), *_check_fp16(cfg, name), *_check_offload(cfg), *_check_nvme(cfg)]
    if world > batch:
        faults.append(
            f"optim.batch: {batch} crops leave some of the {world} ranks without any; start at most {batch} ranks"
        )
    if faults:
        raise ConfigError("the engine cannot run as configured:\n  " + "\n  ".join(faults))

    # A pass needs no more crops than a rank has in a step.
    crops_per_rank = -(-batch // world)
    micro = min(cfg.micro_batch or crops_per_rank, crops_per_rank)
    return Workload(_DTYPES[name], micro, passes=-(-batch // (micro * world)))


def has_native_bf16() -> bool:
    """Whether this rank's GPU computes in bf16 (compute capability 8.0 and later); older ones emulate it slowly."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _check_bf16(name: str) -> list[str]:
    if name != "bf16" or not torch.cuda.is_available() or has_native_bf16():
        return []
    device = torch.cuda.get_device_name()
    return [f"engine.dtype: {device} emulates bf16, slower than fp32; set fp32, or fp16 at stages 1 to 3"]


def _check_fp16(cfg: EngineConfig, name: str) -> list[str]:
    if name != "fp16":
        return []

    faults = []
    if not internals.can_train_fp16():
        faults.append("engine.dtype: fp16 needs a GPU, or a CPU that computes in it; set fp32 (or auto) here")
    if cfg.stage == 0:
        faults.append(
            "engine.dtype: at stage 0 DeepSpeed divides gradients of fp16 by a loss scale that it has not applied; "
            "set engine.stage=1 (on one rank the same), or bf16"
        )
    return faults


def _check_offload(cfg: EngineConfig) -> list[str]:
    faults = []
    has_gpu = torch.cuda.is_available()

    if cfg.offload_optimizer and not has_gpu:
        faults.append("engine.offload_optimizer: there is no GPU whose memory it could spare; set it to false")
    if cfg.offload_optimizer and cfg.stage == 0:
        faults.append("engine.offload_optimizer: stage 0 keeps the whole optimizer on each rank; set stage 1, 2 or 3")

    if cfg.offload_parameters != "none":
        key = f"engine.offload_parameters={cfg.offload_parameters}"
        if cfg.stage != 3:
            faults.append(f"{key}: parameters are whole on each rank at stage {cfg.stage}; set engine.stage=3")
        if not has_gpu and cfg.offload_parameters == "cpu":
            faults.append(f"{key}: there is no GPU whose memory it could spare; set none, or nvme")
    return faults


def _check_nvme(cfg: EngineConfig) -> list[str]:
    if (cfg.offload_parameters == "nvme") != (cfg.nvme is not None):
        return ["engine.nvme: the folder and offload_parameters=nvme go together; give both or neither"]
    if cfg.nvme is None:
        return []
    if not cfg.nvme.is_dir():
        return [f"engine.nvme: {cfg.nvme} is no folder on this node; make it, or give another"]
    missing = find_missing_for_nvme()
    return [f"engine.nvme: DeepSpeed's operator for files (async_io) needs {missing}"] if missing else []


def find_missing_for_nvme() -> str | None:
    """What must be installed for DeepSpeed's file operator, with the command that does it; None if nothing."""
    if internals.has_prebuilt_async_io():
        return None
    return nvme.find_missing_tool(lambda: bool(internals.async_io_builder().is_compatible(verbose=False)))


def join_group(cfg: EngineConfig) -> None:
    """Join the torch process group of the launcher (torchrun, srun); make a group of one without a launcher.

    The group lives as long as the process: DeepSpeed keeps groups made from it for the next engine.
    """
    if dist.is_initialized():
        return

    # gloo beside nccl: agreements about stopping and saving use the host and do not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = dt.timedelta(seconds=cfg.timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=_choose_device())
    else:
        # A store in memory needs no port, which could be taken.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        # DeepSpeed reads it.
        os.environ.setdefault("LOCAL_RANK", "0")
    atexit.register(_leave_group)


def _choose_device() -> torch.device | None:
    """This rank's GPU, for NCCL and for DeepSpeed, which reads LOCAL_RANK; None on a CPU."""
    device = distributed.device()
    if device.type != "cuda":
        return None

    # A launcher may show each rank only its own GPU, whose number is then 0 on every rank.
    os.environ["LOCAL_RANK"] = str(device.index)
    return device


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# --- The engine ---


class Engine:
    """A module under DeepSpeed: forward, backward, step, and its whole weights."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        values: Mapping[str, Tensor],
        groups: Sequence[ParameterGroup],
        settings: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """make: builds the module in float32 on the CPU, alike on all ranks; values: parameters that replace its own.

        At stage 3 a layer's parameters are sharded as soon as it is made: no rank ever holds all of them.
        """
        deepspeed = internals.import_deepspeed()
        self.dtype = dtype
        self.stage = int(settings["zero_optimization"]["stage"])
        self._groups = list(groups)
        self._nvme_folder = nvme.folder_in(settings)

        if self._nvme_folder is not None:
            nvme.compile_once(lambda: internals.async_io_builder().load(verbose=False))

        # Parameters in files must have their precision before they are sharded, so each rank builds the module whole.
        exact: dict[str, tuple[int, Tensor]] = {}
        is_built_sharded = self.stage == 3 and self._nvme_folder is None
        if is_built_sharded:
            module, exact = internals.build_sharded_module(make, values, settings, dtype)
        else:
            module = build_module(make, values)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shapes = {name: internals.full_shape(p) for name, p in named.items()}

        # DeepSpeed rounds weights to half precision before it copies them, so the master weights would start rounded.
        if dtype != torch.float32 and not is_built_sharded:
            exact = {name: (0, p.detach().float().reshape(-1).clone()) for name, p in named.items()}

        # `initialize` itself would convert to bf16 wherever the device does not compute fp16.
        if self._nvme_folder is not None:
            deepspeed.zero.Init(module=module.to(dtype), config_dict_or_path=settings)

        optimizer_groups = [
            {"params": [named[name] for name in group.names], "weight_decay": group.weight_decay} for group in groups
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, model_parameters=optimizer_groups, config=settings, dist_init_required=False
            )
        self.module: nn.Module = self._engine.module
        self.device = torch.device(self._engine.device)

        # DeepSpeed keeps no names, so parameters are told apart by identity.
        names = {id(p): name for name, p in named.items()}
        self.state = internals.ShardedState(self.optimizer, self.stage, names, distributed.rank())
        internals.leave_buffers_free(module)
        if exact:
            self.state.fill_weights(exact)

    def __call__(self, *inputs: Any) -> Any:
        """Forward through the module."""
        return self._engine(*inputs)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step; every group has its own scale."""
        for optimizer_group, group in zip(self.optimizer.param_groups, self._groups, strict=True):
            optimizer_group["lr"] = lr * group.lr_scale

    def backward(self, loss: Tensor) -> None:
        """Gradients of one pass; DeepSpeed divides by the passes per step and averages over ranks."""
        self._engine.backward(loss)

    def step(self) -> Tensor | float:
        """End one pass; after the last of a step, update the weights. Returns the gradient's norm before clipping."""
        # The one case in which DeepSpeed keeps no norm.
        has_no_norm = self.stage == 0 and self.dtype == torch.float32
        norm: Tensor | float = float("nan")
        if has_no_norm and self._engine.is_gradient_accumulation_boundary():
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

        self._engine.step()

        # After an overflow DeepSpeed returns before it releases gathered parameters, and then loses their order.
        if self.stage == 3 and self.dtype == torch.float16 and self.optimizer.overflow:
            self.state.refresh_parameters()

        global_norm = None if has_no_norm else self._engine.get_global_grad_norm()
        return norm if global_norm is None else global_norm

    def gather_weights(self, prefix: str, instead: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Whole float32 master weights whose names begin with `prefix`, on the CPU of rank 0; {} on the others.

        instead: index of a shard -> values that replace its weight. All ranks call this together.
        """
        # At stage 0 every rank has all weights, and one rank needs no reduction.
        is_alone = self.stage == 0 or distributed.world_size() == 1
        if is_alone and not distributed.is_main():
            return {}

        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for index, shard in enumerate(self.state.shards):
            values = shard.weight if instead is None else instead.get(index, shard.weight)
            parts.setdefault(shard.name, []).append((shard.start, values))

        # One parameter at a time, so that the device needs no second copy of the model.
        weights = {}
        for name, shape in self.shapes.items():
            if not name.startswith(prefix):
                continue

            # Each element is on one rank, and zero on the others.
            buffer = torch.zeros(math.prod(shape), device=self.device)
            for start, values in parts.get(name, ()):
                buffer[start : start + values.numel()] = values
            if not is_alone:
                dist.reduce(buffer, 0)

            if distributed.is_main():
                weights[name.removeprefix(prefix)] = buffer.cpu().reshape(shape)
        return weights

    def close(self) -> None:
        """Release DeepSpeed's hooks, buffers and files."""
        self._engine.destroy()

        if self._nvme_folder is not None:
            nvme.remove_files(self._nvme_folder)


@torch.no_grad()
def build_module(make: Callable[[], nn.Module], values: Mapping[str, Tensor]) -> nn.Module:
    """A module in plain torch, with `values` in the parameters of these names."""
    module = make()
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
    return module
