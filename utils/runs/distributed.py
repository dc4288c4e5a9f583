"""Which images each process of a data-parallel run sees, and what they say to each other, over Hugging Face Accelerate.

In a run of one process every function here does nothing, or only calls what it is given. In a run of several, all processes
must call the same functions in the same order; a process that fails leaves, and the others then fail in their next call.
Values that people read or decisions rest on travel between processors (gloo), gradients between the devices (NCCL on CUDA).
"""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.errors import UserError
from utils.runs.processes import leave, place, speaks

T = TypeVar("T")
_PATIENCE = timedelta(hours=2)  # for the slowest thing that others wait for: a download, a large set decoded by one process


def join(device: torch.device) -> None:
    """Connects the processes that a launcher has started; `device` is this one's."""
    if place().processes == 1 or _joined():
        return
    from accelerate import PartialState

    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)  # else it takes the one of the local rank
    backend = {"backend": "cuda:nccl,cpu:gloo"} if on_cuda else {}
    try:
        with _connection():
            PartialState(cpu=not on_cuda, timeout=_PATIENCE, **backend)
    except (NotImplementedError, ValueError) as error:  # a variable is missing, or this GPU's NCCL needs one
        raise UserError(" ".join(str(error).split())) from error
    sys.excepthook = _fail  # after torch has put its own


def accelerate_state() -> None:
    """Makes sure that Accelerate knows which process this is, which its trackers ask for.

    In a run of one process that must not connect anything, also where a launcher has set its variables.
    """
    from accelerate import PartialState
    from accelerate.utils import clear_environment

    if not PartialState._shared_state:
        with clear_environment():
            PartialState(cpu=True)


def is_main() -> bool:
    """Whether this process is the one that writes files and log lines."""
    return place().rank == 0


def part() -> tuple[int, int]:
    """This process's number and how many there are: its part of every batch."""
    return (place().rank, place().processes) if _joined() else (0, 1)


def part_of_batch(images: int, part: tuple[int, int]) -> range:
    """Of a batch's `images` in a row those in part (k, n): as equal as can be, the first parts taking what does not divide
    evenly, so that only a batch smaller than the number of parts leaves some of them without an image."""
    number, parts = part
    size, over = divmod(images, parts)
    first = number * size + min(number, over)
    return range(first, first + size + (number < over))


def parts_of_batches(images: int, batch_size: int, part: tuple[int, int], skip: int = 0) -> list[range]:
    """Of a pass over `images` in batches of `batch_size`, without the first `skip`: which places in the pass the images have
    that are in `part` of each batch. Only the last can be none."""
    firsts = range(skip * batch_size, images, batch_size)
    own = [part_of_batch(min(batch_size, images - first), part) for first in firsts]
    return [range(first + each.start, first + each.stop) for first, each in zip(firsts, own, strict=True)]


def add_up(*tensors: Tensor) -> None:
    """Each tensor becomes its sum over all processes, in place; all of them travel in one message.

    The sums are the same bits in every process. Tensors must lie on one device; integers that share a message with floats
    must be small enough for them.
    """
    if not _joined() or not tensors:
        return
    from accelerate.utils import reduce

    kind = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    with torch.no_grad(), _connection():
        flat = reduce(torch.cat([tensor.flatten().to(kind) for tensor in tensors]), "sum")
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def add_up_gradients(parameters: list[Tensor], *others: Tensor) -> None:
    """The gradients of `parameters`, and the `others`, become their sums over all processes."""
    for p in parameters:
        if p.grad is None:  # a process without images in this batch
            p.grad = torch.zeros_like(p)
    add_up(*(p.grad for p in parameters), *others)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes that of the main process, in place."""
    if not _joined():
        return
    from accelerate.utils import broadcast

    with torch.no_grad(), _connection():
        broadcast([tensor.detach() for tensor in tensors])


def largest(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    if not _joined():
        return list(numbers)
    values = torch.tensor(numbers)
    with _connection():
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
    return values.tolist()


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if not _joined():
        return [value]
    from accelerate.utils import gather_object

    with _connection():
        return gather_object([value])


def on_main(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function` in the main process alone and gives its result to all; a UserError of it is raised by all."""
    if not _joined():
        return function(*arguments)
    from accelerate.utils import broadcast_object_list

    told = list(_outcome(function, arguments) if is_main() else (None, None))
    with _connection():
        broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def in_turn(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function` in the main process, then in one process of each other machine, then in the rest, so that what the
    first of them downloads the others find; a UserError of one is raised by all."""
    if not _joined():
        return function(*arguments)
    outcome, turn = (None, None), 0 if is_main() else 1 if place().local_rank == 0 else 2
    for now in range(3):
        if now == turn:
            outcome = _outcome(function, arguments)
        if errors := [each for each in gathered(outcome[1]) if each is not None]:
            raise errors[0]
    return outcome[0]


def _outcome(function: Callable[..., T], arguments: tuple) -> tuple[T | None, UserError | None]:
    """What `function` returns, or the UserError that it raises."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, error


def _joined() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def _connection() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError("The connection to another process of the run is lost, which has ended or cannot be reached; run the "
                        f"same command again: it goes on from the last checkpoint ({reason}).") from error


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of the interpreter's report: what one process meets breaks off the others, and only the first says so."""
    if speaks():
        traceback.print_exception(kind, error, trace)
    leave(1)
