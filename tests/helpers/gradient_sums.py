"""What test_engine.py runs on two ranks: `gradient_sums.py FOLDER STAGE PASSES`, started by torchrun.py.

The gradients of a step are 1 and seven times 2^-9, over ranks and passes: in bf16 each small one is lost beside the 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hpc_neuro.core import distributed
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import engine
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from hpc_neuro.train.optim import ParameterGroup

FOLDER, STAGE, PASSES = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])


class Slope(torch.nn.Module):
    """Its gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight[:1]).sum()


cfg = EngineConfig(stage=STAGE, dtype="bf16")
engine.join_group(cfg)
optim = OptimConfig(batch=2 * PASSES, clip=0)
settings = build_deepspeed_settings(cfg, optim, torch.bfloat16, 1, PASSES, [1024])
trained = engine.Engine(Slope, {}, [ParameterGroup(1.0, 0.0, ["weight"])], settings, torch.bfloat16)
trained.set_lr(1e-3)
norm = torch.nan
for number in range(PASSES):
    is_first = number == 0 and distributed.rank() == 0
    trained.backward(trained(torch.tensor([1.0 if is_first else 2.0**-9], dtype=torch.bfloat16)))
    norm = trained.step()
(FOLDER / f"norm{distributed.rank()}.json").write_text(json.dumps(float(norm)))
trained.close()
