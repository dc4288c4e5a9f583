"""Seconds and memory of one training step and one evaluated image against the number of old adapters.

`python -m benchmarks.step` prints a table for 0 to 100 old adapters and writes JSON beside it; with `--model_name` that of any
method, after tasks that it has learned. What a case is and how its
memory is counted: `benchmarks/case.py`; definitions and the commands behind the project's figures: docs/BENCHMARKS.md.
Every case runs in a process of its own, the cases of a repeat one after the other, so that a change in the machine's speed
meets them all; what is printed are medians over the repeats.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOOP_LIMIT = 20  # the loop keeps about half a gigabyte per adapter at batch 16; beyond, it is not run
SKIPPED = "skipped: memory"
# Of a `benchmarks.case.Case` what all cases of a command have in common, in its order.
SAME = ("backbone", "batch", "rank", "gate", "inference", "device", "compile", "steps", "warmup", "model_name", "overrides")
CaseId = tuple[str, int, str]  # kind, old adapters, precision


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto", help='"cpu", "auto" or a CUDA device such as 0')
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"],
                        help="one or both; with both, how much faster bf16 is is printed too")
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="timm name; weights are random")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--model_name", metavar="NAME",
                        help="a method of models.LEARNERS; without it the adapters of sdlora, given rather than trained")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="with --model_name: another value than the default of a key of its config; repeatable")
    parser.add_argument("--adapters", type=int, nargs="+",
                        help="numbers of old adapters (default: 0 1 5 10 20 50 100), of a method's old tasks (default: 0 9)")
    parser.add_argument("--rank", type=int, default=10, help="rank of every adapter")
    parser.add_argument("--gate", default="gumbel_softmax",
                        choices=["gumbel_softmax", "gumbel_sparsemax", "sparsemax", "none"],
                        help="the default gives every adapter a part in every step, which is the most work there can be")
    parser.add_argument("--inference", default="global", choices=["global", "routed"],
                        help="routed (with --gate gumbel_sparsemax): a key per old adapter, the images spread over all")
    parser.add_argument("--compile", action="store_true", help="step and floor with torch.compile; the references never")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those; the peak of memory is that of these")
    parser.add_argument("--repeats", type=int, default=3, help="processes per case")
    parser.add_argument("--references", nargs="*", choices=["loop", "stacked"],
                        help="what to compare with besides the floor (default: both); none if empty or with --model_name")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "benchmarks" / "step.json", help="where the JSON goes")
    options = parser.parse_args(arguments)
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps take a number of at least 1")
    if options.model_name and options.references:
        parser.error("--references are those of sdlora's adapters; leave them out or leave out --model_name")
    if options.overrides and not options.model_name:
        parser.error("--set changes the config of a method; name it by --model_name")
    if options.adapters is None:
        options.adapters = [0, 9] if options.model_name else [0, 1, 5, 10, 20, 50, 100]
    if options.references is None:
        options.references = [] if options.model_name else ["loop", "stacked"]
    return options


def keys_of(options: argparse.Namespace) -> list[CaseId]:
    """The cases of one repeat. The loop always runs in float32, and no case needs to run twice."""
    keys: list[CaseId] = []
    for precision in options.precision:
        keys += [("floor", 0, precision), ("backbone", 0, precision)]
        for adapters in options.adapters:
            keys.append(("step", adapters, precision))
            if "loop" in options.references and adapters <= LOOP_LIMIT:
                keys.append(("loop", adapters, "fp32"))
            if "stacked" in options.references:
                keys.append(("stacked", adapters, precision))
    return list(dict.fromkeys(keys))


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case `repeats` times, each in a process of its own; a case that fails is kept with its error."""
    same = {name: getattr(options, name) for name in SAME}
    keys, results = keys_of(options), []
    for repeat in range(options.repeats):
        for number, (kind, adapters, precision) in enumerate(keys, 1):
            case = {**same, "kind": kind, "adapters": adapters, "precision": precision}
            print(f"repeat {repeat + 1}/{options.repeats}, case {number}/{len(keys)}: {kind}, {adapters} old adapters, "
                  f"{precision}", file=sys.stderr, flush=True)
            results.append(run_case(case))
    return results


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What a `benchmarks.case.Case` comes to in a process of its own; with an `error` if it fails."""
    command = [sys.executable, "-m", "benchmarks.case", json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    print(f"  failed: {reason}", file=sys.stderr, flush=True)
    return {**case, "error": reason}


def summarize(results: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians per case, and the rows of the table: one per precision and number of old adapters."""
    found: dict[CaseId, dict[str, float]] = {}
    for key in keys_of(options):
        mine = [r for r in results if (r["kind"], r["adapters"], r["precision"]) == key and "error" not in r]
        if mine:
            names = ("step_seconds", "step_over_floor", "image_seconds", "image_over_floor", "peak_bytes", "flops",
                     "bf16_matmul_flops_per_second")
            found[key] = {name: statistics.median(r[name] for r in mine) for name in names if mine[0].get(name) is not None}
    rows = [_row(found, options, precision, adapters) for precision in options.precision for adapters in options.adapters]
    return {"rows": rows,
            "floors": {p: found.get(("floor", 0, p)) for p in options.precision},
            "backbones": {p: found.get(("backbone", 0, p)) for p in options.precision},
            "bf16_speedup": {str(a): _ratio(found, "step_seconds", ("step", a, "fp32"), ("step", a, "bf16"))
                             for a in options.adapters} if len(set(options.precision)) == 2 else {}}


def _row(found: dict[CaseId, dict[str, float]], options: argparse.Namespace, precision: str, adapters: int) -> dict[str, Any]:
    step, base = ("step", adapters, precision), ("step", 0, precision)
    floor, backbone = ("floor", 0, precision), ("backbone", 0, precision)
    row = {"precision": precision, "tasks" if options.model_name else "adapters": adapters}
    row |= {name: found.get(step, {}).get(name) for name in ("step_seconds", "image_seconds", "peak_bytes")}
    paced = "step_over_floor" in found.get(step, {})  # then each process has measured its own quotient
    row["step_over_floor"] = found[step]["step_over_floor"] if paced else _ratio(found, "step_seconds", step, floor)
    row["step_over_backbone"] = _ratio(found, "step_over_floor" if paced else "step_seconds", step, backbone)
    row["memory_over_none"] = _ratio(found, "peak_bytes", step, base)
    own = found.get(step, {}).get("image_over_floor")
    row["evaluation_over_timm"] = own or _ratio(found, "image_seconds", step, floor)
    for kind in options.references:
        other = (kind, adapters, "fp32" if kind == "loop" else precision)
        missing = SKIPPED if kind == "loop" and adapters > LOOP_LIMIT else None
        timed = "step_over_floor" if paced and kind != "loop" else "step_seconds"
        row[f"{kind}_over_step"] = _ratio(found, timed, other, step) or missing
        row[f"memory_over_{kind}"] = _ratio(found, "peak_bytes", step, other) or missing
    reached = found.get(backbone, {})
    if "flops" in reached and row["step_seconds"]:
        rate = reached["flops"] / row["step_seconds"]
        row["rate_over_matmul"] = rate / reached["bf16_matmul_flops_per_second"]
    return row


def _ratio(found: dict[CaseId, dict[str, float]], name: str, over: CaseId, under: CaseId) -> float | None:
    values = found.get(over, {}).get(name), found.get(under, {}).get(name)
    return values[0] / values[1] if all(values) else None


TITLES = {"precision": "precision", "adapters": "old adapters", "tasks": "old tasks",
          "step_seconds": "s/step", "step_over_floor": "step / floor",
          "step_over_backbone": "step / backbone",
          "loop_over_step": "loop / step", "stacked_over_step": "stacked / step", "peak_bytes": "peak GiB",
          "memory_over_none": "peak / at 0", "memory_over_loop": "peak / loop's", "memory_over_stacked": "peak / stacked's",
          "image_seconds": "s/evaluated image", "evaluation_over_timm": "evaluation / timm",
          "rate_over_matmul": "rate / bf16 matmul"}


def shown(summary: dict[str, Any]) -> str:
    """The table, then the floor and how much faster bf16 is."""
    from benchmarks.common import table

    rows = [{**row, "peak_bytes": row["peak_bytes"] and row["peak_bytes"] / 2**30} for row in summary["rows"]]
    columns = [name for name in TITLES if any(name in row for row in rows)]
    lines = [table([TITLES[name] for name in columns], [[row.get(name) for name in columns] for row in rows])]
    for name in ("floor", "backbone"):
        for precision, case in summary[f"{name}s"].items():
            if case:
                lines.append(f"{name}, {precision}: {case['step_seconds']:.4g} s/step, {case['peak_bytes'] / 2**30:.3g} GiB, "
                             f"forward alone {case['image_seconds']:.4g} s/image")
    lines += [f"bf16 at {adapters} old adapters: {ratio:.3g} times as fast as fp32"
              for adapters, ratio in summary["bf16_speedup"].items() if ratio]
    return "\n".join(lines)


def _mistake(options: argparse.Namespace) -> str | None:
    """Why the cases of a named method cannot be measured, before a process is started for each."""
    from benchmarks.case import Case, config_of
    from utils.config.components import UnknownName
    from utils.errors import UserError

    try:
        config_of(Case("step", 0, options.precision[0], *(getattr(options, name) for name in SAME)))
    except (UserError, UnknownName) as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a case failed, 2 for a method or key that there is not."""
    options = parse(arguments)
    if options.model_name and (sentence := _mistake(options)):
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    results = measure(options)
    summary = summarize(results, options)
    from benchmarks.common import record_of, write_record  # loads torch, which a process that only waits does not need
    from utils.runs.runtime import pick_device

    print(shown(summary), flush=True)
    settings = {**vars(options), "output": str(options.output)}
    record = record_of(pick_device([options.device])[0], "benchmarks.step", settings)
    write_record(options.output, {**record, **summary, "cases": results})
    return int(any("error" in result for result in results))


if __name__ == "__main__":
    sys.exit(main())
