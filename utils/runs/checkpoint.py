"""Checkpoints that are whole or not taken: numbered files, each with a checksum, the last few kept.

A file is a header (magic and version, bytes of payload, SHA-256 of name and payload) and what `torch.save` made of the state.
The checksum covers the name too, so that files swapped with each other are noticed. By hand, since no library goes back to an
older file where the newest is damaged.
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.runs.files import write_bytes

_HEADER, _MAGIC = struct.Struct("<8sQ32s"), b"GCLCKPT1"
_NAME = re.compile(r"checkpoint_(0|[1-9][0-9]*)\.ckpt")


class Checkpoints:
    """The checkpoints of one run in `folder`, of which the newest `keep` whole ones stay.

    Only the process that holds the folder's lock may use it.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        assert keep >= 1
        self.folder, self.keep = folder, keep
        self._damaged: set[int] = set()  # seen by `load`; they do not count among those that are kept

    def save(self, state: dict[str, Any]) -> Path:
        """Writes `state`, made of tensors and plain Python values, and then removes what is no longer needed.

        Raises TypeError for a state that could not be loaded again, and UserError if the file cannot be written; the
        older checkpoints are then as they were.
        """
        numbers = self._numbers()
        newest = max(numbers, default=0) + 1
        path, buffer = self._path(newest), io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        try:
            _unpacked(payload)  # better to learn it now than when the run is to go on
        except _Damaged as error:
            raise TypeError("a checkpoint holds tensors and plain Python values, under names") from error
        write_bytes(path, _header(path, payload) + payload)
        kept = [*(number for number in numbers if number not in self._damaged), newest][-self.keep:]
        self._remove(number for number in numbers if number not in kept)
        return path

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest whole state, on the CPU, None where there is no checkpoint; and a line for each damaged one that was
        stepped over.

        Raises UserError if there are checkpoints and none is whole.
        """
        lines = []
        for number in reversed(self._numbers()):
            try:
                return _read(self._path(number)), lines
            except _Damaged as error:
                self._damaged.add(number)
                lines.append(f"{self._path(number)}: {error}")
        if lines:
            raise UserError(f"{self.folder}: none of its checkpoints can be used ({'; '.join(lines)}); use --overwrite to "
                            "start over.")
        return None, []

    def remove_all(self) -> None:
        """Removes every checkpoint, the newest last."""
        self._remove(self._numbers())

    def _remove(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with suppress(OSError):  # what cannot be removed costs space and nothing else
                self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self.folder / f"checkpoint_{number}.ckpt"

    def _numbers(self) -> list[int]:
        """Numbers of the checkpoints that are there, ascending."""
        try:
            return sorted(int(match[1]) for name in os.listdir(self.folder) if (match := _NAME.fullmatch(name)))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be listed ({error.strerror or error}); mend its permissions or choose "
                            "another 'filepath'.") from error


class _Damaged(Exception):
    """What is wrong with a checkpoint, in a few words."""


def _read(path: Path) -> dict[str, Any]:
    """The state in `path`; raises _Damaged for anything but a whole checkpoint of this name."""
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise _Damaged("not a regular file")
        with open(path, "rb") as file:
            header, payload = file.read(_HEADER.size), file.read()
    except OSError as error:
        raise _Damaged(f"unreadable ({error.strerror or error})") from error
    if not header.startswith(_MAGIC):
        raise _Damaged("not a checkpoint" if header else "empty")
    if header != _header(path, payload):
        raise _Damaged("wrong checksum (cut short, changed, or a checkpoint of another name)")
    return _unpacked(payload)


def _unpacked(payload: bytes) -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds
        raise _Damaged(f"unreadable (not made of tensors and plain values: {type(error).__name__})") from error
    if not isinstance(state, dict):
        raise _Damaged(f"unreadable (a {type(state).__name__}, not named values)")
    return state


def _header(path: Path, payload: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, len(payload), hashlib.sha256(path.name.encode() + b"\n" + payload).digest())
