"""A long stream: what a step costs after 200 tasks whose adapters were all kept.

`python -m benchmarks.stream` trains 200 tasks of two classes (generated images) on the embedded backbone with the trainer's
own code and prints every task's median step over the first task's. Between any two steps one step of the frozen ViT alone is
timed too: a machine whose speed changes during the stream changes both, so their quotient is what is compared.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from analysis.command import positive
from backbone import create_backbone
from backbone.embedded import EMBEDDED
from benchmarks.common import GENERATED, generated_dataset, record_of, register, table, write_record
from benchmarks.timed_run import TimedRun
from utils.config import Config, config_from_dict
from utils.errors import status_of
from utils.runs.runtime import pick_device

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 2  # per task


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=positive, default=200, help="tasks of two classes")
    parser.add_argument("--images", type=positive, default=64, help="training images per class; one test image each")
    parser.add_argument("--epochs", type=positive, default=4, help="epochs per task")
    parser.add_argument("--batch", type=positive, default=32, help="images per step")
    parser.add_argument("--rank", type=positive, default=4, help="rank of every adapter; 200 of rank 4 are six widths of 128")
    parser.add_argument("--gate", default="gumbel_sparsemax",
                        choices=["gumbel_sparsemax", "gumbel_softmax", "sparsemax", "none"],
                        help="with all but the sparsemax gates every adapter has a part in every step")
    parser.add_argument("--backbone", default=EMBEDDED, help="timm name; weights are random")
    parser.add_argument("--device", default="auto", help='"cpu", "auto" or a CUDA device such as 0')
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "stream.json",
                        help="where the JSON goes")
    return parser.parse_args(arguments)


class PacedRun(TimedRun):
    """A timed run that takes a step of the frozen ViT alone after each of its own."""

    def __init__(self, config: Config, seed: int, folder: Path, device: torch.device) -> None:
        super().__init__(config, seed, folder, device)
        self.pace: dict[int, list[tuple[Any, Any]]] = {}
        self._floor = create_backbone(config).to(device)
        self._floor.read_class_token_alone()
        size = self._floor.image_size
        self._pixels = torch.rand(config.batch_size, 3, size, size).to(device).requires_grad_()

    def after_step(self) -> None:
        super().after_step()
        first = self.clock.mark()
        self._floor(self._pixels).square().mean().backward()
        self._pixels.grad = None
        self.pace.setdefault(self.learner.task, []).append((first, self.clock.mark()))

    def tasks(self) -> list[dict[str, float]]:
        """Per task the median step, the median of the frozen ViT's step in between, and their quotient over the first's."""
        rows = []
        for task, seconds in self.step_seconds().items():
            floors = [self.clock.seconds(*span) for span in self.pace[task]]
            quotient = statistics.median(step / floor for step, floor in zip(seconds, floors, strict=True))
            rows.append({"task": task, "step_seconds": statistics.median(seconds), "floor_seconds": statistics.median(floors),
                         "step_over_floor": quotient})
        for row in rows:
            row["over_first"] = row["step_over_floor"] / rows[0]["step_over_floor"]
        return rows


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints and writes; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)

    def work() -> None:
        register(generated_dataset(CLASSES * options.tasks, options.images, 1, size=32))
        with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
            config = config_from_dict({
                "dataset": GENERATED, "init_cls": CLASSES, "increment": CLASSES, "backbone_type": options.backbone,
                "pretrained": False, "device": [options.device], "rank": options.rank, "gate": options.gate,
                "growth_rule": "none", "init_epoch": options.epochs, "epochs": options.epochs, "batch_size": options.batch,
                "init_lr": 1e-3, "lrate": 1e-3, "eval_every": 0, "filepath": folder})
            run = PacedRun(config, config.seed[0], Path(folder), pick_device(config.device)[0])
            run.finish()
        rows = run.tasks()
        shown = [rows[i] for i in sorted({round(k * (len(rows) - 1) / 10) for k in range(11)})]
        names = {"task": "task", "step_seconds": "s/step", "floor_seconds": "floor, s/step", "step_over_floor": "step / floor",
                 "over_first": "over the first task"}
        print(table(list(names.values()), [[row[name] for name in names] for row in shown]))
        over = sorted(row["over_first"] for row in rows)
        within = sum(value <= 1.15 for value in over)
        figures = {"tasks": rows, "median_over_first": statistics.median(over), "largest_over_first": over[-1],
                   "tasks_within_15_percent": within, "last_tenth_over_first_tenth": _tenths(rows)}
        print(f"over the first task's step: median {figures['median_over_first']:.3f}, largest {over[-1]:.3f}; {within} of "
              f"{len(over)} tasks within 15 percent; last tenth of the stream over its first "
              f"{figures['last_tenth_over_first_tenth']:.3f}", flush=True)
        settings = {**vars(options), "output": str(options.output)}
        write_record(options.output, {**record_of(run.device, "benchmarks.stream", settings), **figures})

    return status_of(work)


def _tenths(rows: list[dict[str, float]]) -> float:
    """Median step over floor in the last tenth of the tasks over that in the first."""
    count = max(1, len(rows) // 10)
    first, last = ([row["step_over_floor"] for row in part] for part in (rows[:count], rows[-count:]))
    return statistics.median(last) / statistics.median(first)


if __name__ == "__main__":
    sys.exit(main())
