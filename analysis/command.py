"""What the commands of this room share: what they take and write into."""

import argparse
import os
from pathlib import Path

from utils.errors import UserError


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Adds the finished runs that a command reads, and `--label` for what to call them."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN",
                        help="a results.json, a folder with runs anywhere below it, or a study file")
    parser.add_argument("--label", action="append", default=[], metavar="PATH=NAME",
                        help="call the runs at or below PATH by this NAME instead of their folder's; repeatable")


def positive(text: str) -> int:
    """An integer of at least 1 on a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 1")
    return int(text)


def make_output(folder: Path) -> None:
    """Makes the folder that `--output` writes into; raises UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: the folder '{folder}' cannot be made ({error.strerror}); choose another one.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output: nothing may be written into '{folder}'; choose another folder.")
