"""One run per folder: a lock that the kernel holds for its owner, and takes back when the owner dies."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError
from utils.runs.progress import LOGGER

LOCK_FILE = ".lock"
_OWNER = re.compile(r"[0-9]{1,10} on \S{1,255}")
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})
_ATTEMPTS = 10

# Descriptors that hold a lock. A child keeps its parent's locks alive for as long as it has the descriptors, and the data
# loader's workers outlive a killed parent by some seconds: so every forked child closes them. That frees nothing, since a
# flock is only gone with its last descriptor.
_HELD: set[int] = set()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be) for this process; raises UserError if another run, or this one already, holds it.

    The file stays when the lock is given back or its owner is killed, and means nothing by itself: deleting it would let
    two processes hold the same folder, one waiting on the deleted file, one on a new file of the same name. Where the file
    system knows no locks, one warning is logged and the run goes on without.
    """
    descriptor = _acquire(folder)
    _HELD.add(descriptor)
    try:
        _write_owner(descriptor, f"{os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        if descriptor in _HELD:  # not so in a forked child
            _HELD.remove(descriptor)
            _write_owner(descriptor, "")
            os.close(descriptor)


def _acquire(folder: Path) -> int:
    """An open descriptor that holds the lock, or, after a warning, one that does not where there are no locks."""
    path = folder / LOCK_FILE
    for _ in range(_ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(f"filepath: the folder '{folder}' cannot be locked ({error.strerror or error}); choose another "
                            "one.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            owner = _read_owner(descriptor)
            os.close(descriptor)
            raise UserError(f"filepath: '{folder}' is in use by another run ({owner}); wait for it to end, stop it, or choose "
                            "another folder.") from error
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                LOGGER.warning(f"{folder}: its file system has no locks ({error.strerror}); see to it that no second run uses "
                               "this folder.")
                return descriptor
            os.close(descriptor)
            raise UserError(f"filepath: the folder '{folder}' cannot be locked ({error.strerror or error}); choose another "
                            "one.") from error
        os.close(descriptor)
    raise UserError(f"filepath: the folder '{folder}' cannot be locked (its {LOCK_FILE} is replaced again and again); choose "
                    "another one.")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the locked file is still the one at `path`: the folder may have been set aside before the lock was got."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_owner(descriptor: int, text: str) -> None:
    with suppress(OSError):  # on a full disk the lock holds all the same, its owner only goes unnamed
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _read_owner(descriptor: int) -> str:
    with suppress(OSError):
        text = os.pread(descriptor, 512, 0).decode("ascii", errors="replace").strip()
        if _OWNER.fullmatch(text):
            return f"process {text}"
    return "which did not leave its name"


def _forget_in_child() -> None:
    for descriptor in _HELD:
        with suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_in_child)
