"""How a run shows that it is alive: a bar on a terminal, flushed plain lines anywhere else."""

import logging
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LOGGER = logging.getLogger("gumbel_cl_lora")


class ConsoleHandler(logging.Handler):
    """Log records as plain lines on stdout, flushed one by one; on a terminal tqdm has them pass above the progress bar.

    tqdm's own handler would report a reader that has gone as an error.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of `| head` has gone; the run and its train.log go on
            pass


class Progress:
    """Counts optimizer steps of a whole run and shows loss, tau, accuracy and time left, and other work while it lasts.

    total: steps of the run. On a terminal this is a bar, refreshed every `BAR_SECONDS`; elsewhere a line every
    `LINE_SECONDS`. The figures are fetched only when they are shown, since fetching waits for the device.
    """

    BAR_SECONDS = 0.3
    LINE_SECONDS = 10.0

    def __init__(self, total: int, terminal: bool | None = None) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.shown = self.started
        terminal = sys.stderr.isatty() and sys.stdout.isatty() if terminal is None else terminal
        layout = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=total, leave=False, dynamic_ncols=True, bar_format=layout) if terminal else None

    def skip(self, steps: int) -> None:
        """Takes `steps` out of what is left to do, without counting them as work done."""
        self.total -= steps
        if self.bar is not None:
            self.bar.total = self.total

    def step(self, title: str, figures: Callable[[], dict[str, float]]) -> bool:
        """One optimizer step is done; returns whether the figures were fetched and shown."""
        self.done += 1
        if not self._due():
            return False
        text = ", ".join(f"{name} {value:.3g}" for name, value in figures().items())
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        self._show(title, text, f"{title}: step {self.done}/{self.total}, {text}, {format_seconds(left)} left")
        return True

    def work(self, title: str, done: int, total: int) -> None:
        """Work that is no optimizer step: `done` of `total` parts of what `title` says, as in "Task 3: row fit"."""
        if self._due():
            self._show(f"{title} {done}/{total}", "", f"{title} {done}/{total}")

    def close(self) -> None:
        """Removes the bar."""
        if self.bar is not None:
            self.bar.close()

    def _due(self) -> bool:
        """Whether it is time to show something; it then counts as shown."""
        now, wait = time.monotonic(), self.LINE_SECONDS if self.bar is None else self.BAR_SECONDS
        due = now - self.shown >= wait
        self.shown = now if due else self.shown
        return due

    def _show(self, title: str, text: str, line: str) -> None:
        """`title` and `text` on the bar, or else `line`."""
        if self.bar is None:
            LOGGER.info(line)
            return
        self.bar.n = self.done
        self.bar.set_description_str(title, refresh=False)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.refresh()


def format_seconds(seconds: float) -> str:
    """`75.2` as `1:15`, an hour and more as `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
