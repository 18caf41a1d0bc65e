"""The configuration that DeepSpeed gets (OUT/deepspeed.json)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_neuro.models.vit3d import TransformerBlock
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import nvme
from hpc_neuro.train.optim import BETAS

_LARGEST_BUCKET = 1 << 26
"""[element] Most elements reduced or gathered at once."""


def bucket_size(parameters: int) -> int:
    """[element] Elements that are reduced or gathered at once, a multiple of 1024 as DeepSpeed's alignment demands."""
    return min(-(-parameters // 1024) * 1024, _LARGEST_BUCKET)


def build_deepspeed_settings(
    cfg: EngineConfig, optim: OptimConfig, dtype: torch.dtype, micro: int, passes: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """DeepSpeed's configuration. micro: crops per rank and pass; sizes: elements of each trained parameter."""
    # Sums of many small gradients lose their last bits in bf16, over passes and over ranks.
    is_bf16 = dtype == torch.bfloat16
    sums: dict[str, Any] = {"communication_data_type": "fp32"} if is_bf16 else {}
    # At stage 0 DeepSpeed refuses another type of sums over passes.
    if is_bf16 and cfg.stage > 0:
        sums["data_types"] = {"grad_accum_dtype": "fp32"}

    adam = {"lr": optim.lr, "betas": list(BETAS), "eps": 1e-8, "weight_decay": optim.weight_decay}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": optim.clip,
        "prescale_gradients": cfg.stage in (1, 2),
        # torch's own AdamW; DeepSpeed's fused ones would be compiled when training starts.
        "optimizer": {"type": "AdamW", "params": {**adam, "torch_adam": True}},
        "zero_optimization": _build_zero_settings(cfg, dtype, sizes),
        # torch's AdamW steps offloaded state, too.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": is_bf16},
        **sums,
        "fp16": {"enabled": dtype == torch.float16},
        "wall_clock_breakdown": False,
    }


def _build_zero_settings(cfg: EngineConfig, dtype: torch.dtype, sizes: Sequence[int]) -> dict[str, Any]:
    """The section `zero_optimization`."""
    parameters = sum(sizes)

    # DeepSpeed allocates whole buckets, by default of 2 GB, whatever the size of the model.
    bucket = bucket_size(parameters)
    # With float32 sums of bf16, DeepSpeed's stage 1 is an optimizer of another kind, with another layout inside. Its
    # stage 2 shards what stage 1 does, and the gradients as well.
    stage = 2 if cfg.stage == 1 and dtype == torch.bfloat16 else cfg.stage
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}

    # By default a bucket is copied, reduced on all ranks all the same, and copied back. In place it is the same
    # communication; divided first, as by default, so that sums of fp16 do not overflow sooner.
    if cfg.stage in (1, 2):
        zero["reduce_scatter"] = False

    # By default tensors of up to 100,000 elements stay whole on each rank, and everything stays gathered that is used
    # again within 1,000 million elements: small models would not be sharded at all. What stays whole would be gathered
    # tensor by tensor after each step, in over a hundred messages; a block is gathered in one.
    live = max(parameters // 4, 1 << 20)
    if cfg.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
        zero["leaf_module"] = {"classes": [f"{TransformerBlock.__module__}.{TransformerBlock.__name__}"]}
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = live
        zero["stage3_prefetch_bucket_size"] = live // 4

    # Locked memory can be copied while the GPU computes.
    if cfg.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if cfg.offload_parameters != "none":
        zero["offload_param"] = {"device": cfg.offload_parameters, "pin_memory": True}

    # What is read ahead needs buffers, too, besides the live parameters.
    if cfg.offload_parameters != "none" and cfg.nvme is not None:
        buffers = nvme.plan_buffers(sizes, dtype.itemsize, live + live // 4)
        zero["offload_param"] |= {"nvme_path": str(cfg.nvme), **buffers}

    return zero
