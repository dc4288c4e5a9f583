"""The folder of a run: whose it is, what it already holds, and how it is set aside."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config import Config, config_of_record
from utils.errors import UserError
from utils.runs.files import read_sealed_json, remove_leftovers, write_json
from utils.runs.lock import LOCK_FILE, lock

# Keys that do not change what a run computes; a run may be continued with other values of these.
NOT_COMPARED = frozenset({"device", "num_workers", "prefix", "filepath", "compile", "checkpoint_minutes", "checkpoint_steps",
                          "trackers"})
_OF_A_RUN = ("beta_values_task_*.pt", "head_task_*.safetensors", "checkpoint_*.ckpt")


def folder_of(config: Config, seed: int) -> Path:
    """`filepath`, or `filepath/seed_<seed>` where the config has several seeds."""
    root = Path(config.filepath)
    return root if len(config.seed) == 1 else root / f"seed_{seed}"


def of_seed(config: Config, seed: int) -> Config:
    """The config of one run: the same with a single seed."""
    return config.model_copy(update={"seed": [seed], "filepath": str(folder_of(config, seed))})


def claim(folder: Path, config: Config) -> None:
    """Makes the locked folder ready for a run of `config`; refuses one that belongs to another config, naming the keys."""
    check_owner(folder, config)
    remove_leftovers(folder)
    if not (folder / "config.json").exists():
        write_json(folder / "config.json", config.model_dump(mode="json"))


def check_owner(folder: Path, config: Config) -> None:
    """As `check_place` and `check_config`."""
    check_place(folder)
    check_config(folder, config)


def check_place(folder: Path) -> None:
    """Raises UserError if `folder` cannot be made or written into."""
    place = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not place.is_dir():
        raise UserError(f"filepath: '{place}' is a file, not a folder; choose another one.")
    if not os.access(place, os.W_OK):
        raise UserError(f"filepath: nothing may be written into '{place}'; choose another folder.")


def check_config(folder: Path, config: Config) -> None:
    """Raises UserError if `folder` holds a run of another config, or files of a run and nothing that says of which."""
    saved, record = folder / "config.json", folder / "results.json"
    if not saved.exists() and not record.exists():
        if any(path for pattern in _OF_A_RUN for path in folder.glob(pattern)):
            raise UserError(f"filepath: '{folder}' holds files of a run without its config.json; choose another folder or use "
                            "--overwrite to set it aside.")
        return
    try:
        old = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else read_sealed_json(record)["config"]
        shown = differences(old, config, str(saved if saved.exists() else record))
    except UserError:
        raise
    except (OSError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{saved}: cannot be read as the config of a run ({error}); choose another 'filepath' or use "
                        "--overwrite to set the folder aside.") from error
    if shown:
        raise UserError(f"filepath: '{folder}' belongs to a run of another config, different in {shown}; choose another "
                        "folder or use --overwrite to set it aside.")


def differences(old: dict[str, Any], config: Config, source: str) -> str:
    """In what `old`, a run's config as JSON has it, would compute something else than `config`; empty if in nothing.

    Of a key that is younger than the run its default counts, and of one without effect nothing. Raises UserError, which
    names `source` as where `old` comes from.
    """
    before, now = config_of_record(old, source).model_dump(mode="json"), config.model_dump(mode="json")
    return ", ".join(f"{key} (there {json.dumps(before.get(key))}, now {json.dumps(now.get(key))})"
                     for key in {**now, **before} if key not in NOT_COMPARED and before.get(key) != now.get(key))


def finished_result(folder: Path) -> dict[str, Any] | None:
    """The record of a run that has ended, None where there is none or it is not finished."""
    path = folder / "results.json"
    result = read_sealed_json(path) if path.exists() else {}
    return result if result.get("finished") else None


def committed_form(result: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run as it is committed: without the `probe` of its tasks, which is only compared with the network that
    the other files in the run's folder give."""
    tasks = [{key: value for key, value in entry.items() if key != "probe"} for entry in result["tasks"]]
    return {**result, "tasks": tasks}


def set_aside(folder: Path) -> Path | None:
    """Renames a folder that holds anything to `<folder>.old-<n>`; returns the new name, None where there was nothing.

    Refuses, like any other run, a folder that a run is working in, and one that the user is in.
    """
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"filepath: '{folder}' is the folder that you are in, or one above it, and is not set aside; choose "
                        "another one.")
    if not folder.is_dir() or all(path.name == LOCK_FILE for path in folder.iterdir()):
        return None
    with lock(folder):
        number = 1
        while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        try:
            return folder.rename(target)
        except OSError as error:
            raise UserError(f"filepath: '{folder}' cannot be renamed to '{target}' ({error.strerror}); move it by "
                            "hand.") from error
