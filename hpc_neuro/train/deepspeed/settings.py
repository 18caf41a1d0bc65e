"""The `engine` section of a config, and the JSON that DeepSpeed is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_neuro.models.vit3d import TransformerBlock
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.optim import BETAS

_BUCKET = 1 << 26  # elements reduced or gathered at once, at most


def bucket_size(parameters: int) -> int:
    """Elements that are reduced or gathered at once."""
    return min(-(-parameters // 1024) * 1024, _BUCKET)  # DeepSpeed wants them aligned


def build_deepspeed_settings(
    cfg: EngineConfig, optim: OptimConfig, dtype: torch.dtype, micro: int, passes: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """What DeepSpeed is told. `sizes`: elements of each trained parameter."""
    parameters = sum(sizes)
    # DeepSpeed allocates whole buckets, by default of 2 GB, whatever the size of the model
    size = bucket_size(parameters)
    zero: dict[str, Any] = {"stage": cfg.stage, "reduce_bucket_size": size, "allgather_bucket_size": size}
    if cfg.stage in (1, 2):
        # By default a bucket is copied, all of it reduced on all ranks just the same, and copied back. In place it is
        # the same communication; divided first, as by default, so that sums of fp16 do not overflow sooner.
        zero["reduce_scatter"] = False
    if cfg.stage == 3:
        # By default tensors of up to 100,000 elements stay whole on each rank, and all is kept gathered that is used
        # again within 1,000 million: small models would not be sharded at all. What stays whole would be gathered
        # tensor by tensor after each step, in over a hundred messages; a block is gathered in one.
        live = max(parameters // 4, 1 << 20)
        zero["stage3_param_persistence_threshold"] = 0
        zero["leaf_module"] = {"classes": [f"{TransformerBlock.__module__}.{TransformerBlock.__name__}"]}
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live
        zero["stage3_prefetch_bucket_size"] = live // 4
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.offload_parameters != "none":
        zero["offload_param"] = {"device": cfg.offload_parameters, "pin_memory": True}
        if cfg.nvme is not None:
            zero["offload_param"] |= {
                "nvme_path": str(cfg.nvme),
                **nvme.buffers(sizes, dtype.itemsize, live + live // 4),
            }
    adam = {"lr": optim.lr, "betas": list(BETAS), "eps": 1e-8, "weight_decay": optim.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": optim.clip,
        "prescale_gradients": cfg.stage in (1, 2),
        # torch's own; the fused ones would be compiled when training starts
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does for offloaded state, too
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "wall_clock_breakdown": False,
    }
