"""Drills of a training on real ranks: it is stopped, killed and spread otherwise, and must come out the same.

    python -m tests.faults.train_drill signals CONFIG.yaml out=FOLDER [key=value ...] [--signals 100] [--ranks 2]
    python -m tests.faults.train_drill elastic CONFIG.yaml out=FOLDER [key=value ...] [--chain 4:1 2:3 3:2 1:0]

`signals` trains once undisturbed, then again and again sends a signal at a random moment and starts the run anew, until
that many are sent; a run that has come to its end is compared and begun from nothing. A start is one of

    ask       SIGTERM, SIGUSR1, SIGUSR2 one to four times to random ranks, the later ones while they stop and save: all
              must save and exit with 75, at most one step lost
    kill      SIGKILL to a random rank: the others must end by themselves
    saving    SIGKILL to a random rank, a few milliseconds after a checkpoint began to be written
    reader    two to four times any of these to random processes that read crops: the run goes on; then as `ask`

and after each one every checkpoint must be complete and finite, and every row of metrics.jsonl whole. Starts are forked
from this process, which has imported everything; every `--fresh`-th is the command itself. `elastic` gives a run the
ranks and stages of the chain in turn (RANKS:STAGE). Against an undisturbed run, final weights must have the same bits
after `signals`; after `elastic` losses may differ by rounding and weights by two learning rates: Adam's steps where a
gradient is all but zero. The last line is JSON; exit code 1 when something is not so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from hpc_neuro import cli as command
from hpc_neuro.train.checkpoint import folder
from hpc_neuro.train.checkpoint.tensor_files import list_kinds, stream_tensors
from tools.ranks import list_rank_environments

KEYS = ("tracker.every=1", "tracker.wandb=disabled", "engine.silence=5")
ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SCENARIOS = ("ask", "ask", "kill", "saving", "reader")
LOSSES = 1e-4  # by how much rounding alone may change the loss of a step
PATIENCE = 15.0  # [s] that ranks may outlive one that was killed before it joined them


class Rank:
    """One process of a run, forked from this one or started as a command."""

    def __init__(self, words: list[str], env: dict[str, str], log: Path, fresh: bool) -> None:
        self._process: Any
        if fresh:
            with log.open("ab") as log_file:
                line = [sys.executable, "-m", "hpc_neuro", "train", *words]
                self._process = subprocess.Popen(line, env=os.environ | env, stdout=log_file, stderr=log_file)
        else:
            context = multiprocessing.get_context("fork")
            self._process = context.Process(target=_run_fork, args=(words, env, log))
            self._process.start()
        self.pid = int(self._process.pid)

    def code(self) -> int | None:
        """The exit code; None while it lives."""
        status: int | None = (
            self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode
        )
        return status

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.code() is None:
            os.kill(self.pid, number)

    def readers(self) -> list[int]:
        """The processes of it that read crops."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        except OSError:  # it has ended
            return []


def _run_fork(words: list[str], env: dict[str, str], log: Path) -> None:
    os.environ.update(env)
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    code = command.main(["train", *words])
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def start(words: list[str], ranks: int, log: Path, fresh: bool = False) -> list[Rank]:
    """The ranks of one start of the run, as srun would start them; what they say is appended to `log`."""
    return [Rank([*words, *KEYS], own | {"OMP_NUM_THREADS": "1"}, log, fresh) for own in list_rank_environments(ranks)]


def wait(ranks: list[Rank], limit: float = 600) -> tuple[list[int], bool]:
    """Exit codes, and whether ranks had to be killed that outlived one by PATIENCE.

    They wait for one that died before it joined them: a launcher's business (srun --kill-on-bad-exit), played here.
    """
    end, last, killed = time.monotonic() + limit, float("inf"), False
    while any(p.code() is None for p in ranks):
        time.sleep(0.02)
        if last == float("inf") and any(p.code() not in (None, 0, 75) for p in ranks):
            last = time.monotonic() + PATIENCE
        if time.monotonic() > min(end, last):
            killed = True
            for process in ranks:
                process.send(signal.SIGKILL)
    if time.monotonic() > end:
        raise SystemExit("a rank hangs")
    return [int(p.code() or 0) for p in ranks], killed


def rows(out: Path) -> list[dict[str, Any]]:
    """What is written down of the steps, all of it whole but a last line that a kill may have torn."""
    path = out / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def step_of(out: Path) -> int:
    """The last step that is written down."""
    return max((row["step"] for row in rows(out)), default=0)


def identity(out: Path) -> int:
    """Of the file of metrics, which a start writes anew: before, it tells of steps that the start before has lost."""
    path = out / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def read_newest_step(out: Path) -> int:
    """Step of the newest checkpoint, after all of them were read to the last number; 0 without one."""
    marked = [p for p in (out / "checkpoints").glob("step_*") if (p / folder.MARKER).exists()]
    for path in marked:
        shapes = folder.read_training_state(path).shapes
        for kind in list_kinds(path):
            prefix = "student." if kind == "average" else ""  # all of which an average is kept
            wanted = {name: shape for name, shape in shapes.items() if name.startswith(prefix)}
            if not all(bool(torch.isfinite(tensor).all()) for tensor in stream_tensors(path, kind, wanted)):
                raise SystemExit(f"{path} is broken")
    return max((folder.read_marker(p).step for p in marked), default=0)


def until(ranks: list[Rank], seconds: float, reached: Callable[[], bool]) -> bool:
    """Wait for something as long as all ranks live, at most so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and all(p.code() is None for p in ranks):
        if reached():
            return True
        time.sleep(0.001)
    return False


def hit(scenario: str, ranks: list[Rank], out: Path, draw: random.Random, moment: float) -> list[str]:
    """Send what a scenario asks for, at its moments; the names of what was sent, in order."""
    sent: list[str] = []

    def send(pid: int, number: int, whose: str) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)
            sent.append(f"{signal.Signals(number).name} {whose}")

    target = draw.choice(ranks)
    if scenario == "saving":
        until(ranks, 60, lambda: any((out / "checkpoints").glob(".step_????????.00000000.part")))
        time.sleep(draw.uniform(0, 0.02))
    elif scenario == "reader":
        for _ in range(draw.randint(2, 4)):
            until(ranks, 60, lambda: bool(target.readers()))
            time.sleep(draw.uniform(0, moment / 4))
            if readers := target.readers():
                send(draw.choice(readers), draw.choice([*ASKED, signal.SIGKILL]), "reader")
    else:
        until(ranks, draw.uniform(0, moment), lambda: False)
    if scenario in ("kill", "saving"):
        if target.code() is None:
            send(target.pid, signal.SIGKILL, "rank")
        return sent
    for turn in range(draw.randint(1, 4)):
        until(ranks, draw.uniform(0, 0.5) if turn else 0, lambda: False)
        target = draw.choice(ranks)
        if target.code() is None:
            send(target.pid, draw.choice(ASKED), "rank")
    return sent


def signals(words: list[str], out: Path, alone: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Signals at random moments until enough are sent, then to the end."""
    draw, counts = random.Random(args.seed), Counter[str]()
    tally = {"starts": 0, "runs": 0, "most_steps_lost": 0, "in_mid_save": 0, "before_joining": 0, "differ_by": 0.0}
    log = out.with_suffix(".log")
    while True:
        done = counts.total() >= args.signals
        scenario = draw.choice(SCENARIOS)
        keys = ["workers=1"] if scenario == "reader" else []
        saved_step, written = read_newest_step(out), identity(out)
        ranks = start([*words, *keys], args.ranks, log, fresh=tally["starts"] % args.fresh == args.fresh - 1)
        tally["starts"] += 1
        sent = [] if done else hit(scenario, ranks, out, draw, args.moment)
        before = saved_step if identity(out) == written else step_of(out)
        counts.update(sent)
        codes, killed = wait(ranks)
        tally["before_joining"] += killed
        tally["in_mid_save"] += scenario == "saving" and any((out / "checkpoints").glob(".step_????????.00000000.part"))
        newest = read_newest_step(out)
        if 75 in codes:
            tally["most_steps_lost"] = max(tally["most_steps_lost"], before - newest)
        if not set(codes) <= {0, 1, 75, -signal.SIGKILL} | {-number for number in ASKED}:
            raise SystemExit(f"{scenario}: exit codes {codes} after {sent}; see {log}")
        if all(code == 0 for code in codes):  # came to its end: once more from the beginning
            tally["runs"] += 1
            tally["differ_by"] = max(tally["differ_by"], distance(out, alone))
            check_steps(out)
            if done:
                return tally | {"signals": dict(counts), "sent": counts.total()}
            out.rename(out.with_name(f"{out.name}_finished_{tally['runs']}"))
        print(f"{counts.total()} signals, {scenario}: {sent}, codes {codes}, step {before}, saved {newest}", flush=True)


def elastic(words: list[str], out: Path, alone: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One link of the chain after the other; a rank is asked to stop when its share of the steps is done."""
    legs = []
    for index, link in enumerate(args.chain):
        ranks, stage = map(int, link.split(":"))
        processes = start([*words, f"engine.stage={stage}"], ranks, out.with_suffix(".log"))
        if index + 1 < len(args.chain):
            share = step_of(alone) * (index + 1) // len(args.chain)
            until(processes, 3600, lambda share=share: step_of(out) >= share)  # type: ignore[misc]
            processes[-1].send(signal.SIGUSR1)
        codes, _ = wait(processes, 3600)
        legs.append({"ranks": ranks, "stage": stage, "codes": codes, "saved": read_newest_step(out)})
    check_steps(out)
    losses = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows(out), rows(alone), strict=True))
    return {"chain": legs, "losses_differ_by": losses, "differ_by": distance(out, alone)}


def check_steps(out: Path) -> None:
    """Every step was done once."""
    done = [row["step"] for row in rows(out)]
    if done != list(range(1, len(done) + 1)):
        raise SystemExit(f"{out} has the steps {done}")


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
    parser.add_argument("--moment", type=float, default=6.0, help="[s] signals come this long after a start at most")
    parser.add_argument("--fresh", type=int, default=10, help="each how many-th start is not forked")
    parser.add_argument("--chain", nargs="+", default=["4:1", "2:3", "3:2", "1:0"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = next((Path(w.removeprefix("out=")) for w in args.words if w.startswith("out=")), None)
    if out is None or out.exists():
        parser.error("give out=FOLDER, one that is not there yet")
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [w for w in args.words if not w.startswith("out=")]
    alone, ranks = out.with_name(f"{out.name}_undisturbed"), args.ranks if args.drill == "signals" else 1
    if not (alone / "weights/last").exists():
        codes, _ = wait(start([*words, f"out={alone}"], ranks, out.with_suffix(".log")), 3600)
        if any(codes):
            raise SystemExit(f"the undisturbed run failed with {codes}; see {out.with_suffix('.log')}")
    result = (signals if args.drill == "signals" else elastic)([*words, f"out={out}"], out, alone, args)
    print(json.dumps(result))
    near = 0.0 if args.drill == "signals" else 2 * json.loads((out / "run.json").read_text())["config"]["optim"]["lr"]
    bounds = {"differ_by": near, "losses_differ_by": LOSSES, "most_steps_lost": 1}
    return int(any(result.get(key, 0) > most for key, most in bounds.items()))


if __name__ == "__main__":
    import deepspeed  # noqa: F401  # for all the forks

    sys.exit(main())
