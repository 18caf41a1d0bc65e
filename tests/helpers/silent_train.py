"""One rank of tests/core/test_liveness.py: reduces with the others until one is lost. `silent_train.py HOW RANK`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from hpc_neuro.core.liveness import TorchRankWatch
from hpc_neuro.train.config import EngineConfig
from hpc_neuro.train.deepspeed.engine import join_group

HOW, LOST_RANK = sys.argv[1], int(sys.argv[2])
logging.basicConfig(format="%(message)s")
join_group(EngineConfig())
with TorchRankWatch(1.0):  # An earlier watch, whose numbers must not be taken for those of the next.
    time.sleep(0.3)
with TorchRankWatch(3.0) as watch:
    watch.activity = "step 7"
    try:
        for turn in range(2000):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
            if turn == 100 and dist.get_rank() == LOST_RANK:
                if HOW == "raise":
                    raise MemoryError("no room")
                print("AT", time.time(), flush=True)
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[HOW])
    except RuntimeError as error:
        if lost := watch.explain(error):
            logging.error("LOST %s", lost)
            raise SystemExit(1) from error
        raise
