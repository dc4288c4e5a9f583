"""Files that no reader ever sees half-written: temporary name in the same folder, flush to disk, rename."""

import errno
import hashlib
import io
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from utils.errors import UserError

TEMPORARY_SUFFIX = ".part"
_ADVICE = dict.fromkeys([errno.ENOSPC, errno.EDQUOT, errno.EFBIG], "free some space or ") | dict.fromkeys(
    [errno.EACCES, errno.EPERM, errno.EROFS], "allow this user to write there or ")
_CANNOT_FLUSH = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM})


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that `path` is at every moment either its old content or all of the new one.

    The folder is flushed too: once this returns, a power cut takes neither the file nor its name. Whatever goes wrong, no
    temporary file stays; what the file system refuses (full, over quota, read-only) is a UserError of one sentence.
    """
    # The name comes from the operating system's randomness: none of the run's random streams may move.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # after closing, which is where a network file system may refuse
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a file that the file system refuses."""
    return UserError(f"{path}: could not be written ({error.strerror or error}); {_ADVICE.get(error.errno, '')}choose "
                     "another folder, then run the command again.")


def write_json(path: Path, value: Any, compact: bool = False) -> None:
    """`value` as JSON (NaN refused: readers of strict JSON must be able to load it), indented or, `compact`, on one line."""
    layout = {"separators": (",", ":")} if compact else {"indent": 1}
    write_bytes(path, (json.dumps(value, ensure_ascii=False, allow_nan=False, **layout) + "\n").encode())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sealed_json(path: Path, value: dict[str, Any], compact: bool = False) -> None:
    """`write_json` with a key `sha256` over everything else, so that a damaged file is noticed."""
    write_json(path, {**value, "sha256": _seal(value)}, compact)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote, without its `sha256`; raises UserError for a file that is not whole."""
    try:
        value = json.loads(path.read_bytes())
        if value.pop("sha256") != _seal(value):
            raise ValueError("its checksum does not fit")
        return value
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore a copy, or start its run over with --overwrite.") from error


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_torch(path: Path, value: Any) -> None:
    """`value`, made of tensors and plain Python values, for `torch.load(path)` with its safe default."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getvalue())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Named tensors with text metadata, as safetensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, _sorted_metadata(safetensors_bytes(plain, metadata=dict(metadata))))


def remove_leftovers(folder: Path) -> None:
    """Deletes temporary files that a killed process left in `folder`."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _sorted_metadata(data: bytes) -> bytes:
    """The same safetensors file with its metadata in order: the library's order is random, and equal runs should leave
    equal files."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size
    return data[:8] + text + data[8 + size:]


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` last, on file systems that can be asked to."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
