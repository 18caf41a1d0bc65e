"""The cluster part at work on the development cluster: `python tests/slurm/show.py OUT [PART]...`.

    chain         prepare -> precompute (2 MPI ranks) -> train (2 nodes, ZeRO-2) -> infer (array) -> evaluate
    interrupted   a training that meets scontrol requeue, a job of a higher partition, a killed node and time limits,
                  against an undisturbed one
    array         a thousand tasks, cut to a small MaxArraySize, some of which fail; then only those again
    refused       bad submissions of many kinds, from the shell

Prints what it measured. Needs `make slurm-up`; takes about 3, 8, 15 and 1 minutes on two cores.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hpc_neuro import prepare
from hpc_neuro.core.schema import load
from hpc_neuro.data.synthetic import SyntheticConfig, write_dataset
from launch import slurm, status, submit
from launch.__main__ import main as launch
from launch.site import load_site

HERE = Path(__file__).resolve().parent
MODEL = ["student.depth=1", "student.stem_channels=[4,4,8]", "crop.size=[8,32,32]", "optim.batch=2"]
QUIET = ["validate.crops=2", "tracker.wandb=offline", "tracker.every=5"]
STEPS = 500
FRESH = ["transfer.rule=scratch", "distill=null", "augment.warp=0"]


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def until(what: str, holds: Callable[[], bool], seconds: float = 600) -> None:
    """Wait; raises TimeoutError."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}\n{subprocess.getoutput('squeue')}")
        time.sleep(0.3)


def over(sent: list[status.LaunchedJob], seconds: float = 3600) -> dict[str, status.JobStatus]:
    """Wait for jobs; their states."""
    poller, states = slurm.Poller(0.5, 10), dict[str, status.JobStatus]()

    def ended() -> bool:
        states.update(status.poll_jobs(sent, poller))
        return all(s not in ("queued", "running") for s in states.values())

    until("jobs", ended, seconds)
    return states


def raw(out: Path) -> Path:
    """Four synthetic neurons."""
    if not (out / "raw").exists():
        write_dataset(out / "raw", SyntheticConfig(volumes=4, shape=(16, 64, 64)))
    return out / "raw"


def chain(out: Path) -> None:
    """The whole pipeline with one command."""
    begun = time.monotonic()
    train = [f"train.{key}" for key in [*MODEL, *QUIET, "optim.steps=20", "teacher.model=random"]]
    keys = [f"out={out / 'chain'}", f"prepare.images={raw(out)}", "prepare.split.test=[syn_3,syn_4]"]
    keys += ["precompute.teacher.model=random", *train, "infer.trace.threshold=0.003", "infer.trace.root_snap=100"]
    keys += ["infer.block=[16,64,64]", "evaluate.draws=100", "cluster.infer.minutes=10"]
    options = ["--cluster", "dev", "--array", "2", "--watch"]
    verbs = "prepare,precompute,train,infer,evaluate"
    code = launch(["--chain", verbs, *keys, *options])
    report = out / "chain" / "evaluate" / "report.html"
    there = "is there" if report.exists() else "IS MISSING"
    say(f"chain: exit code {code}, {report} {there}, {time.monotonic() - begun:.0f} s")


def interrupted(out: Path) -> None:
    """Five interruptions or more against none."""
    site = load_site("dev", ["partition=low", "max_requeue=12", "train.minutes=1", "signal_seconds=15"])
    store = out / "interrupted" / "store"
    launch(["prepare", f"images={raw(out)}", f"out={store}", "--cluster", "dev", "--watch"])
    keys = [*MODEL, *QUIET, *FRESH, f"store={store}", f"optim.steps={STEPS}", f"validate.every={STEPS}"]
    keys += ["checkpoint.every=25", "checkpoint.margin=0"]
    calm = submit.submit_verb(
        "train", submit.load_config("train", None, [*keys, f"out={store.parent / 'calm'}"]), load_site("dev", [])
    )
    say("undisturbed: " + str(over(calm)))
    (hit,) = submit.submit_verb(
        "train", submit.load_config("train", None, [*keys, f"out={store.parent / 'hit'}"]), site
    )
    ends = hit.folder / "ends.json"

    def count() -> int:
        return len(json.loads(ends.read_text())) if ends.exists() else 0

    def steps() -> int:
        with contextlib.suppress(FileNotFoundError):
            return (hit.out / "metrics.jsonl").read_text().count('"kind": "train"')
        return 0

    until("40 steps", lambda: steps() > 40)
    subprocess.run(["scontrol", "requeue", hit.id], check=True)
    until("the first end", lambda: count() == 1)
    until("80 steps", lambda: steps() > 80)
    subprocess.run(
        ["sbatch", "-Q", "-p", "main", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap=true"], check=True
    )
    until("the second end", lambda: count() == 2)
    until("120 steps", lambda: steps() > 120)
    subprocess.run([HERE / "dev_cluster" / "node.sh", "kill", "node2"], check=True)
    until("the job to leave", lambda: slurm.read_job_states().get(hit.id) != "RUNNING")
    subprocess.run([HERE / "dev_cluster" / "node.sh", "start", "node2"], check=True)
    say("interrupted: " + str(over([hit])))
    for end in json.loads((hit.out / "run.json").read_text())["ends"]:
        say(f"  start {end['start']}: {end['reason']}{', put back' if end['put_back'] else ''}")
    both = [(p / "weights" / "last" / "model.safetensors").read_bytes() for p in (calm[0].out, hit.out)]
    numbers = [
        json.loads(line)["step"]
        for line in (hit.out / "metrics.jsonl").read_text().splitlines()
        if '"kind": "train"' in line
    ]
    say(f"  the same weights: {both[0] == both[1]}; each step once: {numbers == list(range(1, STEPS + 1))}")
    ids = {p.name.rpartition("-")[2] for p in (hit.out / "wandb").glob("offline-run-*")}
    say(f"  Weights & Biases: {len(list((hit.out / 'wandb').glob('offline-run-*')))} folders of run {', '.join(ids)}")


def array_of_a_thousand(out: Path, count: int = 1000) -> None:
    """Tasks that write a line; every tenth fails the first time."""
    site = load_site("dev", ["at_once=8"])
    folder, gate = out / "array", out / "array_gate"
    cfg = submit.load_config("infer", None, ["model=x", "store=y", f"out={folder}"])
    script = f'echo "$1" >> {out}/array_ran; case "$1" in *7,*) test -e {gate};; esac'
    for name in ("first", "second"):
        begun = time.monotonic()
        sent = submit.submit_verb("infer", cfg, site, "slurm", [], None, count, ["sh", "-c", script, "share"])
        states = Counter(over(sent).values())
        arrays, most = len({job.id.partition("_")[0] for job in sent}), slurm.read_configuration()["MaxArraySize"]
        say(f"array, {name} time: {len(sent)} tasks in {arrays} arrays of at most {most}:")
        say(f"  {dict(states)}, {time.monotonic() - begun:.0f} s")
        gate.touch()


BAD = [  # keys of a training, keys of the site, part of the answer
    (["optim.batch=1"], [], "without any"),
    (["store=/nowhere"], [], "/nowhere"),
    (["checkpoint.keep=1000000000"], [], "free there"),
    (["distill={}", "cache=/nowhere"], [], "/nowhere"),
    (["optim.lrr=1"], [], "optim.lrr"),
    (["checkpoint.margin=300"], ["train.minutes=5"], "no time to work"),
    (["optim.steps=100000000"], ["teraflops=0.001"], "are all it gets"),
    ([], ["partition=gpus"], "no partition gpus"),
    ([], ["train.minutes=6000"], "limit of 60"),
    ([], ["train.nodes=3"], "at most 2"),
    ([], ["train.cpus_per_task=64"], "want 64 per node"),
    ([], ["train.memory_gb=100000"], "has nodes of"),
    ([], ["train.gpus_per_task=9"], "want 9 per node"),
    ([], ["train.gpus_per_task=1", "gres=gpu:a100"], "of type a100"),
    ([], ["train.gpus_per_task=1", "gpu_memory_gb=0.001"], "a GPU here has"),
    ([], ["constraint=a100"], "no node of main has a100"),
    ([], ["interface=ib9"], "no ib9 here"),
    ([], ["container=apptainer exec /nowhere/a.sif"], "a.sif does not exist"),
    ([], ["max_job=1"], "max_job"),
]


def refused(out: Path) -> None:
    """From the shell, each in a process of its own as a user would."""
    store, slowest, before = out / "refused" / "store", 0.0, len(slurm.read_job_states())
    prepare.run(load(prepare.PrepareConfig, None, [f"images={raw(out)}", f"out={store}"]))
    fixed = [*FRESH, f"store={store}", "optim.batch=4", f"out={out / 'refused' / 'never'}", "--cluster", "dev"]
    for keys, site, answer in BAD:
        words = ["-m", "launch", "train", *fixed, *keys, *(f"cluster.{key}" for key in site)]
        begun = time.monotonic()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        took = time.monotonic() - begun
        slowest = max(slowest, took)
        said = "refused" if done.returncode == 2 and answer in done.stderr else f"NOT REFUSED: {done.stderr}"
        say(f"  {took:5.1f} s  {' '.join([*keys, *site])}: {said}")
    left = len(slurm.read_job_states()) - before + (out / "refused" / "never").exists()
    say(f"refused: {len(BAD)} kinds, the slowest in {slowest:.1f} s; jobs and folders left: {left}")


SHOWN = {"chain": chain, "interrupted": interrupted, "array": array_of_a_thousand, "refused": refused}

if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    where.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or SHOWN:
        SHOWN[name](where)
