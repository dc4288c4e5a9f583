"""utils/runs/lock.py: one owner at a time, named to the others, and nothing to clean up after it dies."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.errors import UserError
from utils.runs.lock import LOCK_FILE, lock
from utils.runs.progress import LOGGER

OWNER = """
import sys, time
from pathlib import Path
from utils.runs.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""

# Like the data loader's workers: a forked child that lives on when its parent is killed.
OWNER_WITH_CHILD = """
import os, sys, time
from pathlib import Path
from utils.runs.lock import lock
with lock(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    time.sleep(600)
"""

# Takes the lock as often as it can; the file `inside` shows whether anybody else is within at the same time.
RIVAL = """
import os, sys, time
from pathlib import Path
from utils.errors import UserError
from utils.runs.lock import lock
folder, wins, until = Path(sys.argv[1]), 0, time.monotonic() + 60
while wins < 20 and time.monotonic() < until:
    try:
        with lock(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            time.sleep(0.001)
            os.unlink(folder / "inside")
            wins += 1
        time.sleep(0.002)
    except UserError:
        time.sleep(0.001)
print(wins)
"""


def start(script: str, folder: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(120)
    process.stdout.close()


@pytest.mark.slow
def test_the_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    owner = start(OWNER, tmp_path)
    try:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught, lock(tmp_path):
            pass
    finally:
        kill(owner)
    message = str(caught.value)
    assert str(tmp_path) in message and f"process {owner.pid} on {socket.gethostname()}" in message and "\n" not in message


@pytest.mark.slow
def test_a_killed_owner_frees_the_folder(tmp_path: Path) -> None:
    for _ in range(3):
        owner = start(OWNER, tmp_path)
        assert owner.stdout.readline() == "held\n"
        kill(owner)
        assert f"{owner.pid} on " in (tmp_path / LOCK_FILE).read_text()
        with lock(tmp_path):
            assert f"{os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()


@pytest.mark.slow
def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_folder(tmp_path: Path) -> None:
    owner = start(OWNER_WITH_CHILD, tmp_path)
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(UserError, match=f"process {owner.pid} "), lock(tmp_path):
            pass
        kill(owner)
        os.kill(child, 0)  # still there
        with lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_child_that_ends_does_not_free_the_folder_of_its_parent(tmp_path: Path) -> None:
    with lock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        rival = start(OWNER, tmp_path)
        assert rival.stdout.readline() == ""
        assert rival.wait(120) == 1
        rival.stdout.close()


@pytest.mark.slow
def test_never_two_at_a_time(tmp_path: Path) -> None:
    rivals = [start(RIVAL, tmp_path) for _ in range(4)]
    assert [rival.communicate(timeout=120)[0] for rival in rivals] == ["20\n"] * 4


def test_a_second_time_in_one_process_is_refused(tmp_path: Path) -> None:
    with lock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on "), lock(tmp_path):
            pass
        with pytest.raises(UserError), lock(tmp_path):  # a refused attempt has not freed it
            pass
    with lock(tmp_path):
        pass


def test_an_error_frees_the_folder_and_the_file_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock(tmp_path / "new" / "run"):
        raise RuntimeError
    assert (tmp_path / "new" / "run" / LOCK_FILE).exists()
    with lock(tmp_path / "new" / "run"):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"1 on a\n2 on b\n", b"x" * 10_000, b"rm -rf on\x1b[31m here"])
def test_what_a_foreign_lock_file_says_is_not_repeated(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="which did not leave its name"), lock(tmp_path):
            pass
    assert path.read_bytes() == content
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_the_run_goes_on_with_a_warning(tmp_path: Path, monkeypatch, number: int) -> None:
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())

    def refuse(*arguments) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    LOGGER.addHandler(handler)
    try:
        with lock(tmp_path):
            pass
    finally:
        LOGGER.removeHandler(handler)
    assert len(lines) == 1 and str(tmp_path) in lines[0] and "\n" not in lines[0]


def test_other_errors_are_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "run"):
        with pytest.raises(UserError, match="cannot be locked"), lock(folder):
            pass
    assert (tmp_path / "file").read_text() == "x"

    def fail(*arguments) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(UserError, match="Input/output error"), lock(tmp_path):
        pass


def test_a_folder_set_aside_meanwhile_is_not_the_one_that_is_held(tmp_path: Path, monkeypatch) -> None:
    folder, flock, calls = tmp_path / "run", fcntl.flock, []

    def rename_first(descriptor: int, operation: int) -> None:
        if not calls:
            folder.rename(tmp_path / "run.old-1")
        calls.extend([descriptor] if operation & fcntl.LOCK_EX else [])
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    with lock(folder):
        assert len(calls) == 2
        with lock(tmp_path / "run.old-1"):  # not held any longer
            pass
        with pytest.raises(UserError), lock(folder):
            pass
