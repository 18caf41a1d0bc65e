"""Where DeepSpeed keeps this rank's share of the master weights and of Adam's moments, the same view for every stage.

    parameter, flattened   0 ......................... n
    stage 0                [ every rank: all of it     ]
    stage 1, 2             [ rank 0   | rank 1         ]   a group's parameters in one line, cut anywhere
    stage 3                [ rank 0    | rank 1    |pad]   every parameter cut into equal parts

DeepSpeed's own checkpoints mirror this layout, and only its conversion tools cross it, not between all stages (0.19);
ranges of named parameters cross it by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_neuro.train.checkpoint.tensor_files import TensorRange

MOMENTS = ("exp_avg", "exp_avg_sq")
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Shard:
    """This rank's range of one parameter."""

    name: str
    start: int  # its first element in the flattened parameter
    weight: Tensor  # float32 [n], a view of the master weights
    flat: Tensor  # what the optimizer steps, this range somewhere in it
    offset: int  # where

    def of(self, other: Tensor) -> Tensor:
        """The same range [n] of a tensor shaped like `flat`."""
        return other.view(-1).narrow(0, self.offset, self.weight.numel())


class Shards:
    """All ranges of this rank. Master weights and moments are changed in place, then `refresh` brings them into use."""

    def __init__(self, optimizer: Any, stage: int, names: Mapping[int, str], rank: int) -> None:
        """optimizer: DeepSpeed's; names: of parameters, by `id`."""
        self._optimizer, self.stage = optimizer, stage
        # DeepSpeed wraps torch's optimizer, except for stage 0 in float32
        self._wrapped = hasattr(optimizer, "optimizer")
        self._torch: torch.optim.Optimizer = optimizer.optimizer if self._wrapped else optimizer
        found = self._sharded(names, rank) if stage == 3 else self._flat(names) if stage else self._whole(names)
        self.items = list(found)
        self.owns = stage > 0 or rank == 0  # whether this rank's ranges are to be written: those of stage 0 are alike
        self.set_step(0)

    def _whole(self, names: Mapping[int, str]) -> Iterator[Shard]:
        groups = self._optimizer.fp32_groups if self._wrapped else [g["params"] for g in self._torch.param_groups]
        models = self._optimizer.fp16_groups if self._wrapped else groups
        for held, used in zip(groups, models, strict=True):
            for master, parameter in zip(held, used, strict=True):
                yield Shard(names[id(parameter)], 0, master.detach().view(-1), master, 0)

    def _flat(self, names: Mapping[int, str]) -> Iterator[Shard]:
        zero = self._optimizer
        for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                held = parameter._hp_mapping  # None: all of it is with other ranks
                if held is not None:
                    start, offset = held.lp_fragment_address.start, held.hp_fragment_address.start
                    yield Shard(names[id(parameter)], start, held.hp_fragment.detach(), flat, offset)

    def _sharded(self, names: Mapping[int, str], rank: int) -> Iterator[Shard]:
        zero = self._optimizer
        for parameter in (p for group in zero.fp16_groups for p in group):
            index, offset, part = zero.grad_position[zero.get_param_id(parameter)]
            start = rank * part
            count = min(part, parameter.ds_numel - start)  # the last part is padded
            if count > 0:
                flat = zero.fp32_partitioned_groups_flat[index]
                yield Shard(names[id(parameter)], start, flat.detach().narrow(0, offset, count), flat, offset)

    @property
    def flats(self) -> list[Tensor]:
        """The tensors that the optimizer steps, each once."""
        return list({id(s.flat): s.flat for s in self.items}.values())

    def moments(self, shard: Shard) -> dict[str, Tensor]:
        """Adam's moments of a range, views."""
        return {kind: shard.of(self._torch.state[shard.flat][kind]) for kind in MOMENTS}

    def step(self) -> int:
        """Updates that the optimizer has done: fewer than steps of training when half precision skipped some."""
        return max((int(self._torch.state[f]["step"]) for f in self.flats), default=0)

    def set_step(self, step: int) -> None:
        """Make Adam's state where there is none yet, and set the updates done.

        DeepSpeed makes it by a step on no gradient for half precision in stage 0, whose weight decay would count.
        """
        for flat in self.flats:
            state = self._torch.state[flat]
            if step == 0:
                state.update({kind: torch.zeros_like(flat.detach()) for kind in MOMENTS})
            state["step"] = torch.tensor(float(step))

    def ranges(self, also: Mapping[str, Mapping[int, Tensor]]) -> list[TensorRange]:
        """All this rank holds. also: kind -> index of a shard -> values shaped like its weight."""
        found = [TensorRange("weight", s.name, s.start, s.weight) for s in self.items]
        found += [TensorRange(kind, s.name, s.start, v) for s in self.items for kind, v in self.moments(s).items()]
        for kind, held in also.items():
            found += [TensorRange(kind, self.items[i].name, self.items[i].start, v) for i, v in held.items()]
        return found

    def scaler(self) -> dict[str, float]:
        """State of the dynamic loss scale; {} where there is none."""
        held = self._scaler()
        dynamic = getattr(held, "dynamic", False) or getattr(held, "dynamic_loss_scale", False)
        return {k: getattr(held, k) for k in _SCALER if dynamic and getattr(held, k, None) is not None}

    def set_scaler(self, state: Mapping[str, float]) -> None:
        """Take over what `scaler` said."""
        held = self._scaler()
        for key in self.scaler():
            if key in state:
                setattr(held, key, state[key])

    def _scaler(self) -> Any:
        return getattr(self._optimizer, "loss_scaler", None) or getattr(self._optimizer, "loss_scale_config", None)

    @torch.no_grad()
    def refresh(self) -> None:
        """The weights in use become the master weights, in their precision, on all ranks. All ranks call this."""
        zero = self._optimizer
        if self.stage in (1, 2):
            zero.update_lp_params()
        elif self.stage == 3:
            # as after a step of its own: what is gathered is let go, each rank's part renewed, small ones gathered
            zero._partition_all_parameters()
            filed = [p for group in zero.fp16_groups for p in group if p.ds_tensor.final_location == "nvme"]
            if filed:  # DeepSpeed would renew one that it has read ahead in memory only, and read the old one again
                filed[0].nvme_swapper.synchronize_reads()
                filed[0].nvme_swapper.remove_partition_and_release_buffers(filed)
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        elif self._wrapped:
            for used, held in zip(zero.fp16_groups, zero.fp32_groups, strict=True):
                for parameter, master in zip(used, held, strict=True):
                    parameter.copy_(master)

    @torch.no_grad()
    def fill(self, values: Mapping[str, tuple[int, Tensor]]) -> None:
        """Master weights by name, from a range (first element, numbers) that holds this rank's; then `refresh`."""
        for shard in self.items:
            first, numbers = values[shard.name]
            shard.weight.copy_(numbers.narrow(0, shard.start - first, shard.weight.numel()))
        self.refresh()
