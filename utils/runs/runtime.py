"""The machine: device, threads, versions, memory, and where a run's log lines go."""

import importlib.metadata
import io
import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.runs import distributed
from utils.runs.files import cannot_write
from utils.runs.processes import launched, place
from utils.runs.progress import LOGGER, ConsoleHandler

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy", "scipy", "pydantic", "safetensors")


def pick_device(names: list[str]) -> tuple[torch.device, list[str]]:
    """This process's device for the config's `device` names, and warnings.

    "auto" takes the first CUDA device if there is one. A CUDA device on a machine without CUDA becomes the CPU, with one
    warning; a number beyond the machine's is refused. Of several processes that a launcher has started on this machine each
    takes the name at its place in the list, or, where the list has a single name, the CUDA device of its place.
    """
    _, _, number, processes = place()
    quoted, count = ", ".join(f"'{name}'" for name in names), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(names) > 1 and launched() and len(names) != processes:
        raise UserError(f"device: {quoted} are {len(names)} devices for the {processes} processes that were started on this "
                        'machine; start as many processes as devices, or leave it at "auto".')
    if names[0] == "cpu" or (names == ["auto"] and not count):
        return torch.device("cpu"), []
    if not count:
        return torch.device("cpu"), [f"device: {quoted} asked for, but this machine has no usable CUDA device; running on the "
                                     "CPU."]
    warnings = []
    numbers = [0 if name == "auto" else int(name.removeprefix("cuda:")) for name in names]
    if len(numbers) == 1 and processes > 1:
        if names != ["auto"]:
            warnings = [f"device: {quoted} asked for, but {processes} processes were started on this machine; they take "
                        f"'0' to '{processes - 1}'."]
        numbers = list(range(processes))
    if max(numbers) >= count:
        raise UserError(f"device: '{max(numbers)}' is not there; this machine has CUDA devices 0 to {count - 1}.")
    return torch.device("cuda", numbers[number]), warnings


def use_deterministic_algorithms() -> None:
    """From here on the same bits in every run on CUDA too; to be called before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed, "torch": torch.__version__}  # with the build, as in +cu130


def hardware(device: torch.device) -> dict[str, Any]:
    """What the run was computed on: this process's machine, and the device of every process by its rank."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    devices = distributed.gathered(str(device))
    return {"device": device.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "platform": platform.platform(), "processes": len(devices), "devices": devices,
            "machines": len(set(distributed.gathered(platform.node())))}


def environment() -> dict[str, str]:
    """The environment variables that can move numbers or speed, as far as they are set."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTHONHASHSEED")
    return {name: os.environ[name] for name in names if name in os.environ}


def code_version() -> dict[str, Any]:
    """Commit of this checkout and whether it had uncommitted changes; None where it is not a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    return {"commit": text.removesuffix("-dirty"), "dirty": text.endswith("-dirty")}


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given, so that a clock that is read then tells what it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak on CUDA; on the CPU the operating system only keeps the peak of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak: allocated on the CUDA device since the reset, or resident in this process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux: ru_maxrss would begin with what the parent process had
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


AT_THE_START = "before training has begun; lower image_size, take a smaller backbone, or set data_placement to \"lazy\"."
WITHIN_A_RUN = ("within a task; raise grad_accum (the same result in smaller parts), lower batch_size, or set data_placement "
                "to \"lazy\", then run the same command again: it goes on from the last checkpoint.")


@contextmanager
def memory_may_run_out(advice: str) -> Iterator[None]:
    """An error within that says memory has run out, on the CPU or on CUDA, becomes a UserError with this advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(f"Out of memory {advice}") from error
        raise


def log_to_console() -> None:
    """Sends log lines to stdout, each flushed; called once per process. Of several processes only the main one logs."""
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False
    if not distributed.is_main():
        LOGGER.addHandler(logging.NullHandler())
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without the check mark shows a question mark
    if not any(isinstance(handler, ConsoleHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(ConsoleHandler())


class _LogFile(logging.FileHandler):
    """A log line that cannot be written, as on a full disk, ends the run in the same way as any other file."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        raise cannot_write(Path(self.baseFilename), error) if isinstance(error, OSError) else error

    def close(self) -> None:
        with suppress(OSError):  # what is still buffered after a failed write fails again
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Appends log lines to `path` too, for the duration of one run only: every seed has a log of its own."""
    try:
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise cannot_write(path, error) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
