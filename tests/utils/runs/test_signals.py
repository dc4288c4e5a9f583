"""utils/runs/signals.py: the first signal is noted, the second ends the process, and what was there comes back."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers import ROOT
from utils.runs import signals as module
from utils.runs.signals import EXIT_STATUS, Signals, Stopped

ALL = list(EXIT_STATUS)

# Works in steps, finishes the one it is in, saves and says so.
LOOP = """
import sys, time
from utils.runs.signals import Signals, Stopped
try:
    with Signals() as signals:
        print("ready", flush=True)
        while signals.received is None:
            time.sleep(0.01)
        print("saved", flush=True)
        raise Stopped(signals.received)
except Stopped as stopped:
    sys.exit(stopped.exit_status)
"""

# After the first signal, a call that does not come back to the interpreter, as a flush to a slow disk does not.
STUCK = """
import hashlib, time
from utils.runs.signals import Signals
with Signals() as signals:
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("saving", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

# A data loader with workers, all in the process group that the signal is sent to.
LOADER = """
import sys, time
from torch.utils.data import DataLoader
from utils.runs.signals import Signals, Stopped, leave_to_parent

class Slow:
    def __len__(self):
        return 10_000
    def __getitem__(self, index):
        time.sleep(0.005)
        return index

try:
    with Signals() as signals:
        after = 0
        for number, batch in enumerate(DataLoader(Slow(), 4, num_workers=2, worker_init_fn=leave_to_parent)):
            if number == 3:
                print("ready", flush=True)
            after += signals.received is not None
            if after == 40:
                raise Stopped(signals.received)
except Stopped as stopped:
    print("saved", flush=True)
    sys.exit(stopped.exit_status)
"""


def start(script: str, **options) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "ready\n"
    return process


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and the rest of what was printed."""
    try:
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    return process.returncode, text


@pytest.mark.parametrize("number", ALL)
def test_the_first_signal_is_noted_and_nothing_else(number: signal.Signals) -> None:
    with Signals() as signals:
        assert signals.received is None
        signal.raise_signal(number)
        assert signals.received is number
        assert Stopped(signals.received).exit_status == {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 75}[number.name]


@pytest.mark.slow
@pytest.mark.parametrize("number", ALL)
def test_a_process_finishes_its_step_and_says_why_it_ended(number: signal.Signals) -> None:
    process = start(LOOP)
    process.send_signal(number)
    assert end_of(process) == (EXIT_STATUS[number], "saved\n")


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGINT)])
def test_the_second_signal_ends_the_process_within_a_call(first: signal.Signals, second: signal.Signals) -> None:
    process = start(STUCK)
    process.send_signal(first)
    assert process.stdout.readline() == "saving\n"
    time.sleep(2 * module.REPEAT_SECONDS)
    before = time.monotonic()
    process.send_signal(second)
    assert end_of(process) == (-second, "")  # a shell says 128 + number
    assert time.monotonic() - before < 5


def test_one_stop_sent_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the group and by a launcher that passes it on: the run must have its time to save all the same."""
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        signal.raise_signal(signal.SIGUSR1)

    monkeypatch.setattr(module, "REPEAT_SECONDS", 60.0)
    monkeypatch.setattr(module.time, "sleep", pause)
    with Signals() as signals:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert signals.received is signals.received is signal.SIGTERM
    assert len(pauses) == 1 and 50 < pauses[0] <= 60


def test_a_second_signal_ends_the_process_before_anybody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.0)
    monkeypatch.setattr(module.os, "_exit", ends.append)
    with Signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert ends == [130]


def test_after_a_look_the_kernel_has_the_next_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPEAT_SECONDS", 0.0)
    before = {number: signal.getsignal(number) for number in ALL}
    for number in ALL:
        with Signals() as signals:
            assert signals.received is None and {signal.getsignal(each) for each in ALL} == {signals._note}
            signal.raise_signal(number)
            assert signals.received is number and {signal.getsignal(each) for each in ALL} == {signal.SIG_DFL}
        assert {each: signal.getsignal(each) for each in ALL} == before


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        raise Stopped(signals.received)
    assert signal.getsignal(signal.SIGTERM) == before


def test_other_threads_change_nothing() -> None:
    seen = []

    def enter() -> None:
        with Signals() as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


@pytest.mark.slow
@pytest.mark.parametrize("number", ALL)
def test_workers_of_a_data_loader_outlive_a_signal_to_the_group(number: signal.Signals) -> None:
    process = start(LOADER, start_new_session=True)
    os.killpg(process.pid, number)
    assert end_of(process) == (EXIT_STATUS[number], "saved\n")
