"""Command line: a run or a study as one self-contained page.

    python -m analysis.report runs/quickstart -o report.html
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.command import add_runs
from analysis.compare import DEFAULT_BASELINE, MARGIN, labels_of, read_streams
from utils.errors import status_of

OUTPUT = Path("report.html")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.report",
        description="Write one HTML page about finished runs: accuracy, gate weights, growth, forgetting and confusion task "
                    "by task, the comparison of methods with its tests, configs and files. The page needs no network.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  python -m analysis.report runs/quickstart -o report.html\n"
               "  python -m analysis.report exps/studies/routed_domains.json --baseline sdlora -o report.html")
    add_runs(parser)
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT, metavar="FILE",
                        help=f"where to write the page (default: {OUTPUT}); an older report is replaced")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE even if it is something else than a report")
    parser.add_argument("--baseline", metavar="NAME",
                        help=f"the method that the others are compared with (default: {DEFAULT_BASELINE} if it is there, else "
                             "the first)")
    parser.add_argument("--margin", type=float, default=MARGIN, metavar="POINTS",
                        help=f'points of accuracy up to which a method is "no worse" or "equal" (default: {MARGIN})')
    return parser.parse_args(arguments)


def report(paths: Sequence[Path], output: Path = OUTPUT, baseline: str | None = None, margin: float = MARGIN,
           labels: Mapping[Path, str] | None = None, overwrite: bool = False,
           command: str = "analysis.report.__main__.report") -> None:
    """Writes the page about the runs at `paths` to `output`.

    `margin`: points of accuracy. `command`: what the page names as its origin. Raises UserError for runs that cannot be
    compared, for an `output` that is no older report unless `overwrite`, and for a missing package.
    """
    from analysis.report.page import check_output, check_packages, page  # loads torch: --help is answered without
    from utils.runs.files import write_bytes

    check_output(output, overwrite)
    check_packages()
    found, streams, baselines = read_streams(paths, labels, baseline, margin)
    write_bytes(output, page(found, streams, baselines, margin, output.parent, command).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and says where; returns the exit status: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    def work() -> None:
        report(options.runs, options.output, options.baseline, options.margin, labels_of(options.label), options.overwrite,
               shlex.join(["python", "-m", "analysis.report", *arguments]))
        print(f"Written: {options.output} ({options.output.stat().st_size / 1e6:.1f} MB)", flush=True)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
