"""Random SIGKILLs of the ranks and the launcher of an inference, until it ends; is the output that of a quiet run?

    python -m tests.faults.kill_infer [--kills 100] [--ranks 4] [--seed 0] [--folder FOLDER] [--parts]

A tiny student with random weights over two random volumes of 54 blocks in all, which are traced (--parts: in
super-blocks of one block) and looked at again in a mirror. Each start is killed after a random time (one rank, or
mpiexec with all of them), in any stage, until the wanted number of kills has struck; then it is left alone. Last line:
JSON with the number of kills, of starts, of blocks and of parts of the tracing that were done when each struck, whether
all files are equal byte for byte (`differs` names some that are not), and whether `infer verify` finds nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

import hpc_neuro
from hpc_neuro.core import run_folder
from hpc_neuro.infer import verify
from hpc_neuro.models.student import save_student
from tests.helpers.bright_student import CONFIG, build_bright_student
from tests.helpers.journal import change_lines, list_times

_SHAPE = (24, 160, 170)
_WINDOW = (8, 32, 32)


def main() -> int:
    """Run the drill; exit code 1 when anything differs."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--kills", type=int, default=100)
    ask.add_argument("--ranks", type=int, default=4)
    ask.add_argument("--seconds", type=float, default=1e9, help="stop killing after this long")
    ask.add_argument("--seed", type=int, default=0, help="of what is killed, and when")
    ask.add_argument("--folder", type=Path, help="for both runs; none: a temporary one, removed when all is well")
    ask.add_argument("--parts", action="store_true", help="trace in super-blocks of one block")
    args = ask.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill_infer_"))
    facts = drill(folder, args.kills, args.ranks, args.seconds, seed=args.seed, in_parts=args.parts)
    print(json.dumps(facts))
    if not facts["equal"] or not facts["verified"]:
        print(f"both runs are kept in {folder}", file=sys.stderr)
        return 1
    if args.folder is None:
        shutil.rmtree(folder)
    return 0


def drill(
    folder: Path,
    kills: int,
    ranks: int,
    seconds: float = 1e9,
    shape: tuple[int, int, int] = _SHAPE,
    seed: int = 0,
    in_parts: bool = False,
) -> dict[str, object]:
    """Kill until `kills` have struck, then finish; compare with one undisturbed run."""
    folder = folder.resolve()
    keys = [*_write_inputs(folder, shape), *(["trace.super_block=[1,1,1]"] if in_parts else [])]
    quiet, killed, code = folder / "quiet", folder / "killed", snapshot_code(folder / "code")
    subprocess.run(command(quiet, keys, 1), check=True, capture_output=True, cwd=code)
    draw, struck, starts, begun = random.Random(seed), 0, 0, time.monotonic()
    when: list[tuple[int, int]] = []
    while struck < kills and time.monotonic() - begun < seconds:
        process = subprocess.Popen(
            command(killed, keys, ranks),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd=code,
        )
        starts += 1
        # after few or many more blocks or parts, so that every stage is met
        target = sum(_count_done(killed)) + draw.choice((0, 1, 2, 8, 30))
        while process.poll() is None and sum(_count_done(killed)) < target:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.3)
        victims = _find_ranks(process.pid)
        if process.poll() is None and victims:
            whole = draw.random() < 0.3
            for pid in [process.pid] if whole else [draw.choice(victims)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    struck += 1
            when.append(_count_done(killed))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        with contextlib.suppress(ProcessLookupError):  # ranks that a killed launcher left behind
            os.killpg(process.pid, signal.SIGKILL)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.returncode == 0:  # done before it was struck: begin again with what is there but some blocks
            _forget_some(killed, draw)
    subprocess.run(command(killed, keys, ranks), check=True, capture_output=True, cwd=code)
    faults, want, have = verify.check(killed), contents(quiet), contents(killed)
    return {
        "kills": struck,
        "starts": starts,
        "ranks": ranks,
        "done_at_kills": when,
        "equal": want == have,
        "differs": sorted(name for name in want | have if want.get(name) != have.get(name))[:20],
        "verified": not faults,
        "seconds": round(time.monotonic() - begun),
    }


def contents(out: Path) -> dict[str, bytes]:
    """Every byte of the results."""
    kinds = ("*.ome.zarr/**/*", "swc/**/*", "proofread/*", "predictions.json")
    return {p.relative_to(out).as_posix(): p.read_bytes() for k in kinds for p in out.glob(k) if p.is_file()}


def command(out: Path, keys: list[str], ranks: int) -> list[str]:
    """The inference, on so many MPI ranks."""
    launcher = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    return [*launcher, sys.executable, "-m", "hpc_neuro", "infer", f"out={out}", *keys]


def snapshot_code(code: Path) -> Path:
    """A copy of the package to run from: trees name the version of the code, which may change under a long drill."""
    package = Path(hpc_neuro.__file__).parent
    shutil.copytree(package, code / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (code / run_folder.VERSION_FILE).write_text(run_folder.code_version())
    return code


def write_bright_student(folder: Path) -> None:
    """The student that calls bright voxels neurite, as `train` would save it."""
    extra = {"window": list(_WINDOW), "threshold": 0.5}
    save_student(folder, CONFIG, build_bright_student().state_dict(), extra)


def _write_inputs(folder: Path, shape: tuple[int, int, int]) -> list[str]:
    write_bright_student(folder / "model")
    draw, names = np.random.default_rng(0), ("a", "b")
    for name in names:
        image = draw.integers(0, 20, shape, dtype=np.uint8)
        for y in draw.integers(8, shape[1] - 8, 6):  # neurites along x
            z = draw.integers(4, shape[0] - 4)
            image[z - 2 : z + 3, y - 2 : y + 3] = draw.integers(150, 250, (5, 5, shape[2]))
        tifffile.imwrite(folder / f"{name}.tif", image, photometric="minisblack", metadata={"axes": "ZYX"})
    volumes = ", ".join(f"{{image: {folder / name}.tif, voxel_size: [1, 1, 1]}}" for name in names)
    blocks = ["block=[8,64,64]", "chunk=[8,32,32]", "trace.block=[24,64,64]", "flips=[flip_x]"]
    return [f"model={folder / 'model'}", f"inputs=[{volumes}]", *blocks, "deaths=1000"]


def _count_done(out: Path) -> tuple[int, int]:
    """How many blocks are predicted; how many parts of the tracing are done."""
    return len(list_times(out)), sum(1 for _ in out.glob("strands/**/[!.]*.npz"))


def _find_ranks(launcher: int) -> list[int]:
    """The processes below mpiexec that run Python, found by their parents."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_text().rpartition(")")
            parents[int(head.split()[0])] = int(rest.split()[1])
    below = {launcher}
    while more := {p for p, above in parents.items() if above in below} - below:
        below |= more
    ids = []
    for pid in sorted(below - {launcher}):
        with contextlib.suppress(OSError):
            if b"hpc_neuro" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                ids.append(pid)
    return ids


def _forget_some(out: Path, draw: random.Random) -> None:
    """Undo a finished run in part, so that there is something to be killed in again."""
    blocks = sorted(list_times(out))
    lost = set(draw.sample(blocks, len(blocks) * 3 // 4))
    change_lines(
        out, lambda r: r.kind == "shard" or (r.kind == "block" and (r.group, r.name) in lost), lambda line, record: b""
    )
    (out / "predictions.json").unlink(missing_ok=True)
    shutil.rmtree(out / "entries", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
