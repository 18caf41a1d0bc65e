"""Questions to Slurm: one call for all jobs, repeated ever more rarely while nothing changes."""

from __future__ import annotations

import functools
import getpass
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence

from hpc_neuro.core.schema import InputError

_WORDS = {"PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUED", "PREEMPTED"}
_RANGE = re.compile(r"^(\d+)_\[([\d,\-]+)")


def ask(*words: str, timeout: float = 30.0) -> str:
    """Output of a Slurm command. Raises InputError with what it said when it fails or is not there."""
    if shutil.which(words[0]) is None:
        raise InputError(
            f"{words[0]} is not on this machine; submit from a login node of the cluster, or use --on local"
        )
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"`{' '.join(words)}` did not answer in {timeout:.0f} s; is the Slurm controller up?"
        ) from None
    if "Could not establish a configuration source" in done.stderr:
        raise InputError(
            f"`{words[0]}` is here but knows no cluster; set SLURM_CONF to a slurm.conf, submit from a login node, or "
            "use --on local"
        )
    if done.returncode:
        raise InputError(f"`{' '.join(words)}` failed: {' '.join(done.stderr.split()) or done.returncode}")
    return done.stdout


def fields(line: str) -> dict[str, str]:
    """One line of `scontrol show -o` as field -> value."""
    found: dict[str, str] = {}
    for part in line.split():
        name, equals, value = part.partition("=")
        if equals:
            found.setdefault(name, value)
    return found


def reach(seconds: float = 5.0) -> None:
    """Raise InputError when there is no Slurm here, or no controller that answers in time."""
    try:
        ask("scontrol", "ping", timeout=seconds)
    except InputError as error:
        said = str(error).removesuffix("failed: 1")
        raise InputError(f"{said.strip()}: the Slurm controller is down" if said != str(error) else said) from None


@functools.cache
def configuration() -> dict[str, str]:
    """`scontrol show config`, by name."""
    pairs = (line.partition("=") for line in ask("scontrol", "show", "config").splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def states() -> dict[str, str]:
    """State of every job of this user that Slurm still knows, array tasks one by one (JOB_INDEX). One call."""
    text = ask("squeue", "--noheader", "--user", getpass.getuser(), "--states", "all", "--format", "%i|%T")
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, _, state = line.strip().partition("|")
        for one in expand(name):
            found[one] = state
    return found


def expand(name: str) -> list[str]:
    """`12_[0-2,5%4]` -> 12_0 12_1 12_2 12_5; anything else is itself."""
    match = _RANGE.match(name)
    if match is None:
        return [name]
    found = []
    for part in match[2].split(","):
        low, _, high = part.partition("-")
        found += [f"{match[1]}_{i}" for i in range(int(low), int(high or low) + 1)]
    return found


def active(state: str) -> bool:
    """Whether a job in this state runs or will run."""
    return state in _WORDS


class Poller:
    """Asks for all jobs at once; the pause doubles while nothing changes and when Slurm does not answer."""

    def __init__(
        self,
        first: float = 2.0,
        longest: float = 60.0,
        read: Callable[[], dict[str, str]] = states,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """first, longest: [s] pauses."""
        self.first, self.longest, self.pause = first, longest, 0.0
        self.sleep, self._read, self._last = sleep, read, dict[str, str]()
        self.failures = 0

    def states(self, wanted: Sequence[str]) -> dict[str, str]:
        """State of the wanted ids; one that Slurm does not know (any more) is missing. Waits first, if need be.

        Raises InputError after six calls in a row that Slurm did not answer.
        """
        if self.pause:
            self.sleep(self.pause)
        try:
            found = self._read()
        except InputError:
            self.failures += 1
            if self.failures > 5:
                raise
            self.pause = min(self.longest, 2 * max(self.pause, self.first))
            return {k: v for k, v in self._last.items() if k in set(wanted)}
        self.failures = 0
        now = {k: found[k] for k in wanted if k in found}
        self.pause = self.first if now != self._last or not self.pause else min(self.longest, 1.5 * self.pause)
        self._last = now
        return now
