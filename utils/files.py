"""Files that no reader ever sees half-written: temporary name in the same folder, flush to disk, rename."""

import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from utils.errors import UserError

TEMPORARY_SUFFIX = ".part"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` so that `path` is at every moment either its old content or all of the new one."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX,
                                         delete=False) as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o666 & ~_umask())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror}); free some space or choose another "
                        "'filepath', then run the same command again.") from error


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON (NaN refused: readers of strict JSON must be able to load it)."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
