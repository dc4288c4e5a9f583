"""Figures of a run for experiment trackers, over the tracker classes of Hugging Face Accelerate.

Only the main process of a run tracks. A run is found again by what `trackers.json` in its folder says, so that an interrupted
run goes on in the same run of every tracker. A tracker that fails while figures come is left out from then on; the run itself
never depends on one.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.runs.distributed import accelerate_state
from utils.runs.files import write_json
from utils.runs.progress import LOGGER

PROJECT = "gumbel-cl-lora"  # what the runs of all configs are filed under, in trackers that have projects
FILE = "trackers.json"


class Kind:
    """What is particular to one of Accelerate's trackers. package: what has to be installed for it."""

    package: str

    def options(self, folder: Path, title: str, identity: str | None) -> dict[str, Any]:
        """The arguments of Accelerate's class for the run in `folder`, called `title`; with the `identity` that the tracker
        gave the run earlier it goes on there."""
        raise AssertionError("every tracker finds its runs in its own way")

    def identity(self, tracker: Any) -> str:
        """By what the tracker finds the run again."""
        raise AssertionError("every tracker finds its runs in its own way")

    def describe(self, tracker: Any, config: Mapping[str, Any]) -> None:
        """Hands over the config, once in the life of a run; values are text, numbers, true or false."""
        tracker.store_init_configuration(dict(config))

    def show(self, tracker: Any, pictures: Sequence[Path], step: int) -> None:
        """Hands over pictures, by the names of their files."""
        raise AssertionError("every tracker takes pictures in its own way")


class TensorBoard(Kind):
    """Event files in the run's folder."""

    package = "tensorboard"

    def options(self, folder: Path, title: str, identity: str | None) -> dict[str, Any]:
        return {"run_name": "tensorboard", "logging_dir": folder}

    def identity(self, tracker: Any) -> str:
        return tracker.run_name

    def describe(self, tracker: Any, config: Mapping[str, Any]) -> None:
        """A table of text: Accelerate would write hyperparameters, which TensorBoard lists as a second run."""
        rows = [f"| {key} | {value} |" for key, value in config.items()]
        tracker.log({"config": "\n".join(["| key | value |", "| --- | --- |", *rows])}, step=0)

    def show(self, tracker: Any, pictures: Sequence[Path], step: int) -> None:
        tracker.log_images({path.stem: _pixels(path)[None] for path in pictures}, step=step, dataformats="NHWC")


class WandB(Kind):
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like are honoured."""

    package = "wandb"

    def options(self, folder: Path, title: str, identity: str | None) -> dict[str, Any]:
        import wandb

        settings = wandb.Settings(console="off")  # the log lines are in train.log, and stdout stays the run's own
        return {"run_name": os.environ.get("WANDB_PROJECT", PROJECT), "name": title, "dir": str(folder), "id": identity,
                "resume": "allow", "settings": settings}

    def identity(self, tracker: Any) -> str:
        return tracker.tracker.id

    def show(self, tracker: Any, pictures: Sequence[Path], step: int) -> None:
        tracker.log_images({path.stem: [_pixels(path)] for path in pictures}, step=step)


class MLflow(Kind):
    """A run of MLflow, in the store that MLFLOW_TRACKING_URI names."""

    package = "mlflow"

    def options(self, folder: Path, title: str, identity: str | None) -> dict[str, Any]:
        return {"experiment_name": PROJECT, "run_name": title, "run_id": identity}

    def identity(self, tracker: Any) -> str:
        return tracker.tracker.info.run_id

    def show(self, tracker: Any, pictures: Sequence[Path], step: int) -> None:
        for path in pictures:
            tracker.log_artifact(str(path), "pictures")


KINDS: dict[str, Kind] = {"tensorboard": TensorBoard(), "wandb": WandB(), "mlflow": MLflow()}


def check(names: Iterable[str]) -> None:
    """Raises UserError, with the command that installs it, if a tracker's package is not there."""
    for name in names:
        from accelerate import tracking  # takes a moment, and is only needed where a tracker is named

        if name not in [str(available) for available in tracking.get_available_trackers()]:
            package = KINDS[name].package
            raise UserError(f"trackers: '{name}' needs the package {package}, which is not installed; run: pip install "
                            f"{package}")


class Tracking:
    """The trackers of one run, begun or gone on with. Without names it does nothing and writes nothing.

    Every point has a step, which grows with the run. A run that goes on from a checkpoint comes by the points after it once
    more; those that the trackers have had already are left out.
    Raises UserError if a tracker cannot begin the run; one that cannot go on with it is left out with a warning.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self.names, self.folder, self.config = list(names), folder, _plain(config)
        self.trackers: dict[str, Any] = {}
        self.last, self.runs = -1, {}
        if not names:
            return
        self._read()
        self._had = self.last  # what the trackers have had before
        begun = bool(self.runs)
        for name in names:
            try:
                self._start(name)
            except Exception as error:
                if not begun:
                    self.close()
                    raise UserError(f"trackers: '{name}' cannot begin the run ({_words(error)}); mend that, or leave it out "
                                    "of 'trackers', then run the same command again.") from error
                self._leave_out(name, "cannot go on with the run", error)
        self._write()

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Figures by name, at a step that is not below earlier ones."""
        if not self.trackers or step <= self._had:
            return
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.log, dict(figures), step)
        self.last = step
        self._write()

    def show(self, pictures: Sequence[Path], step: int) -> None:
        """PNG files, at the end of the run."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, KINDS[name].show, tracker, pictures, step)

    def close(self) -> None:
        """Ends what was begun, whether the run has finished or is to go on later."""
        for name, tracker in list(self.trackers.items()):
            self._try(name, tracker.finish)
        self.trackers = {}

    def _start(self, name: str) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        accelerate_state()
        kind, identity = KINDS[name], self.runs.get(name)
        title = "/".join(self.folder.resolve().parts[-2:])
        tracker = LOGGER_TYPE_TO_CLASS[name](**kind.options(self.folder, title, identity))
        tracker.start()
        self.trackers[name] = tracker
        self.runs[name] = kind.identity(tracker)
        if identity is None:
            kind.describe(tracker, self.config)

    def _try(self, name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever a tracker's package or the network may raise
            self._leave_out(name, "has failed", error)

    def _leave_out(self, name: str, what: str, error: Exception) -> None:
        self.trackers.pop(name, None)
        LOGGER.warning(f"trackers: '{name}' {what} ({_words(error)}) and gets nothing more; the run goes on without it.")

    def _read(self) -> None:
        path = self.folder / FILE
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_bytes())
            self.last, self.runs = int(saved["step"]), {str(name): str(run) for name, run in saved["runs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read ({_words(error)}); remove it, and the trackers begin the run "
                            "anew.") from error

    def _write(self) -> None:
        write_json(self.folder / FILE, {"step": self.last, "runs": self.runs})


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values as trackers take them: lists and null as their JSON."""
    return {key: value if isinstance(value, str | bool | int | float) else json.dumps(value) for key, value in config.items()}


def _pixels(path: Path) -> np.ndarray:
    """A picture as uint8 `[height, width, 3]`."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _words(error: Exception) -> str:
    """The first line of what an error says, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")
