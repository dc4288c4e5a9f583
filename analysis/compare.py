"""Command line: compares finished runs, over seeds, in tables and pictures.

    python -m analysis.compare runs/quickstart runs/quickstart_head --baseline quickstart_head
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.command import add_runs, make_output
from utils.errors import UserError, nearest, status_of

if TYPE_CHECKING:
    from analysis.records import Found, Method, Stream

OUTPUT = Path("runs/comparison")
DEFAULT_BASELINE = "sdlora"
MARGIN = 0.5


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.compare", description="Compare finished runs over seeds, in tables and pictures.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m analysis.compare runs/quickstart runs/quickstart_head --baseline quickstart_head\n"
               "  python -m analysis.compare runs/studies/gumbel_grid --output comparison")
    add_runs(parser)
    parser.add_argument("--baseline", metavar="NAME",
                        help=f"the method that the others are compared with (default: {DEFAULT_BASELINE} if it is there, else "
                             "the first)")
    parser.add_argument("--margin", type=float, metavar="POINTS",
                        help=f'points of accuracy up to which a method is "no worse" or "equal" (default: {MARGIN})')
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER",
                      help=f"where comparison.md, the CSV files and the pictures go (default: {OUTPUT})")
    form.add_argument("--brief", action="store_true", help="print one table per stream, the best method first; write nothing")
    options = parser.parse_args(arguments)
    if options.brief and options.margin is not None:
        parser.error("argument --margin: not allowed with argument --brief")
    options.margin = MARGIN if options.margin is None else options.margin
    return options


def compare(paths: Sequence[Path], output: Path = OUTPUT, baseline: str | None = None, margin: float = MARGIN,
            labels: Mapping[Path, str] | None = None, command: str = "analysis.compare.compare") -> tuple[str, list[Path]]:
    """Compares the runs at `paths` and writes everything into `output`; returns the page and the files written.

    `margin`: points of accuracy. `command`: what the page names as its origin. Raises UserError for what cannot be compared.
    """
    from analysis import tables  # loads torch: --help and a wrong command line are answered without
    from analysis.pictures import write_pictures
    from utils.runs.files import write_bytes

    found, streams, baselines = read_streams(paths, labels, baseline, margin)
    make_output(output)
    pictures = [write_pictures(stream, output) for stream in streams]
    page = tables.page(streams, found, baselines, margin, pictures, command)
    texts = {"comparison.md": page, "comparison.csv": tables.runs_csv(streams), "summary.csv": tables.summary_csv(streams),
             "differences.csv": tables.differences_csv(streams, baselines, margin)}
    for name, text in texts.items():
        write_bytes(output / name, text.encode())
    return page, [output / name for name in [*texts, *(file for shown in pictures for _, file in shown)]]


def read_streams(paths: Sequence[Path], labels: Mapping[Path, str] | None, baseline: str | None, margin: float
                 ) -> "tuple[Found, list[Stream], list[Method | None]]":
    """The runs at `paths`, their streams, and for each stream the method that the others are compared with.

    A stream has None where no method has the name `baseline`. Raises UserError for what cannot be compared.
    """
    from analysis.records import find_runs, group_runs

    if not 0 < margin < 100:
        raise UserError(f"--margin: {margin:g} is not a difference in points of accuracy; choose one above 0 and below 100.")
    found = find_runs(paths, labels)
    if not found.runs:
        raise UserError(f"{paths[0]}: no run is finished yet ({found.unfinished[0]}); finish one first.")
    streams = group_runs(found.runs)
    baselines = [_baseline(stream.methods, baseline) for stream in streams]
    if baseline is not None and not any(baselines):
        names = [method.name for stream in streams for method in stream.methods]
        raise UserError(f"--baseline: no method is called '{baseline}'; choose one of {', '.join(dict.fromkeys(names))}."
                        f"{nearest(baseline, names)}")
    return found, streams, baselines


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the comparison and says where it was written; returns the exit status: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    def work() -> None:
        if options.brief:
            from analysis.brief import brief

            _, streams, baselines = read_streams(options.runs, labels_of(options.label), options.baseline, options.margin)
            print(brief(streams, baselines), flush=True)
            return
        page, written = compare(options.runs, options.output, options.baseline, options.margin, labels_of(options.label),
                                shlex.join(["python", "-m", "analysis.compare", *arguments]))
        print(page)
        print("Written: " + ", ".join(str(path) for path in written), flush=True)

    return status_of(work)


def _baseline(methods: Sequence["Method"], name: str | None) -> "Method | None":
    """The method of that name, None where it is not there; without a name SD-LoRA, else the first."""
    by_name = {method.name: method for method in methods}
    if name is not None:
        return by_name.get(name)
    return by_name.get(DEFAULT_BASELINE, methods[0])


def labels_of(given: Sequence[str]) -> dict[Path, str]:
    """What `--label PATH=NAME` asks for; raises UserError for an argument of another form."""
    labels = {}
    for argument in given:
        path, equals, name = (part.strip() for part in argument.rpartition("="))
        if not path or not equals or not name:
            raise UserError(f"--label: '{argument}' is not PATH=NAME; write for example runs/quickstart=gated.")
        labels[Path(path)] = name
    return labels


if __name__ == "__main__":
    sys.exit(main())
