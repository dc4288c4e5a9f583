"""What did the gate learn? `python -m analysis.gates RUN` answers five questions about a finished run."""

import argparse
import sys
from pathlib import Path

from analysis.command import make_output, positive
from utils.errors import status_of


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.gates",
        description="How the gate weights of a finished run moved, which adapters are chosen most, which old adapters help a "
                    "new task, whether task similarity goes with the gate weight, and how adapters and bytes grow: a table, a "
                    "picture and JSON each. Needs the run's images.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, with its results.json")
    parser.add_argument("--task", type=int, metavar="T", help="take adapters out of the network of this task (default: last)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where to write (default: RUN/gates/)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images at a time (default: as the run)")
    parser.add_argument("--device", default="auto", metavar="NAME", help='"cpu", "auto" (default), or a CUDA device such as 0')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Answers, writes and prints; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)
    def work() -> None:
        from analysis.gate_answers import answer_all, report, task_of, write  # loads torch: --help is answered without
        from analysis.gate_questions import read_run

        run = read_run(options.run)
        task = task_of(run, options.task)
        folder = options.run / "gates" if options.output is None else options.output
        make_output(folder)  # before the answers are computed, which may take long
        answers = answer_all(run, task, options.batch_size, options.device, _say)
        write(run, answers, folder)
        print(report(run, answers))
        print(f"Tables, pictures and JSON: {folder}", flush=True)

    return status_of(work)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
