"""What a training step and an evaluated image cost with every method, after tasks that it has learned.

`python -m benchmarks.methods` prints a row for each of `models.LEARNERS` and writes JSON beside it: how many forwards a step
and an image take, counted, and how many times the plain timm ViT's step and forward, timed between them on the CPU. Each is
a case of `benchmarks/case.py` in a process of its own; what is printed are medians over the repeats.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.case import Case, config_of
from benchmarks.common import record_of, table, write_record
from benchmarks.step import ROOT, run_case
from models import LEARNERS
from utils.config.components import UnknownName, chosen, config_class
from utils.errors import UserError
from utils.runs.runtime import pick_device

TITLES = {"step_forwards": "forwards/step", "image_forwards": "forwards/image", "step_over_floor": "step / floor",
          "image_over_floor": "evaluation / timm"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(LEARNERS), choices=list(LEARNERS), metavar="NAME",
                        help="which of models.LEARNERS (default: all)")
    parser.add_argument("--tasks", type=int, default=9, help="tasks learned before")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm name; weights are random")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="another value than the default of a key, for every method that has it; repeatable")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, and evaluations, per process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--repeats", type=int, default=3, help="processes per method")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "methods.json",
                        help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps take a number of at least 1")
    return options


def case_of(name: str, options: argparse.Namespace) -> Case:
    """What is measured of a method; of the gates that of `benchmarks.step`."""
    return Case("step", options.tasks, "fp32", options.backbone, options.batch, 10, "gumbel_softmax", "global", "cpu", False,
                options.steps, options.warmup, name, _fitting(name, options.overrides))


def _fitting(name: str, overrides: list[str]) -> list[str]:
    """Those of `overrides` whose keys the method has, given all of them."""
    given = {key: value for key, _, value in (each.partition("=") for each in overrides)}
    known = config_class(chosen({**given, "model_name": name})).model_fields
    return [each for each in overrides if each.partition("=")[0] in known]


def _mistake(options: argparse.Namespace) -> str | None:
    """Why the methods cannot be measured, before a process is started for each."""
    try:
        fitting = {each for name in options.methods for each in _fitting(name, options.overrides)}
        for each in options.overrides:
            if each not in fitting:
                return f"--set {each}: none of the methods has the key '{each.partition('=')[0]}'; see docs/CONFIG.md."
        for name in options.methods:
            config_of(case_of(name, options))
    except (UserError, UnknownName) as error:
        return str(error)
    return None


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row of medians for every method; None where it makes no steps, or has failed."""
    rows = {}
    for name in dict.fromkeys(result["model_name"] for result in results):
        mine = [result for result in results if result["model_name"] == name]
        rows[name] = {"method": name}
        for column in TITLES:
            found = [result[column] for result in mine if result.get(column) is not None]
            rows[name][column] = statistics.median(found) if found else None
    return list(rows.values())


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a case failed, 2 for a key that there is not."""
    options, results = parse(arguments), []
    if sentence := _mistake(options):
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    for repeat in range(options.repeats):
        for name in options.methods:
            print(f"repeat {repeat + 1}/{options.repeats}: {name}", file=sys.stderr, flush=True)
            results.append(run_case(case_of(name, options)._asdict()))
    rows = summarize(results)
    print(table(["method", *TITLES.values()], [list(row.values()) for row in rows]), flush=True)
    record = record_of(pick_device(["cpu"])[0], "benchmarks.methods", {**vars(options), "output": str(options.output)})
    write_record(options.output, {**record, "rows": rows, "cases": results})
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
