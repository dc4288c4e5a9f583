"""Stopping a run in good order: the first signal is noted for the training loop, a second one ends the process at once.

By hand, since a library's handler stops where it is: the run is to finish its step and save. Standard library only, so that a
command line can put it in place before it loads torch.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

# What the process exits with once the run is saved. SIGUSR1 is a job manager's warning that it is about to preempt the
# run, answered with EX_TEMPFAIL: nothing is wrong, start the same command again.
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}

# A launcher that passes on what the whole group is sent delivers one stop twice; a second signal this soon is the first.
REPEAT_SECONDS = 0.2


class Stopped(Exception):
    """Raised by the trainer once everything is saved after a signal; `exit_status` is what the process ends with."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}")
        self.signal, self.exit_status = received, EXIT_STATUS[received]


class Signals:
    """Within `with Signals() as signals:`, SIGINT, SIGTERM and SIGUSR1 set `signals.received`, and nothing else.

    The training loop looks at it after each optimizer step. A second signal ends the process at once, in whatever call it
    is, with status 128 + number: files are only ever renamed into place, so nothing half-written is left that matters. Does
    nothing outside the main thread, which is the only one that may set handlers. Leaving restores what was there before.
    """

    def __init__(self) -> None:
        self._first: signal.Signals | None = None
        self._repeats_until, self._previous, self._left_to_kernel = 0.0, {}, False

    @property
    def received(self) -> signal.Signals | None:
        """The first signal, None before. From the first look at it the kernel acts on a second one: a handler would have to
        wait while this thread is in a call that does not return, such as a save's flush to a slow disk."""
        if self._first is not None and not self._left_to_kernel:
            time.sleep(max(0.0, self._repeats_until - time.monotonic()))
            self._left_to_kernel = True
            for number in self._previous:
                signal.signal(number, signal.SIG_DFL)
        return self._first

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in EXIT_STATUS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C code
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first, self._repeats_until = signal.Signals(number), now + REPEAT_SECONDS
        elif now >= self._repeats_until:
            os._exit(128 + number)


def leave_to_parent(worker: int = 0) -> None:
    """Makes a data loader's worker process deaf to these signals (`worker_init_fn`).

    Job managers and terminals send them to every process of a run. A worker that died of one would fail the step that the
    main process means to finish; it ends with the main process anyway.
    """
    for number in EXIT_STATUS:
        signal.signal(number, signal.SIG_IGN)
