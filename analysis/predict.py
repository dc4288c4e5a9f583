"""Command line: what the newest network of a run sees in images.

    python -m analysis.predict runs/quickstart photos/ more/*.png
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.command import positive
from utils.errors import UserError, status_of

if TYPE_CHECKING:
    from models import SavedNetwork
    from models.artifacts import SavedRun


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.predict",
        description="The most probable classes of images by the network of a run, under the transform with which it tests; "
                    "with routed inference also which adapters an image has met.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run, with its results.json")
    parser.add_argument("images", nargs="+", metavar="IMAGES",
                        help='image files, folders (images at any depth) and patterns such as "photos/**/*.jpg"')
    parser.add_argument("--task", type=int, metavar="T", help="the network after this task (default: the newest)")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="classes to print for each image (default: 5)")
    parser.add_argument("--device", default="auto", metavar="NAME", help='"cpu", "auto" (default), or a CUDA device such as 0')
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Prediction:
    """An image, its most probable classes with their probabilities, the first the highest, and, of several networks, which one
    it met."""

    image: Path
    classes: list[tuple[str, float]]
    met: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.image}: {self.met}" if self.met else str(self.image)]
        return "\n".join([*lines, *(f"  {100 * probability:6.2f} %  {name}" for name, probability in self.classes)])


def predict(saved: "SavedRun", network: "SavedNetwork", images: Sequence[Path], top: int = 5,
            device: str = "auto") -> Iterator[Prediction]:
    """Predictions for image files in turn, a batch of the run's size at a time; probabilities are the softmax over all classes
    seen.

    Raises UserError for a file that is no image, and for a device that is not there.
    """
    import torch

    from utils.config import config_from_dict
    from utils.data.readers import PathReader
    from utils.runs.runtime import pick_device

    config = config_from_dict({**saved.config.model_dump(mode="json"), "device": device}, options={"device": "--device"})
    place, warnings = pick_device(config.device)
    for warning in warnings:
        print(warning, file=sys.stderr, flush=True)
    view, names, reader = saved.test_view(), saved.class_names(), PathReader(list(images), "IMAGES")
    network = network.to(place)
    for start in range(0, len(images), config.batch_size):
        numbers = range(start, min(start + config.batch_size, len(images)))
        batch = torch.stack([view(reader.read(number)) for number in numbers])
        probabilities, order = torch.sort(network(batch.to(place)).softmax(1), dim=1, descending=True, stable=True)
        met = network.met() or [None] * len(numbers)
        for number, row, columns, which in zip(numbers, probabilities.tolist(), order.tolist(), met, strict=True):
            best = [(names[column], value) for column, value in zip(columns[:top], row)]
            yield Prediction(images[number], best, which)


def image_files(named: Sequence[str]) -> list[Path]:
    """The files that the command line names, in its order: files as they are, folders as the images in them, and patterns as
    what they match.

    Raises UserError for a name that is nothing, and a folder or pattern without an image.
    """
    files = []
    for name in named:
        path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise UserError(f"IMAGES: '{name}' is no file or folder, and no pattern that matches any; name image files.")
        found = [file for match in matches for file in (_in_folder(match) if match.is_dir() else [match])]
        if not found:
            raise UserError(f"IMAGES: the folder '{name}' holds no image files; name another one.")
        files += found
    return list(dict.fromkeys(files))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the predictions; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    options = parse(arguments)
    def work() -> None:
        files = image_files(options.images)
        from analysis.finished import open_network  # loads torch: a wrong command line is answered without

        saved, network = open_network(options.run, options.task)
        print(f"{options.run}: the network after task {saved.task}, {len(saved.class_names())} classes")
        for prediction in predict(saved, network, files, options.top, options.device):
            print(prediction, flush=True)

    return status_of(work)


def _in_folder(folder: Path) -> list[Path]:
    from utils.data.folder import images_under

    return images_under(folder, "IMAGES")


if __name__ == "__main__":
    sys.exit(main())
