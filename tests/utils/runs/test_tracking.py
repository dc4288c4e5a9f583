"""utils/runs/tracking.py: what trackers get of a run, also of an interrupted one, and what becomes of trackers that fail.

TensorBoard's files are read back by its own reader; where it is not installed these tests are skipped.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from accelerate import tracking as accelerate_tracking

import trainer
from main import main
from tests.helpers import ROOT, learner_of, pictures, small_config, small_values
from utils.config import config_from_dict
from utils.config.rules import Tracker
from utils.errors import UserError
from utils.runs import tracking
from utils.runs.folder import differences
from utils.runs.progress import LOGGER
from utils.runs.tracking import Kind, Tracking, check

TWO_TASKS = {"nb_tasks": 2, "init_epoch": 2, "epochs": 2, "batch_size": 128, "checkpoint_minutes": 1000}
VARY = ("seconds/", "size/peak_memory")  # from run to run


def read_events(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], list[str], str]:
    """Scalars by tag as (step, value), tags of images, and the config's text, of the one TensorBoard run in `folder`."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert {path.parent for path in folder.rglob("events.out.tfevents.*")} == {folder / "tensorboard"}
    events = reader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    text, = events.Tensors("config/text_summary")
    return scalars, events.Tags()["images"], text.tensor_proto.string_val[0].decode()


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder and record of a gated run of two tasks under TensorBoard."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("tracked") / "run"
    with pictures():
        result, = trainer.run(small_config(folder, **TWO_TASKS, trackers=["tensorboard"]))
    return folder, result


def test_tensorboard_gets_what_the_run_measures(tracked) -> None:
    folder, result = tracked
    scalars, images, config = read_events(folder)
    steps = [3, 6, 7, 10, 13, 14]  # of two epochs and the end of task 0, then of task 1
    assert [step for step, _ in scalars["beta/adapter_0"]] == steps
    for name in ("train/loss", "train/clf", "train/sparse", "train/tau", "train/accuracy", "test/accuracy",
                 "lr/adapter", "lr/head", "lr/magnitudes", "lr/gate"):
        assert [step for step, _ in scalars[name]] == [3, 6, 10, 13], name
    for (_, loss), (_, clf), (_, sparse) in zip(*(scalars[f"train/{name}"] for name in ("loss", "clf", "sparse"))):
        assert loss == pytest.approx(clf + sparse, abs=1e-5)
    assert scalars["lr/gate"][0][1] == pytest.approx(0.2) and scalars["lr/adapter"][0][1] == pytest.approx(0.01)
    assert [tau for _, tau in scalars["train/tau"]][1] < scalars["train/tau"][0][1]

    ends = {7: result["tasks"][0], 14: result["tasks"][1]}
    matrix = result["metrics"]["accuracy_matrix"]

    def after(name: str) -> dict[int, float]:
        return {step: value for step, value in scalars[name] if step in ends}

    assert after("accuracy/last") == pytest.approx(dict(zip(ends, result["metrics"]["top1_curve"])))
    assert after("accuracy/average")[14] == pytest.approx(result["metrics"]["average_accuracy"])
    assert after("accuracy/task_0") == pytest.approx({7: matrix[0][0], 14: matrix[1][0]})
    assert after("accuracy/task_1") == pytest.approx({14: matrix[1][1]})
    for adapter in range(2):
        for name, key in (("beta", "beta_after"), ("beta_decided", "beta_values")):
            expected = {step: entry[key][adapter] for step, entry in ends.items() if adapter < len(entry[key])}
            assert after(f"{name}/adapter_{adapter}") == pytest.approx(expected)
    assert after("adapters/kept") == {step: entry["active_adapters"] for step, entry in ends.items()}
    assert after("seconds/task") == pytest.approx({step: entry["seconds"] for step, entry in ends.items()})
    assert sorted(images) == ["accuracy", "gates", "growth"]
    assert "| seed | 1993 |" in config and "| lambda_sparsity | 0.01 |" in config


def test_an_interrupted_run_goes_on_in_the_same_one(tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies after an epoch that is tracked and in no checkpoint: that epoch is learned again, and not shown twice."""
    config, after_step = small_config(tmp_path / "run", **TWO_TASKS, trackers=["tensorboard"]), trainer.Run.after_step

    def die(run: trainer.Run) -> None:
        after_step(run)
        if run.steps == 11:
            raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.Run, "after_step", die)
        trainer.run(config)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text())["step"] == 10
    trainer.run(config)
    expected, _, text = read_events(tracked[0])
    again, _, same_text = read_events(tmp_path / "run")
    assert text.replace(str(tracked[0]), str(tmp_path / "run")) == same_text
    assert {name: points for name, points in again.items() if not name.startswith(VARY)} == {
        name: points for name, points in expected.items() if not name.startswith(VARY)}
    assert [step for step, _ in again["seconds/task"]] == [7, 14]


@pytest.mark.parametrize("choice, rates", [
    ({"gate": "none"}, {"adapter", "head", "magnitudes"}), ({"inference": "routed"}, {"adapter", "head", "gate"}),
    ({"model_name": "l2p"}, {"prompts and head"}), ({"model_name": "finetune_head"}, {"head"})])
def test_methods_name_their_learning_rates(choice: dict[str, Any], rates: set[str]) -> None:
    given: list[dict[str, float]] = []

    class Listener(trainer.Quiet):
        def track(self, figures: dict[str, float]) -> None:
            given.append(figures)

    learner = learner_of(small_config(**small_values(**choice, batch_size=128)), Listener())
    learner.begin_task(0)
    learner.train()
    assert {name.removeprefix("lr/") for name in given[-1] if name.startswith("lr/")} == rates
    assert all(isinstance(value, float) for value in given[-1].values())


def test_methods_without_optimizer_steps_are_tracked_by_task(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer.run(small_config(tmp_path / "run", model_name="simplecil", nb_tasks=2, trackers=["tensorboard"]))
    scalars, _, _ = read_events(tmp_path / "run")
    assert scalars["task"] == [(1, 0.0), (2, 1.0)] and "beta/adapter_0" not in scalars and "train/loss" not in scalars


@pytest.mark.slow
def test_of_two_processes_one_tracks(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    path = tmp_path / "config_file.json"
    values = small_values(**TWO_TASKS, trackers="tensorboard", device=["cpu", "cpu"], filepath=str(tmp_path / "run"))
    path.write_text(json.dumps(values))
    subprocess.run([sys.executable, "main.py", f"--config={path}"], cwd=ROOT, check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert len(list((tmp_path / "run").rglob("events.out.tfevents.*"))) == 1
    assert [step for step, _ in read_events(tmp_path / "run")[0]["accuracy/last"]] == [7, 14]


# ---- a tracker that can be told to fail

class Network:
    """A tracker of Accelerate's kind, and what all of them have been given."""

    given: list[tuple[Any, ...]] = []
    down = False

    def __init__(self, name: str, identity: str | None) -> None:
        self.name, self.identity = name, identity

    def start(self) -> None:
        self.note("start", self.identity)

    def log(self, values: dict[str, float], step: int) -> None:
        self.note("log", step, values)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.note("config", values)

    def finish(self) -> None:
        self.note("finish")

    def note(self, *what: Any) -> None:
        if self.down and self.name == "wandb":
            raise ConnectionError("no route to host\nand more")
        self.given.append((self.name, *what))


class Remote(Kind):
    """As `Network` wants it."""

    package = "a_package"

    def __init__(self, name: str) -> None:
        self.name = name

    def options(self, folder: Path, title: str, identity: str | None) -> dict[str, Any]:
        return {"name": self.name, "identity": identity}

    def identity(self, tracker: Any) -> str:
        return f"id of {self.name}"

    def show(self, tracker: Any, paths: list[Path], step: int) -> None:
        tracker.note("show", *paths)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> type[Network]:
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, name, Network)
        monkeypatch.setitem(tracking.KINDS, name, Remote(name))
    monkeypatch.setattr(Network, "given", [])
    monkeypatch.setattr(Network, "down", False)
    return Network


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    LOGGER.addHandler(handler)
    yield lines
    LOGGER.removeHandler(handler)


def test_a_tracker_that_fails_is_left_out_with_one_warning(network: type[Network], warnings: list[str], tmp_path) -> None:
    trackers = Tracking(["wandb", "mlflow"], tmp_path, {"rate": 0.1, "seeds": [1, 2]})
    trackers.log({"loss": 1.0}, 1)
    network.down = True
    trackers.log({"loss": 0.5}, 2)
    trackers.log({"loss": 0.2}, 3)
    trackers.show([tmp_path / "a.png"], 3)
    trackers.close()
    assert warnings == ["trackers: 'wandb' has failed (no route to host) and gets nothing more; the run goes on without it."]
    assert [each for each in network.given if each[0] == "wandb"] == [
        ("wandb", "start", None), ("wandb", "config", {"rate": 0.1, "seeds": "[1, 2]"}), ("wandb", "log", 1, {"loss": 1.0})]
    assert [each[1:3] for each in network.given if each[0] == "mlflow"][2:] == [
        ("log", 1), ("log", 2), ("log", 3), ("show", tmp_path / "a.png"), ("finish",)]


def test_a_run_goes_on_under_the_name_that_the_tracker_gave_it(network: type[Network], tmp_path: Path) -> None:
    first = Tracking(["wandb"], tmp_path, {})
    first.log({"loss": 1.0}, 5)
    first.close()
    network.given.clear()
    again = Tracking(["wandb", "mlflow"], tmp_path, {})
    for step in (4, 5, 6):
        again.log({"loss": 1.0}, step)
    assert network.given == [("wandb", "start", "id of wandb"), ("mlflow", "start", None), ("mlflow", "config", {}),
                             ("wandb", "log", 6, {"loss": 1.0}), ("mlflow", "log", 6, {"loss": 1.0})]


def test_a_tracker_that_cannot_begin_refuses_the_run_and_later_only_warns(network: type[Network], warnings, tmp_path) -> None:
    network.down = True
    with pytest.raises(UserError, match="'wandb' cannot begin the run .no route to host.; mend that, or leave it out"):
        Tracking(["mlflow", "wandb"], tmp_path, {})
    assert network.given[-1] == ("mlflow", "finish") and not warnings and not list(tmp_path.iterdir())
    network.down = False
    Tracking(["wandb", "mlflow"], tmp_path, {}).close()
    network.down = True
    Tracking(["wandb", "mlflow"], tmp_path, {}).log({"loss": 1.0}, 1)
    assert len(warnings) == 1 and "'wandb' cannot go on with the run (no route to host)" in warnings[0]
    assert network.given[-1] == ("mlflow", "log", 1, {"loss": 1.0})
    (tmp_path / "trackers.json").write_text('{"step": "x"}')
    with pytest.raises(UserError, match="trackers.json: cannot be read .*; remove it"):
        Tracking(["mlflow"], tmp_path, {})


# ---- names, packages, and what identifies a run

def test_a_missing_package_is_said_before_anything_is_written(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    path = tmp_path / "config_file.json"
    path.write_text(json.dumps({**small_values(), "filepath": str(tmp_path / "run"), "trackers": ["mlflow"]}))
    for more in ([], ["--dry-run"]):
        assert main([f"--config={path}", *more]) == 2
        assert capsys.readouterr().err == (
            "error: trackers: 'mlflow' needs the package mlflow, which is not installed; run: pip install mlflow\n")
    assert not (tmp_path / "run").exists()
    check([])


@pytest.mark.parametrize("value, ending", [
    (["tensorbord"], "Did you mean 'tensorboard'?"), ("wand", "Did you mean 'wandb'?"),
    (["mlflow", "mlflow"], '"mlflow".'), (["comet"], '"mlflow".'), (3, '"mlflow".'), ({}, '"mlflow".')])
def test_other_names_are_refused(value: Any, ending: str) -> None:
    with pytest.raises(UserError, match="'trackers' is .*; it must be a list of different ones of") as refusal:
        config_from_dict(small_values(trackers=value))
    assert str(refusal.value).endswith(ending)


def test_the_config_knows_the_trackers_that_there_are() -> None:
    assert list(get_args(Tracker)) == list(tracking.KINDS)
    assert small_config(trackers="wandb").trackers == ["wandb"] and small_config().trackers == []


def test_trackers_do_not_tell_runs_apart() -> None:
    config = small_config(trackers=["tensorboard"])
    old = {key: value for key, value in config.model_dump(mode="json").items() if key != "trackers"}
    assert differences(old, config, "old") == differences({**old, "trackers": ["wandb"]}, config, "other") == ""
