"""What the benchmarks share: generated images, marks in time that do not wait for the device, tables and records."""

import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.data import DATASETS, PHOTOS, Dataset, Split
from utils.runs.files import write_json
from utils.runs.runtime import code_version, environment, hardware, versions

GENERATED = "generated"  # the name under which generated images are a data set in this process


def generated_dataset(classes: int, train: int, test: int, size: int) -> Dataset:
    """Random uint8 images `[n, 3, size, size]`, `train` and `test` of them per class, under the augmentation of photos."""
    def split(count: int, seed: int) -> Split:
        stream = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (classes * count, 3, size, size), generator=stream, dtype=torch.uint8)
        return Split(images, np.repeat(np.arange(classes, dtype=np.int64), count))

    return Dataset(GENERATED, split(train, 0), split(test, 1), [f"class {label}" for label in range(classes)], PHOTOS)


def register(dataset: Dataset) -> None:
    """Lets a config of this process name `dataset` as any other data set, so that the trainer's own code runs on it."""
    DATASETS[GENERATED] = lambda path, seed: dataset


class Clock:
    """Marks in time: of the host on the CPU; in the stream of work on CUDA, where taking one waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """This moment."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, first: Any, last: Any) -> float:
        """Between two marks; on CUDA it waits until the later one has been reached."""
        if self.device.type != "cuda":
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1000

    def differences(self, marks: Sequence[Any]) -> list[float]:
        """Seconds between successive marks."""
        return [self.seconds(first, last) for first, last in zip(marks, marks[1:])]


def record_of(device: torch.device, command: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Head of a benchmark's JSON: what was run on what."""
    return {"command": command, "settings": settings, "hardware": hardware(device), "versions": versions(),
            "code": code_version(), "environment": environment(), "system": platform.platform()}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers with four significant digits, None as a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_record(path: Path, record: dict[str, Any]) -> None:
    """The JSON beside the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(record)))
    print(f"JSON: {path}", flush=True)
