"""The network of a run, for commands that use it."""

from pathlib import Path

from models import SavedNetwork, load_network
from models.artifacts import SavedRun
from utils.errors import UserError


def open_network(folder: Path, task: int | None = None) -> tuple[SavedRun, SavedNetwork]:
    """The files and the network of the run in `folder` after `task`, by default the newest that it has finished.

    Raises UserError for a folder without a run, a task that is not finished, and files that are not the run's.
    """
    record = folder / "results.json"
    if not record.is_file():
        seeds = sorted(folder.glob("seed_*/results.json"))
        hint = f"the folder of one seed, such as '{seeds[0].parent}'" if seeds else "the folder of a run ('filepath')"
        raise UserError(f"{record}: there is no such file; name {hint}.")
    saved = SavedRun(folder, task)
    return saved, load_network(folder, saved.task).eval()
