"""What the tests of studies share: a stand-in for main.py, which makes a run within milliseconds, and studies of such runs."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import main as command
from tests.helpers import SMALL
from utils.runs.progress import LOGGER

# Every start adds a line to `begun`; after each of three tasks there is a record, whose accuracy is best where init_lr is 0.1.
# What else it does is in the config's `prefix`; "hang" waits for the file `go` beside the script, or for a signal, after which
# the run is saved and the next start goes on.
STAND_IN = """
import hashlib, json, os, signal, sys, time
from pathlib import Path
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder, deed = Path(config["filepath"]), config["prefix"]
stopped = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: stopped.append(number))
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config))
start = {"pid": os.getpid(), "at": time.time(), "threads": os.environ["OMP_NUM_THREADS"], "device": config["device"]}
with open(folder / "begun", "a") as file:
    file.write(json.dumps(start) + "\\n")
went_on = (folder / "saved").exists()
print("on stdout")
if deed == "fail" or deed == "fail without gate" and config["gate"] == "none":
    sys.exit("first line\\nerror: the reason")
if deed == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if deed == "warned" and not went_on:  # by Slurm itself, as `scancel --signal=USR1` does
    stopped.append(signal.SIGUSR1)
late = deed == "late" and int(folder.parent.name.removeprefix("trial_")) >= 5  # these are worse, and wait after every task
top = 50 if late else 90 - 100 * abs(config["init_lr"] - 0.1)
end = {"slow": 0.1, "hang": 0 if went_on else 1e9, "late": 60 * late}.get(deed, 0)
curve = []
for task in range(3):
    curve.append(top - 10 * task)
    entry = {"seen_classes": 2 * task + 2, "counts": {"images": [1]}, "stored_bytes": int(1000 * config["init_lr"]),
             "probe": [[1.5]]}
    record = {"finished": task == 2, "config": config, "seed": config["seed"][0], "tasks": [entry] * (task + 1),
              "class_order_sha256": str(config["seed"][0]), "went_on": went_on, "ended": time.time(),
              "backbone": {"name": "vit", "tag": "", "source": "random", "sha256": ""},
              "metrics": {"top1_curve": curve, "last_accuracy": curve[-1],
                          "average_accuracy": None if deed == "joint" else sum(curve) / len(curve)}}
    record["sha256"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (folder / "part").write_text(json.dumps(record))
    os.replace(folder / "part", folder / "results.json")
    until = time.time() + end
    while time.time() < until and not stopped and not Path(sys.argv[0]).with_name("go").exists():
        time.sleep(0.01)
    if stopped:
        (folder / "saved").touch()
        sys.exit(75 if stopped[0] == signal.SIGUSR1 else 128 + stopped[0])
"""

# Of a search.
SPACE = {"init_lr": {"low": 0.01, "high": 0.5}, "gate": ["gumbel_sparsemax", "none"],
         "lambda_sparsity": {"low": 0.001, "high": 0.1, "log": True}}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that studies start in place of main.py."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(command, "__file__", str(script))
    return script


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the program logs."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    LOGGER.addHandler(handler)
    LOGGER.setLevel("INFO")
    yield texts
    LOGGER.removeHandler(handler)


def write_study(folder: Path, changes: dict | None = None, **keys) -> Path:
    """A study of small runs on the digits in `folder`, which writes its runs to `folder/runs`; a key that is `...` is left
    out."""
    (folder / "base.json").write_text(json.dumps({**SMALL, "nb_tasks": 2, **(changes or {})}))
    path = folder / "study.json"
    values = {"base": "base.json", "seed": [1, 2], "filepath": str(folder / "runs"), **keys}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return path


def write_search(folder: Path, changes: dict | None = None, **keys) -> Path:
    """As `write_study`: a search of six trials."""
    return write_study(folder, changes, **{"seed": 1, "search": SPACE, "trials": 6, **keys})


def start(path: Path, *arguments: str) -> int:
    """The exit status of main.py on a study."""
    return command.main(["--config", str(path), *arguments])


def starts(folder: Path) -> list[dict]:
    """What the stand-in has noted at each of its starts of the run in `folder`."""
    if not (folder / "begun").exists():
        return []
    whole, _, _ = (folder / "begun").read_text().rpartition("\n")  # the newest line may be half written
    return [json.loads(line) for line in whole.splitlines()]
