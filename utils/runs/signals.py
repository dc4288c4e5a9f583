"""Stopping a run in good order: the first signal is noted for the training loop, a second one ends the process at once.

Imports nothing but the standard library, so that a command line can put it in place before it loads torch.
"""

import os
import signal
import threading
import time
from _thread import start_new_thread
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

# What the process exits with once the run is saved. SIGUSR1 is a job manager's warning that it is about to preempt the
# run, answered with EX_TEMPFAIL: nothing is wrong, start the same command again.
EXIT_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}

# A launcher that passes on what the whole group is sent delivers one stop twice; a second signal this soon is the first.
REPEAT_SECONDS = 0.2


class Stopped(Exception):
    """Raised by the trainer once everything is saved after a signal; `exit_status` is what the process ends with."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"stopped by {received.name}")
        self.signal = received

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.signal]


class Signals:
    """Within `with Signals() as signals:`, SIGINT, SIGTERM and SIGUSR1 set `signals.received`, and nothing else.

    The training loop looks at it after each optimizer step. A second signal ends the process at once, in whatever call it
    is, with status 128 + number: files are only ever renamed into place, so nothing half-written is left that matters. Does
    nothing outside the main thread, which is the only one that may set handlers. Leaving restores what was there before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_wakeup = -1
        self._pipe: int | None = None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_STATUS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by C code
        self._previous.clear()
        if self._pipe is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._pipe)
            self._pipe = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._watch()

    def _watch(self) -> None:
        """From here on a thread acts on signals: this handler has to wait while the main thread is in a call that does not
        return, such as a flush to a slow disk, which is when somebody sends a second one."""
        try:
            read, write = os.pipe()
            os.set_blocking(write, False)
            start_new_thread(_end_at_next, (read, time.monotonic() + REPEAT_SECONDS))
            # threading.Thread takes locks that the interrupted code may hold
            self._previous_wakeup, self._pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False), write
        except (OSError, RuntimeError):  # no descriptor or no thread to be had: the kernel can end the process, too
            for number in EXIT_STATUS:
                signal.signal(number, signal.SIG_DFL)


def leave_to_parent(worker: int = 0) -> None:
    """Makes a data loader's worker process deaf to these signals (`worker_init_fn`).

    Job managers and terminals send them to every process of a run. A worker that died of one would fail the step that the
    main process means to finish; it ends with the main process anyway.
    """
    for number in EXIT_STATUS:
        signal.signal(number, signal.SIG_IGN)


def _end_at_next(pipe: int, repeats_until: float) -> None:
    """Ends the process at the first of these signals that `pipe` tells of, repeats aside; returns when it is closed."""
    with suppress(OSError):
        while numbers := os.read(pipe, 1):
            if numbers[0] in EXIT_STATUS and time.monotonic() >= repeats_until:
                os._exit(128 + numbers[0])
        os.close(pipe)
