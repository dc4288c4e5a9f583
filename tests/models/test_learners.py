"""What every method promises, for each of `LEARNERS`: a run on a real format, and a saved network that is the one evaluated.

That it goes on within a task to the same bits is in tests/test_interruption.py, that two processes learn what one does in
tests/utils/runs/test_distributed.py. A method that wants keys of its own in a tiny run has a line in `helpers.OF_METHOD`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import trainer
from main import main
from models import LEARNERS, load_network
from tests.data_files import write_cifar100
from tests.helpers import OF_METHOD, ROOT, method_values, test_images
from tests.tiny_backbone import TINY
from utils.config import config_from_dict, load_config
from utils.errors import UserError
from utils.runs.files import read_sealed_json, sha256_of, write_sealed_json


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    """CIFAR-100 as torchvision leaves it, 20 classes of it."""
    folder = tmp_path_factory.mktemp("data")
    write_cifar100(folder, classes=20)
    return folder


def config_of(name: str, folder: Path) -> Path:
    """The method's own file for CIFAR-100, or one that leaves every key of the method at its default."""
    path = ROOT / "exps" / f"{name}_c100.json"
    if not path.exists():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"dataset": "cifar224", "init_cls": 10, "model_name": name}))
    return path


@pytest.mark.parametrize("name", LEARNERS)
def test_its_config_runs_on_cifar_files(name: str, cifar: Path, tmp_path: Path, capsys) -> None:
    """Dry, and two tasks for as short as they can be, on a small network."""
    path, run = config_of(name, tmp_path), tmp_path / "run"
    short = {"init_epoch": 1, "epochs": 1, "alpha_epochs": 1, "eval_every": 0}
    keys = type(load_config(path)).model_fields
    changes = {**TINY, "data_path": cifar, "filepath": run, "nb_tasks": 2, "batch_size": 10,
               **{key: value for key, value in short.items() if key in keys}, **OF_METHOD.get(name, {})}
    command = ["--config", str(path), "--device", "cpu", "--seed", "1993"]
    command += [part for key, value in changes.items() for part in ("--set", f"{key}={value}".replace("False", "false"))]
    assert main([*command, "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["model_name"] == name and printed["split"]["train_images"] == [20, 20] and not run.exists()
    assert main(command) == 0
    record = json.loads((run / "results.json").read_text())
    assert record["finished"] and record["tasks"][-1]["seen_classes"] == 20
    assert sum(record["tasks"][-1]["counts"]["images"]) == 20
    first = record["tasks"][0]
    assert first["trainable_parameters"] == printed["trainable_parameters_task_0"] and first["stored_parameters"] > 0
    assert load_network(run, len(record["tasks"]) - 1)(torch.rand(1, 3, 16, 16)).shape == (1, 20)


@pytest.fixture(scope="module", params=LEARNERS)
def run(request, tmp_path_factory) -> trainer.Run:
    """A finished run of the method, two tasks of the digits."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    made = trainer.Run(config_from_dict({**method_values(request.param), "filepath": str(folder)}), 1993, folder,
                       torch.device("cpu"))
    made.finish()
    return made


def test_the_saved_network_gives_the_logits_of_the_learner(run: trainer.Run) -> None:
    """To the bit, however few images there are, and an image alone gets what it gets among others."""
    learner, network = run.learner, load_network(run.folder, run.learner.task)
    images = test_images(learner, 33)
    learner.start_evaluation()
    expected = learner.predict(images)
    assert torch.equal(network(images), expected) and expected.shape == (33, 4)
    assert expected.std(0).min() > 0, "logits differ from image to image"
    for count in range(1, 4):
        assert torch.equal(network(images[:count]), learner.predict(images[:count])), count
    torch.testing.assert_close(network(images[:1]), expected[:1], rtol=1e-4, atol=1e-4)


def test_what_is_not_the_run_s_is_refused(run: trainer.Run, tmp_path: Path) -> None:
    """A file of the task that is missing or changed, one that the method does not read, and a method that nobody knows."""
    task, names = run.learner.task, list(run.records[-1]["files"])
    for name in names:
        folder = shutil.copytree(run.folder, tmp_path / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name}: is not the file that the run wrote"):
            load_network(folder, task)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name}: there is no such file"):
            load_network(folder, task)
        (folder / name).write_bytes(data)
    record = read_sealed_json(folder / "results.json")
    (folder / "more.safetensors").write_bytes(data)
    record["tasks"][-1]["files"]["more.safetensors"] = sha256_of(folder / "more.safetensors")
    write_sealed_json(folder / "results.json", record)
    with pytest.raises(UserError, match="has written more.safetensors, which its class does not read"):
        load_network(folder, task)
    record["config"]["model_name"] = "nobody"
    write_sealed_json(folder / "results.json", record)
    with pytest.raises(UserError, match="'model_name' is \"nobody\""):
        load_network(folder, task)
