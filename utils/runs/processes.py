"""The processes of one run: which of them this one is, and starting them from the plain command.

`torchrun`, `accelerate launch`, `docs/slurm.sh` and `start` tell every process its place in the same environment variables;
without them a run is one process. Standard library only until several CUDA devices are asked for, so that a command line
can ask before it loads torch. What the processes say to each other is in utils/runs/distributed.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import FrameType
from typing import NamedTuple

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MAIN = Path(__file__).resolve().parents[2] / "main.py"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_GRACE_SECONDS = 10.0  # for the others to notice that one process has failed; they cannot go on, and what is saved is whole


class Place(NamedTuple):
    """Which process of the run this is: `rank` of `processes`, and `local_rank` of `local_processes` on this machine."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int


def place() -> Place:
    """This process's place, as its launcher set it."""
    if not launched():
        return Place(0, 1, 0, 1)
    rank, processes, local_rank = (int(os.environ[name]) for name in _NAMES)
    return Place(rank, processes, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", processes)))


def launched() -> bool:
    """Whether a launcher has started this process and decided on the number of processes."""
    return all(name in os.environ for name in _NAMES)


def processes_to_start(devices: list[str]) -> int:
    """How many processes the plain command starts for the config's `device`; 1 where the run stays in this process, which
    then also says what is wrong with a list that does not fit the machine."""
    if launched() or len(devices) == 1:
        return 1
    if devices[0] != "cpu":
        import torch

        if not torch.cuda.is_available() or max(map(int, devices)) >= torch.cuda.device_count():
            return 1
    return len(devices)


def start(processes: int, options: Namespace, config: str) -> int:
    """Runs main.py on the file `config` in so many processes of this machine, with the command line's other `options`.

    Returns 0, or the exit status of the first process that failed. Unlike torchrun it passes on every signal, SIGUSR1 too,
    waits as long as a save takes, and gives back the processes' own exit status.
    """
    environment = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it goes by the host's name, which may not resolve
    command = [sys.executable, str(_MAIN), "--config", config, *_passed_on(options)]
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        for rank in range(processes):
            # In a session of its own: a terminal's Ctrl-C would reach it twice, from the terminal and from here.
            children.append(subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                             stdin=subprocess.DEVNULL, start_new_session=True))
            for number in received:
                children[-1].send_signal(number)
        return _wait(children, received)
    finally:
        for child in children:
            child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def speaks() -> bool:
    """Whether it falls to this process to report its error: of all processes that fail, only the first one does.

    Before they have joined that is the first on each machine.
    """
    if place().processes == 1:
        return True
    if not _joined():
        return place().local_rank == 0
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return _get_default_store().add("failures", 1) == 1
    except Exception:  # its keeper is gone, so somebody has failed before
        return False


def leave(status: int) -> int:
    """Ends this process's part in the run; returns `status` where the process may end in the usual way.

    After a failure the others may be in the middle of a message to this one; tearing the connections down could wait for
    them, so the process just ends.
    """
    if _joined():
        if status:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status)
        from accelerate import PartialState

        PartialState().destroy_process_group()
    return status


def _joined() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def _passed_on(options: Namespace) -> list[str]:
    """The command line again, without its configs."""
    lists = [part for key in ("seed", "device") if (value := getattr(options, key)) is not None
             for part in (f"--{key}", *map(str, value))]
    sets = [part for text in options.overrides for part in ("--set", text)]
    return [*lists, *sets, *(["--overwrite"] if options.overwrite else [])]


def _wait(children: list[subprocess.Popen], received: list[int]) -> int:
    """Waits for all; after the first failure the others get `_GRACE_SECONDS`. Returns the first status that is not 0."""
    first, deadline = 0, float("inf")
    running = dict(enumerate(children))
    while running:
        time.sleep(0.05)
        for rank, child in list(running.items()):
            status = child.poll()
            if status is None:
                if time.monotonic() > deadline:
                    child.kill()
                continue
            del running[rank]
            if status and not first:
                first, deadline = status if status > 0 else 128 - status, time.monotonic() + _GRACE_SECONDS
                if status < 0 and -status not in received:
                    print(f"error: Process {rank} of the run was killed by {signal.Signals(-status).name}; run the same "
                          "command again: it goes on from the last checkpoint.", file=sys.stderr)
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
