"""DeepSpeed, behind one config section and one class. The only importer of deepspeed."""

from __future__ import annotations

import atexit
import datetime as dt
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpc_neuro.core import distributed
from hpc_neuro.core.schema import ConfigError
from hpc_neuro.train.checkpoint.tensor_files import rank_file, read_ranges, write_ranges
from hpc_neuro.train.config import EngineConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.deepspeed.shards import Shards
from hpc_neuro.train.optim import ParameterGroup

log = logging.getLogger(__name__)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check(cfg: EngineConfig, batch: int, world: int) -> tuple[torch.dtype, int, int]:
    """(dtype, crops per rank and pass, passes per step) here. Raises ConfigError with every reason at once."""
    cuda = torch.cuda.is_available()
    auto = "bf16" if cuda and torch.cuda.is_bf16_supported() else "fp32"
    name = auto if cfg.dtype == "auto" else cfg.dtype
    faults = []
    if name == "fp16" and not _computes_fp16():
        faults.append("engine.dtype: fp16 needs a GPU, or a CPU that computes in it; take fp32 (or auto) here")
    if name == "fp16" and cfg.stage == 0:
        faults.append(
            "engine.dtype: at stage 0 DeepSpeed divides gradients of fp16 by a loss scale that it has not applied; "
            "take engine.stage=1 (on one rank the same), or bf16"
        )
    if cfg.offload_optimizer and not cuda:
        faults.append("engine.offload_optimizer: there is no GPU whose memory it could spare; take false")
    if cfg.offload_optimizer and cfg.stage == 0:
        faults.append("engine.offload_optimizer: stage 0 keeps the whole optimizer on each rank; take stage 1, 2 or 3")
    if cfg.offload_parameters != "none":
        where = f"engine.offload_parameters={cfg.offload_parameters}"
        if cfg.stage != 3:
            faults.append(f"{where}: parameters are whole on each rank at stage {cfg.stage}; take engine.stage=3")
        if not cuda and cfg.offload_parameters == "cpu":
            faults.append(f"{where}: there is no GPU whose memory it could spare; take none, or nvme")
    if (cfg.offload_parameters == "nvme") != (cfg.nvme is not None):
        faults.append("engine.nvme: the folder and offload_parameters=nvme go together; give both or neither")
    elif cfg.nvme is not None and not cfg.nvme.is_dir():
        faults.append(f"engine.nvme: {cfg.nvme} is no folder on this node; make it, or give another")
    elif cfg.nvme is not None and (missing := find_missing_for_nvme()):
        faults.append(f"engine.nvme: DeepSpeed's operator for files (async_io) needs {missing}")
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


class Engine:
    """A module under DeepSpeed: backward, step, save, load, and the whole weights."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        values: Mapping[str, Tensor],
        groups: Sequence[ParameterGroup],
        settings: dict[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """make: builds the module in float32 on the CPU, alike on all ranks; values: what parameters hold instead.

        At stage 3 a layer's parameters are shared out as soon as it is made: no rank ever holds the whole of them.
        """
        deepspeed = _quiet_deepspeed()
        self.dtype, self.stage = dtype, int(settings["zero_optimization"]["stage"])
        self._groups, self._files = list(groups), nvme.path_of(settings)
        if self._files is not None:
            nvme.built_once(lambda: _async_io().load(verbose=False))
        # what goes to files has its precision before it is shared out, from a module that each rank builds whole
        early = self.stage == 3 and self._files is None
        module, exact = _built_sharded(make, values, settings, dtype) if early else (build_module(make, values), {})
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
        # DeepSpeed rounds weights to half precision before it copies them: the master weights would start rounded
        if dtype != torch.float32 and not early:
            exact = {n: (0, p.detach().float().reshape(-1).clone()) for n, p in named.items()}
        if self._files is not None:  # `initialize` would take bf16 wherever the device computes no fp16 (0.19)
            deepspeed.zero.Init(module=module.to(dtype), config_dict_or_path=settings)
        wanted = [{"params": [named[n] for n in g.names], "weight_decay": g.weight_decay} for g in groups]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module, model_parameters=wanted, config=settings, dist_init_required=False
            )
        self.module: nn.Module = self._engine.module
        self.device = torch.device(self._engine.device)
        self.shards = Shards(self.optimizer, self.stage, {id(p): n for n, p in named.items()}, distributed.rank())
        nvme.keep_free(module)
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
        if self.stage == 3 and self.dtype == torch.float16 and self.optimizer.overflow:
            self.shards.refresh()  # DeepSpeed returns before it lets go of what is gathered, and then loses its order
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
                write_ranges(rank_file(folder, rank), ranges)

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
        """Let go of DeepSpeed's hooks, buffers and files."""
        self._engine.destroy()
        if self._files is not None:
            nvme.clear(self._files)


@torch.no_grad()
def build_module(make: Callable[[], nn.Module], values: Mapping[str, Tensor]) -> nn.Module:
    """A module in plain torch, with `values` in the parameters of these names."""
    module = make()
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
    return module


@torch.no_grad()
def _built_sharded(
    make: Callable[[], nn.Module], values: Mapping[str, Tensor], settings: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, tuple[int, Tensor]]]:
    """Build the module of `build_module` sharded, bit for bit; also return this rank's parts before rounding.

    DeepSpeed takes a layer's parameters away when its constructor returns. Without its overrides constructors work on
    the CPU in float32, as they do for the other stages.
    """
    deepspeed = _quiet_deepspeed()
    exact: dict[str, tuple[int, Tensor]] = {}
    with deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=set()):
        module = make()
    parameter: Any  # with what DeepSpeed adds to it
    for name, parameter in module.named_parameters():
        if name in values:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values[name])
        part = parameter.ds_tensor
        if dtype != torch.float32:
            exact[name] = (distributed.rank() * part.numel(), part.detach().clone())
            rounded = part.to(dtype)
            part.data = rounded.pin_memory() if part.is_pinned() else rounded
            parameter.data = parameter.to(dtype)
    return module, exact


def _computes_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 here."""
    _quiet_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def find_missing_for_nvme() -> str | None:
    """What is to be installed before DeepSpeed's reader and writer for NVMe can be had, and how; None: nothing."""
    _quiet_deepspeed()
    from deepspeed.git_version_info import installed_ops

    return None if installed_ops.get("async_io") else nvme.lacks(lambda: bool(_async_io().is_compatible(verbose=False)))


def _async_io() -> Any:
    """DeepSpeed's builder of its reader and writer for NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


def _quiet_deepspeed() -> Any:
    """DeepSpeed, imported once it is needed, without its chatter and without anything compiled at run time."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    # To ask whether AdamW can be sharded it imports another optimizer, whose decorators load torch's compiler (1 s).
    compiling, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiling
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # its ZeRO-3 calls collectives by names that torch is about to rename
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if not torch.cuda.is_available():
        # Every CPU start would compile this for a minute; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
