"""One run per folder: a lock of the `filelock` library, with its owner's name in it for the others.

The library sees to one owner at a time, to a lock that the kernel takes back when its owner is killed, and to forked children
(a data loader's workers outlive a killed parent by some seconds) that do not hold it. What is added here: the owner is named
to whoever comes second, a folder that is set aside before its lock was got is not taken for the new one of that name, and
where the file system knows no locks the run goes on with a warning.
"""

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from utils.errors import UserError
from utils.runs.progress import LOGGER

LOCK_FILE = ".lock"
_OWNER = re.compile(r"[0-9]{1,10} on \S{1,255}")
_UNSUPPORTED = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds `folder` (made if need be) for this process; raises UserError if another run, or this one already, holds it.

    The file stays when the lock is given back or its owner is killed, and means nothing by itself.
    """
    held = FileLock(folder / LOCK_FILE, timeout=0, on_acquired=_write_owner)
    try:
        while not held.is_locked:
            folder.mkdir(parents=True, exist_ok=True)
            before = folder.stat()
            with suppress(FileNotFoundError):  # renamed in between
                held.acquire()
            if not (folder.exists() and os.path.samestat(before, folder.stat())):
                held.release()
    except Timeout as error:
        raise UserError(f"filepath: '{folder}' is in use by another run ({_owner(folder)}); wait for it to end, stop it, or "
                        "choose another folder.") from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise UserError(f"filepath: the folder '{folder}' cannot be locked ({error.strerror or error}); choose another "
                            "one.") from error
        LOGGER.warning(f"{folder}: its file system has no locks ({error.strerror}); see to it that no second run uses this "
                       "folder.")
    try:
        yield
    finally:
        held.release()


def _write_owner(descriptor: int) -> None:
    with suppress(OSError):  # on a full disk the lock holds all the same, its owner only goes unnamed
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _owner(folder: Path) -> str:
    with suppress(OSError):
        text = (folder / LOCK_FILE).read_bytes()[:512].decode("ascii", errors="replace").strip()
        if _OWNER.fullmatch(text):
            return f"process {text}"
    return "which did not leave its name"
