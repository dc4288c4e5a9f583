"""utils/runs/progress.py: a line or a bar now and then, whatever the run is at, and a reader that may go away."""

import logging
import sys
from collections.abc import Iterator

import pytest

from utils.runs import progress as module
from utils.runs.progress import LOGGER, ConsoleHandler, Progress, format_seconds


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stand_in = Clock()
    monkeypatch.setattr(module, "time", stand_in)
    return stand_in


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Handler]:
    handler = ConsoleHandler()
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    LOGGER.setLevel(logging.INFO)
    yield handler


def test_steps_and_other_work_share_the_lines(clock: Clock, console: logging.Handler, capsys) -> None:
    progress, fetched = Progress(20, terminal=False), []

    def figures() -> dict[str, float]:
        fetched.append(clock.now)
        return {"loss": 1.5}

    for done in range(1, 4):
        clock.now += 4
        assert progress.step("Task 0, Epoch 1/2", figures) == (done == 3)
    for done in range(1, 41):
        clock.now += 1
        progress.work("Task 0: row fit, batch", done, 40)
    assert progress.done == 3 and fetched == [112.0]
    assert capsys.readouterr().out.splitlines() == ["Task 0, Epoch 1/2: step 3/20, loss 1.5, 1:08 left",
                                                    *(f"Task 0: row fit, batch {done}/40" for done in (10, 20, 30, 40))]


def test_other_work_stands_on_the_bar_and_moves_it_not(clock: Clock, capsys) -> None:
    progress = Progress(8, terminal=True)
    progress.step("Task 0, Epoch 1/1", lambda: {"loss": 0.5})
    clock.now += 1
    progress.step("Task 0, Epoch 1/1", lambda: {"loss": 0.25})
    shown = capsys.readouterr().err
    assert "Task 0, Epoch 1/1" in shown and " 2/8 " in shown and "loss 0.25" in shown
    progress.work("Task 0: row fit, batch", 1, 40)
    assert capsys.readouterr().err == ""
    clock.now += 1
    progress.work("Task 0: row fit, batch", 5, 40)
    shown = capsys.readouterr().err
    assert "Task 0: row fit, batch 5/40" in shown and " 2/8 " in shown and "loss" not in shown
    progress.close()


def test_a_log_line_passes_above_the_bar(clock: Clock, console: logging.Handler, capsys) -> None:
    progress = Progress(8, terminal=True)
    LOGGER.info("a line")
    assert capsys.readouterr().out == "a line\n"
    progress.close()


def test_a_reader_that_has_gone_is_no_error(console: logging.Handler, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        flush = write

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        LOGGER.info("a line")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (75.2, "1:15"), (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
