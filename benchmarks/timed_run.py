"""The trainer's own run, with marks taken between its parts.

Nothing of what is timed is written again here: `TimedRun` is `trainer.Run` on a registered data set, and the marks sit where
its parts meet. On CUDA they are events in the stream of work, read when the run is over, so that timing makes the host wait
nowhere that an untimed run does not.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from benchmarks.common import Clock
from trainer import Run
from utils.config import Config
from utils.results.tally import Counts

PARTS = ("data", "forward and backward", "optimizer", "evaluation", "saving")


class TimedRun(Run):
    """A run that knows afterwards where its time went: `parts()` and `step_seconds()`."""

    def __init__(self, config: Config, seed: int, folder: Path, device: torch.device) -> None:
        super().__init__(config, seed, folder, device)
        self.clock = Clock(device)
        self.spans: dict[str, list[tuple[Any, Any]]] = {part: [] for part in PARTS}
        self.steps_of: dict[int, list[tuple[Any, Any]]] = {}  # task -> from the batch at hand to the end of the update
        self.seconds = 0.0
        self._batch_at_hand: Any = None

    def finish(self, overwrite: bool = False) -> dict[str, Any]:
        """As `Run.finish`; `seconds` is all of it, from reading the data set to the pictures."""
        started = time.perf_counter()
        hooks = [register_optimizer_step_pre_hook(self._before_update), register_optimizer_step_post_hook(self._after_update)]
        try:
            return super().finish(overwrite)
        finally:
            for hook in hooks:
                hook.remove()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds = time.perf_counter() - started

    def parts(self) -> dict[str, float]:
        """Seconds per part; "other" is the rest: start-up, what happens between tasks, the progress display."""
        sums = {part: sum(self.clock.seconds(*span) for span in spans) for part, spans in self.spans.items()}
        return {**sums, "other": self.seconds - sum(sums.values())}

    def step_seconds(self) -> dict[int, list[float]]:
        """Seconds of every optimizer step of every task, without its data."""
        return {task: [self.clock.seconds(*span) for span in spans] for task, spans in self.steps_of.items()}

    # ---- where the marks are

    def _build(self) -> None:
        super()._build()
        batches, save = self.data.train_batches, self.checkpoints.save
        self.data.train_batches = lambda *args, **kwargs: self._timed(batches(*args, **kwargs))
        self.checkpoints.save = lambda *args, **kwargs: self._span("saving", save, *args, **kwargs)
        write = self.learner.save
        self.learner.save = lambda *args, **kwargs: self._span("saving", write, *args, **kwargs)

    def _timed(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            with self._part("data"):
                batch = next(batches, None)
            if batch is None:
                return
            self._batch_at_hand = self.clock.mark()
            yield batch

    def _before_update(self, *args: Any) -> None:
        self._update_begins = self.clock.mark()
        self.spans["forward and backward"].append((self._batch_at_hand, self._update_begins))

    def _after_update(self, *args: Any) -> None:
        now = self.clock.mark()
        self.spans["optimizer"].append((self._update_begins, now))
        self.steps_of.setdefault(self.learner.task, []).append((self._batch_at_hand, now))

    def _counts(self, title: str, whole: bool = False) -> Counts:
        return self._span("evaluation", super()._counts, title, whole)

    def _write_results(self, finished: bool = False) -> None:
        self._span("saving", super()._write_results, finished)

    def _span(self, part: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        with self._part(part):
            return function(*args, **kwargs)

    @contextmanager
    def _part(self, part: str) -> Iterator[None]:
        first = self.clock.mark()
        yield
        self.spans[part].append((first, self.clock.mark()))
