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
from hpc_neuro.pipeline import STAGES
from launch import slurm, status, submit
from launch.__main__ import main as launch
from launch.site import load_site

DEV_CLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "dev_cluster"
MODEL = ["student.depth=1", "student.channels=[4,4,8]", "crop.size=[8,32,32]", "optim.batch=2"]
QUIET = ["validate.crops=2", "tracker.wandb=offline", "tracker.every=5"]
STEPS = 500
FRESH = ["transfer.rule=scratch", "distill=null", "augment.warp=0"]


def print_line(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wait_until(event: str, holds: Callable[[], bool], seconds: float = 600) -> None:
    """Wait; raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {event}\n{subprocess.getoutput('squeue')}")
        time.sleep(0.3)


def wait_for_jobs(jobs: list[status.LaunchedJob], seconds: float = 3600) -> dict[str, status.JobStatus]:
    """Wait until all jobs have ended; their states."""
    poller, states = slurm.Poller(0.5, 10), dict[str, status.JobStatus]()

    def have_ended() -> bool:
        states.update(status.poll_jobs(jobs, poller))
        return all(state in status.ENDED for state in states.values())

    wait_until("jobs", have_ended, seconds)
    return states


def make_neurons(out: Path) -> Path:
    """The folder of four synthetic neurons."""
    if not (out / "raw").exists():
        write_dataset(out / "raw", SyntheticConfig(volumes=4, shape=(16, 64, 64)))
    return out / "raw"


def show_chain(out: Path) -> None:
    """Run the whole pipeline with one command."""
    begin = time.monotonic()
    train = [f"train.{key}" for key in [*MODEL, *QUIET, "optim.steps=20", "teacher.model=random"]]
    keys = [f"out={out / 'chain'}", f"prepare.images={make_neurons(out)}", "prepare.split.test=[syn_3,syn_4]"]
    keys += ["precompute.teacher.model=random", *train, "infer.trace.threshold=0.003", "infer.trace.root_snap=100"]
    keys += ["infer.block=[16,64,64]", "evaluate.draws=100", "cluster.infer.minutes=10"]
    options = ["--cluster", "dev", "--array", "2", "--watch"]
    code = launch(["--chain", ",".join(STAGES), *keys, *options])

    report = out / "chain" / "evaluate" / "report.html"
    presence = "is there" if report.exists() else "IS MISSING"
    print_line(f"chain: exit code {code}, {report} {presence}, {time.monotonic() - begin:.0f} s")


def show_interruptions(out: Path) -> None:
    """Interrupt a training five times or more, against an undisturbed one."""
    site = load_site("dev", ["partition=low", "max_requeue=12", "train.minutes=1", "signal_seconds=15"])
    store = out / "interrupted" / "store"
    launch(["prepare", f"images={make_neurons(out)}", f"out={store}", "--cluster", "dev", "--watch"])
    keys = [*MODEL, *QUIET, *FRESH, f"store={store}", f"optim.steps={STEPS}", f"validate.every={STEPS}"]
    keys += ["checkpoint.every=25", "checkpoint.margin=0"]
    calm_cfg, cfg = (submit.load_config("train", None, [*keys, f"out={store.parent / n}"]) for n in ("calm", "hit"))

    calm = submit.submit_verb("train", calm_cfg, load_site("dev", []))
    print_line(f"undisturbed: {wait_for_jobs(calm)}")
    (job,) = submit.submit_verb("train", cfg, site)
    interrupt(job)
    print_line(f"interrupted: {wait_for_jobs([job])}")

    for end in json.loads((job.out / "run.json").read_text())["ends"]:
        print_line(f"  start {end['start']}: {end['reason']}{', put back' if end['put_back'] else ''}")
    weights = [(out / "weights" / "last" / "model.safetensors").read_bytes() for out in (calm[0].out, job.out)]
    is_complete = list_steps(job.out) == list(range(1, STEPS + 1))
    print_line(f"  the same weights: {weights[0] == weights[1]}; each step once: {is_complete}")
    runs = list((job.out / "wandb").glob("offline-run-*"))
    ids = {path.name.rpartition("-")[2] for path in runs}
    print_line(f"  Weights & Biases: {len(runs)} folders of run {', '.join(ids)}")


def interrupt(job: status.LaunchedJob) -> None:
    """Requeue a training, preempt it, and kill one of its nodes."""
    ends = job.folder / "ends.json"

    def count_ends() -> int:
        return len(json.loads(ends.read_text())) if ends.exists() else 0

    wait_until("40 steps", lambda: len(list_steps(job.out)) > 40)
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    wait_until("the first end", lambda: count_ends() == 1)

    wait_until("80 steps", lambda: len(list_steps(job.out)) > 80)
    preempting = ["sbatch", "-Q", "-p", "main", "-N", "2", "--exclusive", "-o", "/dev/null", "--wrap=true"]
    subprocess.run(preempting, check=True)
    wait_until("the second end", lambda: count_ends() == 2)

    wait_until("120 steps", lambda: len(list_steps(job.out)) > 120)
    subprocess.run([DEV_CLUSTER / "node.sh", "kill", "node2"], check=True)
    wait_until("the job to leave", lambda: slurm.read_job_states().get(job.id) != "RUNNING")
    subprocess.run([DEV_CLUSTER / "node.sh", "start", "node2"], check=True)


def list_steps(out: Path) -> list[int]:
    """The training steps in the metrics of a run."""
    with contextlib.suppress(FileNotFoundError):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines if '"kind": "train"' in line and line.endswith("}")]
    return []


def show_array(out: Path, count: int = 1000) -> None:
    """Submit tasks that write a line; every tenth fails the first time."""
    site = load_site("dev", ["at_once=8"])
    folder, gate = out / "array", out / "array_gate"
    cfg = submit.load_config("infer", None, ["model=x", "store=y", f"out={folder}"])
    script = f'echo "$1" >> {out}/array_ran; case "$1" in *7,*) test -e {gate};; esac'
    for name in ("first", "second"):
        begin = time.monotonic()
        jobs = submit.submit_verb("infer", cfg, site, "slurm", [], None, count, ["sh", "-c", script, "share"])
        states = Counter(wait_for_jobs(jobs).values())
        arrays, longest = len(submit.list_arrays(jobs)), slurm.read_configuration()["MaxArraySize"]
        print_line(f"array, {name} time: {len(jobs)} tasks in {arrays} arrays of at most {longest}:")
        print_line(f"  {dict(states)}, {time.monotonic() - begin:.0f} s")
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


def show_refusals(out: Path) -> None:
    """Submit from the shell, each in a process of its own as a user would."""
    store, slowest, jobs_before = out / "refused" / "store", 0.0, len(slurm.read_job_states())
    prepare.run(load(prepare.PrepareConfig, None, [f"images={make_neurons(out)}", f"out={store}"]))
    fixed = [*FRESH, f"store={store}", "optim.batch=4", f"out={out / 'refused' / 'never'}", "--cluster", "dev"]

    for keys, site_keys, message in BAD:
        words = ["-m", "launch", "train", *fixed, *keys, *(f"cluster.{key}" for key in site_keys)]
        begin = time.monotonic()
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        seconds = time.monotonic() - begin
        slowest = max(slowest, seconds)
        is_refused = result.returncode == 2 and message in result.stderr
        verdict = "refused" if is_refused else f"NOT REFUSED: {result.stderr}"
        print_line(f"  {seconds:5.1f} s  {' '.join([*keys, *site_keys])}: {verdict}")

    left = len(slurm.read_job_states()) - jobs_before + (out / "refused" / "never").exists()
    print_line(f"refused: {len(BAD)} kinds, the slowest in {slowest:.1f} s; jobs and folders left: {left}")


PARTS = {
    "chain": show_chain,
    "interrupted": show_interruptions,
    "array": show_array,
    "refused": show_refusals,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[2:] or PARTS:
        PARTS[part](folder)
