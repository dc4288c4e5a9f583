"""utils/runs/files.py: old content or new content, never half of either, and no temporary file whatever goes wrong."""

import errno
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from utils.errors import UserError
from utils.runs import files
from utils.runs.files import write_bytes

# Files that may grow to so many bytes, no further: to a process the same as a disk that is full.
SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
from utils.errors import UserError
from utils.runs.files import write_bytes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
write_bytes(path, b"old")
for limit in (0, 1, 4096, 99_999):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_bytes(path, b"x" * 100_000)
    except UserError as error:
        message = str(error)
        assert message.startswith(f"{path}: ") and "free some space" in message and message.count("\\n") == 0, message
    else:
        raise SystemExit(f"written within {limit} bytes")
    assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == [path.name]
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
write_bytes(path, b"x" * 100_000)
assert path.read_bytes() == b"x" * 100_000
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content in (b"", b"first", b"x" * 3_000_000):
        write_bytes(path, content)
        assert path.read_bytes() == content and names(tmp_path) == ["a.bin"]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a.bin", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.bin").stat().st_mode) == 0o640


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path: Path, monkeypatch) -> None:
    seen = []
    fsync, replace = os.fsync, os.replace

    def record_flush(descriptor: int) -> None:
        seen.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else os.fstat(descriptor).st_size)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        seen.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_flush)
    monkeypatch.setattr(files.os, "replace", record_rename)
    write_bytes(tmp_path / "a.bin", b"12345")
    assert seen == [5, "rename", "folder"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("number, advice", [
    (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EFBIG, "free some space"),
    (errno.EROFS, "allow this user"), (errno.EACCES, "allow this user"), (errno.EIO, "choose another"),
])
def test_what_the_file_system_refuses_is_one_sentence(tmp_path: Path, monkeypatch, name, number, advice) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def refuse(*arguments) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, name, refuse)
    with pytest.raises(UserError, match=advice) as caught:
        write_bytes(path, b"new")
    assert str(caught.value).startswith(f"{path}: could not be written ({os.strerror(number)})")
    assert str(caught.value).count("\n") == 0 and "filepath" not in str(caught.value)  # commands without that key write too
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_no_error(tmp_path: Path, monkeypatch, number) -> None:
    fsync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse_folders)
    write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new"


def test_a_folder_whose_flush_fails_is_an_error(tmp_path: Path, monkeypatch) -> None:
    fsync = os.fsync

    def fail_on_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fail_on_folders)
    with pytest.raises(UserError, match="could not be written"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == ["a.bin"]


def test_an_interruption_leaves_no_temporary_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_places_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a.bin", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(UserError, match="could not be written"):
            write_bytes(path, b"x")
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == []


def test_writing_moves_no_random_stream(tmp_path: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    write_bytes(tmp_path / "a.bin", b"x")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_content(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SMALL_DISK, str(tmp_path / "a.bin")], cwd=ROOT, check=True, timeout=120)
