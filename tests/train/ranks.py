"""What test_ranks.py runs on two ranks: `torchrun --nproc-per-node 2 ranks.py STORE FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from hpc_neuro import distributed, train
from hpc_neuro.schema import load
from hpc_neuro.train import loop
from tests.train.conftest import TINY

torch.set_num_threads(1)
STORE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
KEYS = ["augment.warp=0", "optim.batch=4"]  # warps leave unlabelled voxels behind, over which cross entropy averages
step = loop.one_step
codes = {}


def run(name: str, *overrides: str) -> None:
    cfg = load(train.TrainConfig, None, [f"store={STORE}", f"out={FOLDER / name}", *TINY, *KEYS, *overrides])
    codes.setdefault(name, []).append(train.run(cfg))


def power_cut(state, ready):
    step(state, ready)
    if state.step == 3:
        raise InterruptedError


def signal_to_one_rank(state, ready):
    if state.step == 4 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    step(state, ready)


run("whole")
loop.one_step = power_cut
try:
    run("broken")
except InterruptedError:
    codes["broken"] = ["cut"]
loop.one_step = signal_to_one_rank
run("broken")
loop.one_step = step
run("broken")
run("stage3", "engine.stage=3", "ema.window=0", "engine.micro_batch=1")
run("stage0", "engine.stage=0")
(FOLDER / f"codes{distributed.rank()}.json").write_text(json.dumps(codes))
