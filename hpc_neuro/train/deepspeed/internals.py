"""Everything that relies on the inside of DeepSpeed (tested with 0.19; pyproject.toml has the upper bound).

DeepSpeed has no public way to name the parameter that a piece of a flat tensor belongs to, to change master weights in
place, or to import it without compiling operators. Every attribute of it that is not documented is used in this file
only, with the reason beside it. A new version of DeepSpeed is checked here.

Where a rank keeps its share of the master weights and of Adam's moments:

    parameter, flattened   0 ......................... n
    stage 0                [ every rank: all of it     ]
    stage 1, 2             [ rank 0   | rank 1         ]   a group's parameters in one flat tensor, cut anywhere
    stage 3                [ rank 0    | rank 1    |pad]   every parameter cut into equal parts

DeepSpeed's own checkpoints mirror this layout, and its conversion tools do not cross it between all stages. Ranges of
named parameters do, so checkpoints are written as such ranges (train/checkpoint).
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_neuro.core import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running mean and variance, as torch's optimizer state names them."""

_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""State of the dynamic loss scale; the counters differ between DeepSpeed's two scalers."""

_FREE_BUFFERS = 4
"""Buffers of `engine.nvme` that read-ahead leaves free: as many parameters as one layer may need at once."""


# --- Import ---


def import_deepspeed() -> Any:
    """Import DeepSpeed when it is needed, without its log lines and without compiling anything at run time."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

    # DeepSpeed reads these variables when it is imported.
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import compiler

    # To learn whether AdamW can be sharded DeepSpeed imports the Muon optimizer, whose decorators load torch's
    # compiler (1 s). With a decorator that does nothing the import is immediate.
    compile_function, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_function

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # ZeRO-3 calls collectives by names that torch is about to rename.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)

    if not has_gpu:
        # Every start on a CPU would compile this operator for a minute; only inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def can_train_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 on this machine."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def has_prebuilt_async_io() -> bool:
    """Whether DeepSpeed was installed with its file operator compiled."""
    import_deepspeed()
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("async_io"))


def async_io_builder() -> Any:
    """DeepSpeed's builder of the operator that reads and writes parameter files."""
    import_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder()


# --- Construction at stage 3 ---


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape of a parameter; at stage 3 the parameter itself is empty, and `ds_shape` keeps the shape."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def build_sharded_module(
    make: Callable[[], nn.Module], values: Mapping[str, Tensor], settings: dict[str, Any], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, tuple[int, Tensor]]]:
    """Build a module sharded for stage 3, equal to `engine.build_module` bit for bit; no rank ever holds it whole.

    Returns the module and, for half precision, the float32 parts of this rank before rounding: name -> (first element,
    values).
    """
    deepspeed = import_deepspeed()
    exact: dict[str, tuple[int, Tensor]] = {}

    # DeepSpeed takes a layer's parameters away when its constructor returns. Without its tensor overrides constructors
    # work on the CPU in float32, as they do for the other stages.
    with deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=set()):
        module = make()

    parameter: Any
    for name, parameter in module.named_parameters():
        if name in values:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(values[name])

        # `ds_tensor` is this rank's part. It is rounded here, after it was copied exactly: DeepSpeed would round it
        # before it makes master weights of it.
        part = parameter.ds_tensor
        if dtype != torch.float32:
            exact[name] = (distributed.rank() * part.numel(), part.detach().clone())
            rounded = part.to(dtype)
            part.data = rounded.pin_memory() if part.is_pinned() else rounded
            parameter.data = parameter.to(dtype)

    return module, exact


def leave_buffers_free(module: nn.Module) -> None:
    """Stop DeepSpeed from reading ahead into every buffer for parameter files: a fetch out of turn would find none."""
    swapper: Any = getattr(next(module.parameters()), "nvme_swapper", None)
    if swapper is not None:
        swapper.available_swap_in_buffers = lambda: max(0, len(swapper.available_buffer_ids) - _FREE_BUFFERS)


# --- Master weights and optimizer state ---


@dataclass(frozen=True)
class Shard:
    """This rank's range of one parameter."""

    name: str
    start: int
    """First element in the flattened parameter."""
    weight: Tensor
    """float32 [n], a view of the master weights."""
    flat: Tensor
    """The tensor that the optimizer steps; it contains the range."""
    offset: int
    """First element of the range in `flat`."""

    def slice_of(self, other: Tensor) -> Tensor:
        """The range [n] of a tensor shaped like `flat`."""
        return other.view(-1).narrow(0, self.offset, self.weight.numel())


class ShardedState:
    """This rank's shards of master weights and Adam's moments, alike for every stage.

    Weights and moments are changed in place; `refresh_parameters` then brings the weights into use.
    """

    def __init__(self, optimizer: Any, stage: int, names: Mapping[int, str], rank: int) -> None:
        """optimizer: DeepSpeed's; names: of parameters, by `id`."""
        self.stage = stage
        self._optimizer = optimizer
        # DeepSpeed wraps torch's optimizer, except at stage 0 in float32.
        self._is_wrapped = hasattr(optimizer, "optimizer")
        self._torch: torch.optim.Optimizer = optimizer.optimizer if self._is_wrapped else optimizer

        if stage == 3:
            shards = self._find_split_parameters(names, rank)
        elif stage > 0:
            shards = self._find_flat_partitions(names)
        else:
            shards = self._find_whole_parameters(names)
        self.shards = list(shards)

        # At stage 0 all ranks hold the same, and only the first writes it.
        self.owns_ranges = stage > 0 or rank == 0
        self.set_updates(0)

    def _find_whole_parameters(self, names: Mapping[int, str]) -> Iterator[Shard]:
        """Stage 0. `fp32_groups` are the master weights of the half-precision `fp16_groups`."""
        if self._is_wrapped:
            master_groups, working_groups = self._optimizer.fp32_groups, self._optimizer.fp16_groups
        else:
            master_groups = working_groups = [group["params"] for group in self._torch.param_groups]

        for masters, parameters in zip(master_groups, working_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                yield Shard(names[id(parameter)], 0, master.detach().view(-1), master, 0)

    def _find_flat_partitions(self, names: Mapping[int, str]) -> Iterator[Shard]:
        """Stages 1 and 2. `_hp_mapping` is the only record of where a parameter lies in the flat partition."""
        zero = self._optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                # None: other ranks have all of it.
                if mapping is not None:
                    start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                    yield Shard(names[id(parameter)], start, mapping.hp_fragment.detach(), flat, offset)

    def _find_split_parameters(self, names: Mapping[int, str], rank: int) -> Iterator[Shard]:
        """Stage 3. `grad_position` is the only record of where a parameter's part lies in its flat group."""
        zero = self._optimizer
        for parameter in (p for group in zero.fp16_groups for p in group):
            group_index, offset, part_size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * part_size
            # The last part is padded; `ds_numel` is the size without padding.
            count = min(part_size, parameter.ds_numel - start)
            if count > 0:
                flat = zero.fp32_partitioned_groups_flat[group_index]
                yield Shard(names[id(parameter)], start, flat.detach().narrow(0, offset, count), flat, offset)

    @property
    def flat_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer steps, each once."""
        return list({id(shard.flat): shard.flat for shard in self.shards}.values())

    def moments_of(self, shard: Shard) -> dict[str, Tensor]:
        """Adam's moments of a shard, views."""
        return {kind: shard.slice_of(self._torch.state[shard.flat][kind]) for kind in MOMENTS}

    def count_updates(self) -> int:
        """Updates that the optimizer has made: fewer than steps of training when half precision skipped some."""
        return max((int(self._torch.state[flat]["step"]) for flat in self.flat_tensors), default=0)

    def set_updates(self, updates: int) -> None:
        """Set the number of updates made; 0 also creates Adam's state.

        DeepSpeed creates it by a step without a gradient for half precision at stage 0, which would apply weight decay.
        """
        for flat in self.flat_tensors:
            state = self._torch.state[flat]
            if updates == 0:
                state.update({kind: torch.zeros_like(flat.detach()) for kind in MOMENTS})
            state["step"] = torch.tensor(float(updates))

    def read_loss_scale(self) -> dict[str, float]:
        """State of the dynamic loss scale; {} without one."""
        scaler = self._loss_scaler()
        is_dynamic = getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False)
        if not is_dynamic:
            return {}
        return {key: getattr(scaler, key) for key in _SCALER_KEYS if getattr(scaler, key, None) is not None}

    def write_loss_scale(self, state: Mapping[str, float]) -> None:
        """Restore what `read_loss_scale` returned."""
        scaler = self._loss_scaler()
        for key in self.read_loss_scale():
            if key in state:
                setattr(scaler, key, state[key])

    def _loss_scaler(self) -> Any:
        # Stages 1 to 3 have `loss_scaler`, stage 0 has `loss_scale_config`; none without fp16.
        return getattr(self._optimizer, "loss_scaler", None) or getattr(self._optimizer, "loss_scale_config", None)

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Copy the master weights into the working weights, in their precision. All ranks call this together."""
        if self.stage in (1, 2):
            self._optimizer.update_lp_params()
        elif self.stage == 3:
            self._refresh_split_parameters()
        elif self._is_wrapped:
            groups = zip(self._optimizer.fp16_groups, self._optimizer.fp32_groups, strict=True)
            for parameters, masters in groups:
                for parameter, master in zip(parameters, masters, strict=True):
                    parameter.copy_(master)

    def _refresh_split_parameters(self) -> None:
        """What DeepSpeed does at the end of its own step at stage 3."""
        zero = self._optimizer
        zero._partition_all_parameters()

        # Of a parameter in a file that was read ahead DeepSpeed would renew the copy in memory only, and later read
        # the old one from the file again.
        in_files = [p for group in zero.fp16_groups for p in group if p.ds_tensor.final_location == "nvme"]
        if in_files:
            in_files[0].nvme_swapper.synchronize_reads()
            in_files[0].nvme_swapper.remove_partition_and_release_buffers(in_files)

        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)

        # Parameters that stay gathered between steps.
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @torch.no_grad()
    def fill_weights(self, values: Mapping[str, tuple[int, Tensor]]) -> None:
        """Set master weights by name from ranges (first element, values) that contain this rank's. Refreshes."""
        for shard in self.shards:
            first, numbers = values[shard.name]
            shard.weight.copy_(numbers.narrow(0, shard.start - first, shard.weight.numel()))
        self.refresh_parameters()


# --- Memory ---


def measure_tensor_bytes(module: nn.Module, optimizer: Any, state: ShardedState) -> tuple[int, int, int]:
    """[bytes] of (parameters, gradients, optimizer state) on this rank, each storage once.

    Call it after a backward pass, before the step.
    """
    trained: list[Any] = [p for p in module.parameters() if p.requires_grad]
    parts = [getattr(p, "ds_tensor", None) for p in trained]
    weights = [p.data for p in trained] + [part for part in parts if part is not None]

    gradients: list[Tensor] = [p.grad for p in trained if p.grad is not None]
    # Stage 2 keeps this rank's gradients here after a reduction,
    for group in (getattr(optimizer, "averaged_gradients", None) or {}).values():
        gradients += [gradient for gradient in group or () if gradient is not None]
    # and stage 3 there, in an attribute with a mangled name.
    partitions = getattr(optimizer, "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition", {})
    gradients += list(partitions.values())

    moments = [moment for shard in state.shards for moment in state.moments_of(shard).values()]

    # A storage that two kinds share counts for the first one only.
    seen: set[int] = set()
    parameter_bytes, seen = _sum_new_storages(weights, seen)
    optimizer_bytes, seen = _sum_new_storages([*state.flat_tensors, *moments], seen)
    gradient_bytes, seen = _sum_new_storages(gradients, seen)
    return parameter_bytes, gradient_bytes, optimizer_bytes


def _sum_new_storages(tensors: Iterable[Tensor], seen: set[int]) -> tuple[int, set[int]]:
    """([bytes] of storages that are not in `seen`, all storages seen by then)."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), seen | storages.keys()
