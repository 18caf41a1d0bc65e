"""Real ranks, one of which is lost: the others name it and end in the time that is stated."""

from __future__ import annotations

import re
import time

import pytest

from tests.helpers.torchrun import start

LIMIT = 3.0  # as in helpers/silent_train.py


@pytest.mark.slow
@pytest.mark.parametrize(("how", "who"), [("kill", 1), ("stop", 0), ("raise", 1)])
def test_a_lost_rank_is_named_and_the_others_end_in_time(how, who):
    ranks = start("silent_train.py", 3 if how == "kill" else 2, how, who)
    others = [p for rank, p in enumerate(ranks) if rank != who]
    try:
        said = [p.communicate(timeout=150)[0] for p in others]
        ended = time.time()
    finally:
        for process in ranks:
            process.kill()
    codes = [p.returncode for p in others]
    own = ranks[who].communicate()[0]
    assert set(codes) == {1}, said
    name = "rank 0 or the launcher" if (how, who) == ("stop", 0) else rf"rank {who} \(\S+, process {ranks[who].pid}\)"
    what = {"kill": "has been silent for", "stop": "has been silent for", "raise": "stopped: MemoryError: no room"}[how]
    for text in said:
        assert re.search(name, text), text
        assert who == 0 or what in text, text
        assert who == 0 or "last at: step 7" in text, text
    if how != "raise":
        begun = float(re.search(r"AT ([\d.]+)", own)[1])
        assert ended - begun < 1.6 * LIMIT + 3  # the interpreter's end on a busy machine
