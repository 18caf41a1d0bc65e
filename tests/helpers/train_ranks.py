"""What test_ranks.py runs on two ranks: `train_ranks.py STORE FOLDER`, started by torchrun.py."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from hpc_neuro import train
from hpc_neuro.core import distributed
from hpc_neuro.core.schema import load
from hpc_neuro.models.config import StudentConfig
from hpc_neuro.models.student import build_student
from hpc_neuro.train import loop
from hpc_neuro.train.activation_memory import LiveTensors
from hpc_neuro.train.config import EngineConfig, OptimConfig
from hpc_neuro.train.deepspeed import engine, internals
from hpc_neuro.train.deepspeed.settings import build_deepspeed_settings
from tests.train.conftest import TINY

torch.set_num_threads(1)
STORE, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
# a crash is played in a process that lives on, so nobody may take it for lost
KEYS = ["optim.batch=4", "engine.silence=600"]
SHORT = ["optim.steps=2", "validate.crops=1", "checkpoint.every=0", "crop.size=[8,16,32]"]
step, shares, augment = loop.train_step, loop.share_step, loop.augment
loop._AGREEMENT_SECONDS = 0.0  # a signal stops the step in which it comes
codes: dict[str, list[object]] = {}
counted: dict[str, list[tuple[int, int]]] = {}  # run -> (step, sample) that this rank learned from


def run(name: str, *overrides: str) -> None:
    cfg = load(train.TrainConfig, None, [f"store={STORE}", f"out={FOLDER / name}", *TINY, *KEYS, *overrides])
    batches: list[list[int]] = []

    def record_batch(batch, *rest):
        batches.append(batch.index.tolist())
        return augment(batch, *rest)

    train_step = loop.train_step

    def record_step(state, ready):
        batches.clear()
        number = state.step
        train_step(state, ready)
        for (first, stop), indices in zip(shares(cfg.optim.batch, state.parts.workload.micro), batches, strict=True):
            counted.setdefault(name, []).extend((number, i) for i in indices if stop > first)

    loop.train_step, loop.augment = record_step, record_batch
    try:
        codes.setdefault(name, []).append(train.run(cfg))
    finally:
        loop.train_step, loop.augment = train_step, augment


def power_cut(state, ready):
    step(state, ready)
    if state.step == 3:
        raise InterruptedError


def signal_to_one_rank(state, ready):
    if state.step == 4 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    step(state, ready)


run("whole")
loop.train_step = power_cut
try:
    run("broken")
except InterruptedError:
    codes["broken"] = ["cut"]
loop.train_step = signal_to_one_rank
run("broken")
run("down", "engine.stage=1")  # saved by two ranks, goes on with one
loop.train_step = step
run("broken")
run("up", "engine.stage=2", "optim.batch=3")  # saved by one rank, three crops for two ranks
run("stage3", "engine.stage=3", "engine.micro_batch=1")
run("stage0", "engine.stage=0")
internals.import_deepspeed()
import deepspeed  # noqa: E402
from deepspeed.accelerator import get_accelerator  # noqa: E402

get_accelerator().is_fp16_supported = lambda: True  # it trains in fp16 once it is told so, slowly
get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float16, torch.bfloat16]
for stage, dtype, micro in itertools.product(range(4), ("fp32", "bf16", "fp16"), (2, 1)):
    if stage == 0 and dtype == "fp16":
        continue  # refused
    keys = [f"engine.stage={stage}", f"engine.dtype={dtype}", f"engine.micro_batch={micro}"]
    run(f"matrix/{stage}_{dtype}_{micro}", *SHORT, *keys)


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_student(StudentConfig(size="tiny", depth=6))


values = {"vit.blocks.1.attn.qkv.weight": torch.randn(576, 192, generator=torch.Generator().manual_seed(1))}
settings = build_deepspeed_settings(EngineConfig(stage=3), OptimConfig(batch=2), torch.bfloat16, 1, 1, [10**6])
with LiveTensors() as live:
    sharded, exact = internals.build_sharded_module(make, values, settings, torch.bfloat16)
most, alike = live.peak_bytes, []
for (name, plain), part in zip(engine.build_module(make, values).named_parameters(), sharded.parameters(), strict=True):
    with deepspeed.zero.GatheredParameters([part]):
        alike.append(torch.equal(part, plain.bfloat16()))
    first, numbers = exact[name]
    own_share = plain.reshape(-1)[first : first + len(numbers)]
    alike.append(torch.equal(numbers[: len(own_share)], own_share))
whole = sum(4 * math.prod(p.ds_shape) for p in sharded.parameters())
facts = {"most": most, "whole": whole, "alike": all(alike), "counted": len(alike)}
(FOLDER / f"sharded{distributed.rank()}.json").write_text(json.dumps(facts))
(FOLDER / f"codes{distributed.rank()}.json").write_text(json.dumps(codes))
(FOLDER / f"counted{distributed.rank()}.json").write_text(json.dumps(counted))
