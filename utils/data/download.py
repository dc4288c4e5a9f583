"""Downloads of published files: whole or not at all, and given up where the network is silent."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

from torchvision.datasets import utils as downloads

from utils.errors import UserError

_TIMEOUT = 30.0  # seconds without an answer after which a download is given up


class DownloadFailed(Exception):
    """No address gave the file; the text says why the last one did not."""


def fetch(urls: Sequence[str], md5: str, folder: Path) -> Path:
    """The first of `urls` that answers, brought into `folder` under its own name, its MD5 checked; raises DownloadFailed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none: a silent network would be waited for without end
    try:
        for url in urls:
            name = url.rpartition("/")[2]
            try:
                downloads.download_url(url, str(folder), name, md5)
                return folder / name
            except (OSError, RuntimeError, HTTPException) as error:
                failed = error
    finally:
        socket.setdefaulttimeout(before)
    raise DownloadFailed(reason_of(failed)) from failed


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder beside what is to lie in `folder`, which is made: files that are renamed out of it are whole; it is removed.

    Raises UserError where `folder` cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place = TemporaryDirectory(prefix=".extract-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"data_path: '{folder}' cannot be written ({reason_of(error)}); choose another folder.") from error
    with place as name:
        yield Path(name)


def reason_of(error: BaseException) -> str:
    """The error in one line, its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
