"""A whole stream, timed: data, forward and backward, optimizer, evaluation, saving.

`python -m benchmarks.run` trains on random images shaped like CIFAR-100 (uint8 3 x 32 x 32, resized to the backbone's input,
100 classes, 50,000 training and 10,000 test images; 10 tasks, 20 epochs) with the trainer's own code, artifacts and all, in a
folder that is removed afterwards. The options make it small enough for a CPU. Definitions: docs/BENCHMARKS.md.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from analysis.command import positive
from benchmarks.common import GENERATED, generated_dataset, record_of, register, table, write_record
from benchmarks.timed_run import TimedRun
from utils.config import config_from_dict
from utils.errors import UserError, status_of
from utils.runs.runtime import pick_device

ROOT = Path(__file__).resolve().parent.parent
TEST_SHARE = 5  # training images per test image, as in CIFAR-100


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", type=positive, default=10, help="tasks that the classes are cut into")
    parser.add_argument("--classes", type=positive, default=100, help="classes, a multiple of the tasks")
    parser.add_argument("--images", type=positive, default=50_000, help="training images in all; a fifth as many test images")
    parser.add_argument("--epochs", type=positive, default=20, help="epochs per task")
    parser.add_argument("--batch", type=positive, default=128, help="images per step")
    parser.add_argument("--rank", type=positive, default=10, help="rank of every adapter")
    parser.add_argument("--gate", default="gumbel_sparsemax",
                        choices=["gumbel_sparsemax", "gumbel_softmax", "sparsemax", "none"])
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm name; weights are random")
    parser.add_argument("--device", default="auto", help='"cpu", "auto" or a CUDA device such as 0')
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="with torch.compile; compiling counts")
    parser.add_argument("--eval-every", type=int, default=0, help="evaluate every so many epochs; 0 after each task only")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "run.json", help="where the JSON goes")
    return parser.parse_args(arguments)


def timed_stream(options: argparse.Namespace) -> TimedRun:
    """Trains the stream of `options`, all adapters kept, and returns the finished run; raises UserError."""
    classes, tasks = options.classes, options.tasks
    if classes % tasks:
        raise UserError(f"--classes: {classes} is no multiple of --tasks {tasks}; choose one that is.")
    per_class = max(1, options.images // classes)
    register(generated_dataset(classes, per_class, max(1, per_class // TEST_SHARE), size=32))
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        config = config_from_dict({
            "dataset": GENERATED, "init_cls": classes // tasks, "increment": classes // tasks, "nb_tasks": tasks,
            "backbone_type": options.backbone, "pretrained": False, "device": [options.device], "rank": options.rank,
            "gate": options.gate, "growth_rule": "none", "init_epoch": options.epochs, "epochs": options.epochs,
            "batch_size": options.batch, "init_lr": 1e-3, "lrate": 1e-3, "precision": options.precision,
            "compile": options.compile, "eval_every": options.eval_every, "filepath": folder})
        run = TimedRun(config, config.seed[0], Path(folder), pick_device(config.device)[0])
        run.finish()
    return run


def report(run: TimedRun) -> dict[str, Any]:
    """Seconds and share of every part, and per task the median seconds of a step."""
    parts = run.parts()
    tasks = [{"task": task, "steps": len(seconds), "step_seconds": statistics.median(seconds)}
             for task, seconds in run.step_seconds().items()]
    first = tasks[0]["step_seconds"]
    for task in tasks:
        task["over_first"] = task["step_seconds"] / first
    return {"seconds": run.seconds, "parts": parts, "tasks": tasks}


def main(arguments: list[str] | None = None) -> int:
    """Trains, prints and writes; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)

    def work() -> None:
        run = timed_stream(options)
        figures = report(run)
        rows = [[part, seconds, 100 * seconds / figures["seconds"]] for part, seconds in figures["parts"].items()]
        print(table(["part", "seconds", "percent"], [*rows, ["all", figures["seconds"], 100.0]]))
        print(f"median step of the last task over the first task's: {figures['tasks'][-1]['over_first']:.3f}", flush=True)
        settings = {**vars(options), "output": str(options.output)}
        write_record(options.output, {**record_of(run.device, "benchmarks.run", settings), **figures})

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
