"""Command line: a finished task's network in a format that others can load without this repository.

    python -m analysis.export runs/quickstart exported/quickstart --to onnx
"""

import argparse
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from utils.errors import UserError, status_of

NAMES = ("timm", "peft", "torchscript", "onnx")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.export",
        description="Write the network of a run in a format that loads without this repository, with a model card beside it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n"
               "  timm         a checkpoint with merged weights and the head as classifier\n"
               "  peft         a LoRA adapter folder per kept adapter, and the head\n"
               "  torchscript  the whole network, any head and routed inference included\n"
               "  onnx         the same; needs the packages onnx, onnxscript and onnxruntime")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, with its results.json")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write; it must be new or empty")
    parser.add_argument("--to", required=True, choices=NAMES, help="format, see below")
    parser.add_argument("--task", type=int, metavar="T", help="the network after this task (default: the newest)")
    parser.add_argument("--license", metavar="NAME", help="licence of the exported model, for the card")
    parser.add_argument("--data-license", metavar="NAME", help="licence of the data, for the card")
    return parser.parse_args(arguments)


def export(run: Path, output: Path, to: str, task: int | None = None, licence: str | None = None,
           data_licence: str | None = None) -> str:
    """Writes the network after `task` (default: the newest) of the run in `run` to the folder `output`, in the format `to`;
    returns what has been done in a sentence.

    The folder appears whole or not at all. Raises UserError for one that holds anything, for files that are not the run's, and
    for a network that the format cannot express.
    """
    _check_free(output)
    from analysis.export_card import card  # loads torch: a wrong command line is answered without
    from analysis.export_formats import FORMATS, Source
    from analysis.finished import open_network

    source = Source(*open_network(run, task))
    with _appearing(output) as folder:
        exported = FORMATS[to](source, folder)
        (folder / "README.md").write_text(card(source, to, exported, licence, data_licence), encoding="utf-8")
    differs = "" if exported.difference is None else (
        f"; loaded again, its logits differ by at most {exported.difference:.1e} of the largest")
    return f"{output}: the network of {run} after task {source.saved.task}, {source.classes} classes, as {to}{differs}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the files and lists them; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)
    def work() -> None:
        print(export(options.run, options.output, options.to, options.task, options.license, options.data_license))
        for path in sorted(options.output.rglob("*")):
            if path.is_file():
                print(f"  {path.relative_to(options.output).as_posix():40} {path.stat().st_size:>12,} bytes", flush=True)

    return status_of(work)


def _check_free(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"OUT: '{output}' is a file; name a folder that is new or empty.")
    try:
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"OUT: '{output}' is not empty and stays as it is; name a folder that is new or empty.")
    except OSError as error:
        raise UserError(f"OUT: '{output}' cannot be read ({error.strerror}); name another folder.") from error


@contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write into, which takes its name when all is there and goes when anything fails."""
    staged = output.absolute().with_name(f".{output.absolute().name}.{secrets.token_hex(4)}.part")
    try:
        staged.mkdir(parents=True)
        yield staged
        staged.replace(output.absolute())  # an empty folder gives way
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"OUT: '{output}' could not be written ({reason}); name another folder.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
