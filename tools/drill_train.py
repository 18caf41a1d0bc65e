"""Drills of a training run on real ranks: it is stopped, killed and spread otherwise, and must come out the same.

    python -m tools.drill_train signals CONFIG.yaml out=FOLDER [key=value ...] [--signals 100] [--ranks 2]
    python -m tools.drill_train elastic CONFIG.yaml out=FOLDER [key=value ...] [--chain 4:1 2:3 3:2 1:0]

`signals` trains once undisturbed, then again and again sends a signal to a random rank at a random moment and starts
the run anew, until that many are sent: SIGTERM, SIGUSR1 or SIGUSR2, each fifth time SIGKILL. After each stop the newest
checkpoint must be whole, and a signal that was caught must have cost at most one step. `elastic` gives a run the ranks
and ZeRO stages of the chain in turn (RANKS:STAGE), an equal share of the steps each. Both compare the final weights
with the undisturbed run's. CONFIG should be of a small run that takes some minutes. The last line is one JSON object;
exit code 1 when something is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from hpc_neuro.train import checkpoint
from hpc_neuro.train.shard_files import kinds

KEYS = ("tracker.every=1", "tracker.wandb=disabled", "engine.silence=6")
_CAUGHT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def start(words: list[str], ranks: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """The ranks of one start of the run, as srun would start them; what they say is appended to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "hpc_neuro", "train", *words, *KEYS]
    with log.open("ab") as said:
        return [
            subprocess.Popen(command, env=env | {"RANK": str(i), "LOCAL_RANK": str(i)}, stdout=said, stderr=said)
            for i in range(ranks)
        ]


def step_of(out: Path) -> int:
    """The last step that is written down."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((row["step"] for row in map(json.loads, lines) if row["kind"] == "train"), default=0)


def saved(out: Path) -> int:
    """Step of the newest checkpoint, whose files must be readable; 0 without one."""
    held = checkpoint.newest(out / "checkpoints")
    if held is None:
        return 0
    if not {"weight", "exp_avg", "exp_avg_sq"} <= kinds(held):
        raise SystemExit(f"{held} is broken")
    return checkpoint.read_marker(held).step


def wait(ranks: list[subprocess.Popen[bytes]], limit: float = 600) -> tuple[list[int], bool]:
    """Exit codes, and whether ranks had to be killed that outlived one by 30 s.

    They wait for one that died before it joined them: a launcher's business (srun --kill-on-bad-exit), played here.
    """
    end, patience, killed = time.monotonic() + limit, float("inf"), False
    while any(p.poll() is None for p in ranks):
        time.sleep(0.05)
        if patience == float("inf") and any(p.poll() not in (None, 0, 75) for p in ranks):
            patience = time.monotonic() + 30
        if time.monotonic() > min(end, patience):
            killed = True
            for process in ranks:
                process.kill()
    if time.monotonic() > end:
        raise SystemExit("a rank hangs")
    return [process.wait() for process in ranks], killed


def signals(words: list[str], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Signals at random moments until enough are sent, then to the end."""
    draw = random.Random(args.seed)
    counts: dict[str, int] = {}
    worst, starts, sent, slowest, unjoined = 0, 0, 0, 0.0, 0
    while sent < args.signals:
        ranks, begun = start(words, args.ranks, out.with_suffix(".log")), time.monotonic()
        starts += 1
        moment = draw.uniform(0, args.moment)
        while time.monotonic() - begun < moment and all(p.poll() is None for p in ranks):
            time.sleep(0.05)
        number = signal.SIGKILL if sent % 5 == 4 else draw.choice(_CAUGHT)
        target = draw.choice(ranks)
        before = step_of(out)
        alive = target.poll() is None
        if alive:
            target.send_signal(number)
            sent += 1
            counts[number.name] = counts.get(number.name, 0) + 1
        hit = time.monotonic()
        codes, killed = wait(ranks)
        unjoined += killed
        if alive and number == signal.SIGKILL and not killed:
            slowest = max(slowest, time.monotonic() - hit)
        elif alive and 75 in codes:
            worst = max(worst, before - saved(out))
        saved(out)
        if all(code == 0 for code in codes):  # came to its end: once more from the beginning
            finished = out.with_name(f"{out.name}_finished_{starts}")
            out.rename(finished)
    codes, _ = wait(start(words, args.ranks, out.with_suffix(".log")), 3600)
    if any(codes):
        raise SystemExit(f"the run does not come to its end: exit codes {codes}")
    found = {"signals": counts, "starts": starts, "most_steps_lost": worst, "before_joining": unjoined}
    return found | {"seconds_to_stop_after_kill": round(slowest, 1)}


def elastic(words: list[str], out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One link of the chain after the other; a rank is asked to stop when its share of the steps is done."""
    found = []
    total = step_of(out.with_name(f"{out.name}_undisturbed"))
    for index, link in enumerate(args.chain):
        ranks, stage = map(int, link.split(":"))
        processes = start([*words, f"engine.stage={stage}"], ranks, out.with_suffix(".log"))
        until = total * (index + 1) // len(args.chain)
        while index + 1 < len(args.chain) and step_of(out) < until and all(p.poll() is None for p in processes):
            time.sleep(0.02)
        if index + 1 < len(args.chain):
            processes[-1].send_signal(signal.SIGUSR1)
        codes, _ = wait(processes, 3600)
        found.append({"ranks": ranks, "stage": stage, "codes": codes, "saved": saved(out)})
    return {"chain": found}


def distance(first: Path, second: Path) -> float:
    """Largest difference of two runs' final weights."""
    a, b = (load_file(run / "weights/last/model.safetensors") for run in (first, second))
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drill", choices=["signals", "elastic"])
    parser.add_argument("words", nargs="+", help="as for hpc-neuro train, `out=FOLDER` among them")
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--moment", type=float, default=15.0, help="[s] signals come this long after a start at most")
    parser.add_argument("--chain", nargs="+", default=["4:1", "2:3", "3:2", "1:0"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = next((Path(w.removeprefix("out=")) for w in args.words if w.startswith("out=")), None)
    if out is None or out.exists():
        parser.error("give out=FOLDER, one that is not there yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [w for w in args.words if not w.startswith("out=")]
    alone = out.with_name(f"{out.name}_undisturbed")
    ranks = args.ranks if args.drill == "signals" else 1
    if not (alone / "weights/last").exists():
        codes, _ = wait(start([*words, f"out={alone}"], ranks, out.with_suffix(".log")), 3600)
        if any(codes):
            raise SystemExit(f"the undisturbed run failed with {codes}; see {out.with_suffix('.log')}")
    found = (signals if args.drill == "signals" else elastic)([*words, f"out={out}"], out, args)
    found["weights_differ_by"] = distance(out, alone)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    done = [row["step"] for row in steps if row["kind"] == "train"]
    found["every_step_once"] = done == list(range(1, len(done) + 1))
    print(json.dumps(found))
    exact = 0.0 if args.drill == "signals" else 1e-3
    return int(
        found["weights_differ_by"] > exact or not found["every_step_once"] or found.get("most_steps_lost", 0) > 1
    )


if __name__ == "__main__":
    sys.exit(main())
