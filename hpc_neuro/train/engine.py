"""DeepSpeed, behind one config section and one class. The only importer of deepspeed."""

from __future__ import annotations

import atexit
import datetime as dt
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from hpc_neuro import distributed
from hpc_neuro.schema import ConfigError, config
from hpc_neuro.train.schedule import Group, OptimConfig
from hpc_neuro.train.shard_files import file_of, read_ranges, write_ranges
from hpc_neuro.train.shards import Shards

log = logging.getLogger(__name__)
_BUCKET = 1 << 26  # elements reduced or gathered at once, at most
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@config
class EngineConfig:
    """How the work is spread and in which precision it runs."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO: 0 nothing sharded over ranks, 1 optimizer state, 2 and gradients, 3 and parameters."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of activations and weights in use; master weights are float32. auto: bf16 on a GPU that has it, else fp32."""
    micro_batch: int | None = Field(default=None, ge=1)
    """Crops per rank and pass, at most; none: optim.batch / ranks. Passes are accumulated to optim.batch crops, on any
    number of ranks."""
    offload_optimizer: bool = False
    """Keep optimizer state and its step in host memory; needs a GPU and stage 1 to 3."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where parameters wait between passes at stage 3: in GPU memory, in host memory, or as files in `nvme`."""
    nvme: Path | None = None
    """Folder on a local fast disk for offload_parameters=nvme; needs a GPU, libaio and a C++ compiler at the start."""
    timeout: float = Field(default=600.0, gt=0)
    """[s] A collective operation that takes this long ends the run: a rank lives but does not come."""
    silence: float = Field(default=30.0, ge=1)
    """[s] A rank whose process gives no sign of life for this long is lost: the others name it and have ended 1.6 times
    as long after its last sign."""


def check(cfg: EngineConfig, batch: int, world: int) -> tuple[torch.dtype, int, int]:
    """(dtype, crops per rank and pass, passes per step) here. Raises ConfigError with every reason at once."""
    cuda = torch.cuda.is_available()
    auto = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    name = auto if cfg.dtype == "auto" else cfg.dtype
    faults = []
    if name == "fp16" and not cuda:
        faults.append("engine.dtype: fp16 needs a GPU; take fp32 (or auto) on a CPU")
    if cfg.offload_optimizer and not cuda:
        faults.append("engine.offload_optimizer: there is no GPU whose memory it could spare; take false")
    if cfg.offload_optimizer and cfg.stage == 0:
        faults.append("engine.offload_optimizer: stage 0 keeps the whole optimizer on each rank; take stage 1, 2 or 3")
    if cfg.offload_parameters != "none":
        where = f"engine.offload_parameters={cfg.offload_parameters}"
        if cfg.stage != 3:
            faults.append(f"{where}: parameters are whole on each rank at stage {cfg.stage}; take engine.stage=3")
        if not cuda:
            faults.append(f"{where}: there is no GPU whose memory it could spare; take none")
    if (cfg.offload_parameters == "nvme") != (cfg.nvme is not None):
        faults.append("engine.nvme: the folder and offload_parameters=nvme go together; give both or neither")
    elif cfg.nvme is not None and not cfg.nvme.is_dir():
        faults.append(f"engine.nvme: {cfg.nvme} is no folder on this node; make it, or give another")
    elif cfg.nvme is not None and not _asynchronous_files():
        faults.append("engine.nvme: DeepSpeed cannot build async_io here; install libaio-dev and a C++ compiler")
    if world > batch:
        faults.append(f"optim.batch: {batch} crops leave some of the {world} ranks without any; start {batch} at most")
    if faults:
        raise ConfigError("the engine cannot run as configured:\n  " + "\n  ".join(faults))
    each = -(-batch // world)
    micro = min(cfg.micro_batch or each, each)
    return _DTYPES[name], micro, -(-batch // (micro * world))


def join_group(cfg: EngineConfig) -> None:
    """Join the torch process group of the launcher (torchrun, srun), or make a group of one when there is none.

    It lives as long as the process: DeepSpeed keeps groups made from it for the next engine.
    """
    if dist.is_initialized():
        return
    # gloo beside nccl: agreements about stopping and saving go over the host and do not wait for the GPU
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = dt.timedelta(seconds=cfg.timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]  # in memory: no port, hence none that is taken
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    atexit.register(_leave_group)


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def bucket(parameters: int) -> int:
    """Elements that are reduced or gathered at once."""
    return min(-(-parameters // 1024) * 1024, _BUCKET)  # DeepSpeed wants them aligned


def deepspeed_json(
    cfg: EngineConfig, optim: OptimConfig, dtype: torch.dtype, micro: int, passes: int, parameters: int
) -> dict[str, Any]:
    """What DeepSpeed is told. `parameters`: how many are trained."""
    # DeepSpeed allocates whole buckets, by default of 2 GB, whatever the size of the model
    size = bucket(parameters)
    zero: dict[str, Any] = {"stage": cfg.stage, "reduce_bucket_size": size, "allgather_bucket_size": size}
    if cfg.stage == 3:
        # By default tensors of up to 100,000 elements stay whole on each rank, and all is kept gathered that is used
        # again within 1,000 million: small models would not be sharded at all.
        live = max(parameters // 4, 1 << 20)
        zero["stage3_param_persistence_threshold"] = min(max(parameters // 10_000, 1024), 100_000)
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live
        zero["stage3_prefetch_bucket_size"] = live // 4
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.offload_parameters != "none":
        zero["offload_param"] = {"device": cfg.offload_parameters, "pin_memory": True}
        if cfg.nvme is not None:
            zero["offload_param"]["nvme_path"] = str(cfg.nvme)
    adam = {"lr": optim.lr, "betas": list(optim.betas), "eps": 1e-8, "weight_decay": optim.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": optim.clip,
        # torch's own; the fused ones would be compiled when training starts
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does for offloaded state, too
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "wall_clock_breakdown": False,
    }


class Engine:
    """A module under DeepSpeed: backward, step, save, load, and the whole weights."""

    def __init__(
        self, module: nn.Module, groups: Sequence[Group], settings: dict[str, Any], dtype: torch.dtype
    ) -> None:
        deepspeed = _quiet_deepspeed()
        self.dtype, self.stage = dtype, int(settings["zero_optimization"]["stage"])
        self._groups = list(groups)
        wanted = [{"params": g.parameters, "weight_decay": g.weight_decay} for g in groups]
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        names = {id(p): name for name, p in named}
        self.shapes = {name: tuple(p.shape) for name, p in named}
        # DeepSpeed rounds weights to half precision before it copies them: the master weights would start rounded
        exact = {n: p.detach().float().clone() for n, p in named} if dtype != torch.float32 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, model_parameters=wanted, config=settings, dist_init_required=False
            )
        self.module: nn.Module = self._engine.module
        self.device = torch.device(self._engine.device)
        self.shards = Shards(self.optimizer, self.stage, names, distributed.rank())
        if exact:
            self.shards.fill(exact)

    def __call__(self, *inputs: Any) -> Any:
        """Forward through the module."""
        return self._engine(*inputs)

    def set_lr(self, lr: float) -> None:
        """Learning rate of the coming step; every group has its own scale."""
        for held, group in zip(self.optimizer.param_groups, self._groups, strict=True):
            held["lr"] = lr * group.lr_scale

    def backward(self, loss: Tensor) -> None:
        """Gradients of one pass; DeepSpeed divides by the passes per step and averages over ranks."""
        self._engine.backward(loss)

    def step(self) -> Tensor | float:
        """End one pass; after the last of a step, update the weights. Returns the gradient's norm before clipping."""
        plain = self.stage == 0 and self.dtype == torch.float32  # the one case in which DeepSpeed keeps no norm
        norm: Tensor | float = float("nan")
        if plain and self._engine.is_gradient_accumulation_boundary():
            norm = nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])
        self._engine.step()
        held = None if plain else self._engine.get_global_grad_norm()
        return norm if held is None else held

    def saving(
        self, also: Mapping[str, Mapping[int, Tensor]], copied: bool
    ) -> tuple[Callable[[Path], None], dict[str, Any]]:
        """(write, what `load` needs besides) of this rank's master weights, Adam's moments and `also` (Shards.ranges).

        `write(folder)` raises OSError. copied: it writes the numbers of now, from a copy in host memory; else those of
        when it is called.
        """
        ranges = self.shards.ranges(also) if self.shards.owns else []
        if copied:
            ranges = [replace(r, values=r.values.detach().to("cpu", copy=True)) for r in ranges]
        rank = distributed.rank()

        def write(folder: Path) -> None:
            if ranges:
                write_ranges(file_of(folder, rank), ranges)

        return write, {"updates": self.shards.step(), "scaler": self.shards.scaler()}

    def load(self, folder: Path, state: Mapping[str, Any], also: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Take over what any number of ranks saved at any stage. Raises InputError when something is missing."""
        read_ranges(folder, self.shards.ranges(also), first=distributed.rank())
        self.shards.set_step(int(state["updates"]))
        self.shards.set_scaler(state["scaler"])
        self.shards.refresh()

    def whole(self, prefix: str, instead: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Whole float32 master weights whose names begin with `prefix`, on the CPU of rank 0; {} on the others.

        instead: index of a shard -> values to take in place of its weight. All ranks call this.
        """
        alone = self.stage == 0 or distributed.world_size() == 1
        held: dict[str, list[tuple[int, Tensor]]] = {}
        for index, shard in enumerate(self.shards.items):
            values = shard.weight if instead is None else instead.get(index, shard.weight)
            held.setdefault(shard.name, []).append((shard.start, values))
        found = {}
        for name, shape in self.shapes.items():
            if not name.startswith(prefix) or (alone and not distributed.is_main()):
                continue
            buffer = torch.zeros(math.prod(shape), device=self.device)
            for start, values in held.get(name, ()):
                buffer[start : start + values.numel()] = values
            if not alone:
                dist.reduce(buffer, 0)
            if distributed.is_main():
                found[name.removeprefix(prefix)] = buffer.cpu().reshape(shape)
        return found

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def _asynchronous_files() -> bool:
    """Whether DeepSpeed's reader and writer for NVMe can be had."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False))


def _quiet_deepspeed() -> Any:
    """DeepSpeed, imported once it is needed, without its chatter and without anything compiled at run time."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # its ZeRO-3 calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # Every CPU start would compile this for a minute; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
