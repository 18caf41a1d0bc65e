"""The handler only sets a flag; a second Ctrl-C ends the process; the clock of a Slurm job counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hpc_neuro.core import distributed
from hpc_neuro.core.stop_signals import Stopped, StopSignals, stop_on_request, until_stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_is_remembered_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignals(60) as stop:
        assert stop.is_requested is False
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.is_requested is True
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_the_process():
    code = (
        "import os, signal, time; from hpc_neuro.core.stop_signals import StopSignals\n"
        "with StopSignals(0):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.1)\n"
        "    print('survived')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert "survived" not in done.stdout


def test_the_end_of_a_slurm_job_stops_in_time(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert StopSignals(margin=60).is_requested is False
    late = StopSignals(margin=120)
    assert late.is_requested is True
    assert "time limit" in late.reason


def test_the_walltime_of_the_config_counts_where_slurm_says_nothing(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert StopSignals(margin=120, walltime=3).is_requested is False
    assert StopSignals(margin=120, walltime=1).is_requested is True


def test_outside_the_main_thread_no_handler_is_installed():
    answers = []

    def work() -> None:
        with StopSignals(0) as stop:
            answers.append(distributed.any_rank(stop.is_requested, True, False))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [[False, True, False]]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_verb_inside_a_verb_hears_and_passes_on_what_was_asked():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        with StopSignals() as inner:
            assert inner.reason == "SIGUSR1"
    with StopSignals() as outer:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR2)
        assert outer.reason == "SIGUSR2"
        with pytest.raises(Stopped, match="75"):
            next(until_stopped([1]))


def test_a_reader_reads_until_the_verb_was_asked_to_stop():
    read = stop_on_request(lambda box: 2 * box)
    assert read(2) == 4
    with StopSignals():
        assert read(3) == 6
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            read(4)
    assert read(5) == 10


def test_a_signal_after_the_end_does_not_change_the_exit_code():
    code = (
        "import atexit, os, signal, sys; from hpc_neuro import cli\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "cli.main = lambda: 3\n"
        "sys.exit(cli.run_process())\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 3
