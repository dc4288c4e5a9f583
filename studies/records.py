"""The finished records of a study's runs: in the folders of the runs, and committed in the study's `results` folder."""

import json
from typing import TYPE_CHECKING, Any

from utils.config import config_from_dict
from utils.errors import UserError
from utils.runs import folder as run_folder
from utils.runs.files import read_sealed_json, write_bytes

if TYPE_CHECKING:
    from studies.study import Study, StudyRun


def own(run: "StudyRun") -> dict[str, Any] | None:
    """The finished record in the run's folder; raises UserError if that folder belongs to another config."""
    run_folder.check_owner(run.folder, run.config)
    return run_folder.finished_result(run.folder)


def committed(run: "StudyRun") -> dict[str, Any] | None:
    """The committed record of the run; raises UserError for one that is damaged, unfinished or of another config.

    A config key that the record does not have, being older than the key, counts as its default.
    """
    path = run.recorded
    if path is None or not path.exists():
        return None
    record = read_sealed_json(path)
    if not record.get("finished"):
        raise UserError(f"{path}: is the record of a run that is not finished; delete the file, or put a finished one there.")
    try:
        old = config_from_dict(record["config"], str(path)).model_dump(mode="json")
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no config of a run; delete the file to have this run made again.") from error
    new = run.config.model_dump(mode="json")
    differing = [key for key in new if key not in run_folder.NOT_COMPARED and old[key] != new[key]]
    if differing:
        shown = ", ".join(f"{key} (there {json.dumps(old[key])}, now {json.dumps(new[key])})" for key in differing)
        raise UserError(f"{path}: is the record of another config, different in {shown}; delete the file to have this run "
                        "made again, or add --set results=null to leave committed records out.")
    return record


def collect(study: "Study") -> str:
    """Copies finished records from the folders of the runs to `study.results`; what it did, in words.

    A copy is the file to the byte, so its checksum holds. A committed record of the same config is replaced; one of another
    config is refused, before anything is copied.
    """
    if study.results is None:
        raise UserError(f"{study.path}: has no 'results', the folder to collect records in; add it to the study.")
    runs = study.runs()
    already = {run.recorded for run in runs if committed(run)}
    finished = [run for run in runs if own(run)]
    for run in finished:
        try:
            run.recorded.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"results: the folder '{run.recorded.parent}' cannot be made ({error.strerror}).") from error
        write_bytes(run.recorded, (run.folder / "results.json").read_bytes())
    missing = len(runs) - len(already | {run.recorded for run in finished})
    return f"{len(finished)} records copied to {study.results}; of {len(runs)} runs {missing} have none yet."
