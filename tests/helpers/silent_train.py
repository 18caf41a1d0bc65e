"""One rank of test_rank_watch.py: meets the others until one of them is lost. `silent_train.py HOW WHO`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from hpc_neuro.train.deepspeed.config import EngineConfig
from hpc_neuro.train.deepspeed.engine import join_group
from hpc_neuro.train.rank_watch import Watch

HOW, WHO = sys.argv[1], int(sys.argv[2])
logging.basicConfig(format="%(message)s")
join_group(EngineConfig())
with Watch(1.0):  # a run before, whose numbers must not be taken for those of the next
    time.sleep(0.3)
with Watch(3.0) as watch:
    watch.doing = "step 7"
    try:
        for turn in range(2000):
            dist.all_reduce(torch.ones(1))
            time.sleep(0.01)
            if turn == 100 and dist.get_rank() == WHO:
                if HOW == "raise":
                    raise MemoryError("no room")
                print("AT", time.time(), flush=True)
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[HOW])
    except RuntimeError as error:
        if lost := watch.explain(error):
            logging.error("LOST %s", lost)
            raise SystemExit(1) from error
        raise
