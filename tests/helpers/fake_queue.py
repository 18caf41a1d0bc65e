"""Programs that answer as those of PBS and LSF do, and run jobs as processes of this machine; no scheduler is there.

`install(folder)` writes qsub, qselect, qdel, bsub, bjobs and bkill into a folder for PATH. A job waits while the file
`hold` exists in the folder. What real schedulers do beyond that (limits, priorities, nodes) is not imitated.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

PROGRAMS = ("qsub", "qselect", "qdel", "bsub", "bjobs", "bkill")


def install(folder: Path) -> None:
    """Write the programs."""
    for program in PROGRAMS:
        path = folder / program
        path.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {folder} {program} "$@"\n')
        path.chmod(0o755)
    (folder / "jobs").mkdir()


def main(folder: Path, program: str, words: list[str]) -> int:
    """Answer one call."""
    (folder / "calls").open("a").write(f"{program} {' '.join(words)}\n")
    if program in ("qsub", "bsub"):
        return submit(folder, program, words)
    if program in ("qdel", "bkill"):
        return cancel(folder, program, words[0])

    jobs = [job for job in map(load, sorted((folder / "jobs").glob("*.json"))) if is_alive(job)]
    for option, key in (("-N", "name"), ("-J", "name")):
        if option in words:
            jobs = [job for job in jobs if job[key] == words[words.index(option) + 1]]
    waiting = (folder / "hold").exists()
    if program == "qselect":
        if "-s" in words and not waiting:
            jobs = []
        print("\n".join(job["id"] for job in jobs))
        return 0
    if not jobs:
        print("No unfinished job found", file=sys.stderr)
        return 255
    print("\n".join(f"{job['id']} {'PEND' if waiting else 'RUN'}" for job in jobs))
    return 0


def submit(folder: Path, program: str, words: list[str]) -> int:
    """Start the script, which comes last, in a session of its own."""
    if "nowhere" in words:
        print(f"{program}: Unknown queue nowhere", file=sys.stderr)
        return 1
    number = str(len(list((folder / "jobs").glob("*.json"))) + 100)
    job = f"{number}.server" if program == "qsub" else number
    variable = "PBS_JOBID" if program == "qsub" else "LSB_JOBID"
    earlier = [load(folder / "jobs" / f"{earlier}.json") for earlier in list_dependencies(words)]
    wait = (
        "".join(
            f"while [ ! -e {other['exit']} ] && kill -0 {other['pid']}; do sleep 0.05; done; "
            f"[ $(cat {other['exit']}) = 0 ] || exit 1; "
            for other in earlier
        )
        + f"while [ -e {folder}/hold ]; do sleep 0.05; done; exec /bin/bash {words[-1]}"
    )
    # As PBS does, and unlike LSF, the job gets none of the submitter's variables but its path.
    child = subprocess.Popen(
        ["/bin/sh", "-c", wait],
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), variable: job},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    name = words[words.index("-N" if program == "qsub" else "-J") + 1]
    # The script leaves its exit code beside it.
    record = {"id": job, "name": name, "pid": child.pid, "exit": words[-1].removesuffix(".sh") + ".exit"}
    (folder / "jobs" / f"{number}.json").write_text(json.dumps(record))
    print(job if program == "qsub" else f"Job <{job}> is submitted to default queue <normal>.")
    return 0


def list_dependencies(words: list[str]) -> list[str]:
    """The numbers of the jobs that must end well first: of `-W depend=afterok:12.server`, or of `-w done(12)`."""
    text = next((word for word in words if word.startswith("depend=afterok:") or "done(" in word), "")
    return re.findall(r"[:(](\d+)", text)


def cancel(folder: Path, program: str, job: str) -> int:
    """Send SIGTERM to all processes of a job."""
    record = load(folder / "jobs" / f"{job.partition('.')[0]}.json")
    if not is_alive(record):
        print(f"{program}: Job has finished {job}", file=sys.stderr)
        return 35
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(record["pid"]), signal.SIGTERM)
    return 0


def load(path: Path) -> dict[str, str]:
    """The record of a job."""
    record: dict[str, str] = json.loads(path.read_text())
    return record


def is_alive(job: dict[str, str]) -> bool:
    """Whether its shell runs."""
    try:
        return Path(f"/proc/{job['pid']}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
