"""The processes of one run: which of them this one is, and starting them from the plain command.

`torchrun`, `accelerate launch`, `docs/slurm.sh` and `start` tell every process its place in the same environment variables;
without them a run is one process. `start` is kept by hand since no launcher passes on every signal, waits as long as a save
takes and gives back the status of the process that failed first. Standard library only until several CUDA devices are asked
for, so that a command line can ask before it loads torch. What the processes say to each other is in distributed.py.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import NamedTuple

from utils.errors import UserError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
GRACE_SECONDS = 10.0  # for the others to notice that one process has failed; they cannot go on, and what is saved is whole


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


def start(processes: int, command: list[str]) -> int:
    """Runs `command` in so many processes of this machine, and passes every signal on to them.

    Returns 0, or the exit status of the process that failed first: the others fail because of it, with another one.
    """
    if sys.platform != "linux":  # whose epoll it is that tells which failed first
        raise UserError("device: only on Linux are several processes started by the plain command; use torchrun "
                        f"--nproc_per_node={processes}.")
    environment = {**os.environ, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it goes by the host's name, which may not resolve
    children: list[subprocess.Popen] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children:
            child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        with selectors.EpollSelector() as running:
            for rank in range(processes):
                # In a session of its own: a terminal's Ctrl-C would reach it twice, from the terminal and from here.
                child = subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                         stdin=subprocess.DEVNULL, start_new_session=True)
                # At once, long before it can end: epoll tells in which order what it knows has ended.
                running.register(os.pidfd_open(child.pid), selectors.EVENT_READ, rank)
                children.append(child)
                for number in received:
                    child.send_signal(number)
            return _wait(children, running, received)
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


def _wait(children: list[subprocess.Popen], running: selectors.EpollSelector, received: list[int]) -> int:
    """Waits for all; after the first failure the others get `GRACE_SECONDS`. Returns the first status that is not 0.

    Which failure is the first is for the kernel to say: on a busy machine several processes have ended by the time this one
    runs again. A process's descriptor in `running` becomes ready when it ends, and epoll hands them out in that order.
    """
    first, deadline = 0, None
    while running.get_map():
        ended = running.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if not ended:
            for child in children:
                child.kill()
            deadline = None
        for key, _ in ended:
            running.unregister(key.fileobj)
            os.close(key.fileobj)
            status = children[key.data].wait()
            if status and not first:
                first, deadline = status if status > 0 else 128 - status, time.monotonic() + GRACE_SECONDS
                if status < 0 and -status not in received:
                    print(f"error: Process {key.data} of the run was killed by {signal.Signals(-status).name}; run the same "
                          "command again: it goes on from the last checkpoint.", file=sys.stderr)
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
