"""Whole runs on the formats of the real data sets, tiny ones, with timm ViTs that are not pretrained."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR100

from main import main
from models import load_network
from tests.data_files import class_pixels, pack_cifar, write_cifar100, write_class_folders, write_domainnet
from tests.helpers import ROOT, pictures, refusal
from tests.tiny_backbone import NAME, TINY
from tests.utils.config.test_config import OFFICIAL_FILES

# A step or two per task.
FAST = {**TINY, "device": "cpu", "init_epoch": 1, "epochs": 1, "batch_size": 16,
        "init_lr": 0.01, "lrate": 0.01, "rank": 2, "eval_every": 0}


def write_config(folder: Path, **values) -> Path:
    """A config file whose run goes to `folder/run`."""
    path = folder / "config.json"
    path.write_text(json.dumps({**FAST, "filepath": str(folder / "run"), **values}))
    return path


def sets(changes: dict) -> list[str]:
    """The changes as arguments of the command line."""
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def run(folder: Path, **values) -> dict:
    """Runs a config to its end; returns its results.json."""
    assert main(["--config", str(write_config(folder, **values))]) == 0
    return finished(folder / "run")


def finished(folder: Path) -> dict:
    """The record of a run that is whole: every task with its artifacts."""
    record = json.loads((folder / "results.json").read_text())
    tasks = len(record["tasks"])
    assert record["finished"] and [task["task"] for task in record["tasks"]] == list(range(tasks))
    for task, row in enumerate(record["metrics"]["accuracy_matrix"]):
        assert all(0 <= value <= 100 for value in row[: task + 1]) and row[task + 1 :] == [None] * (tasks - task - 1)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "split.json", "train.log", *(f"head_task_{task}.safetensors" for task in range(tasks))} <= names
    if record["config"]["model_name"] == "sdlora":
        for task, entry in enumerate(record["tasks"]):
            assert (f"adapter_task_{task}.safetensors" in names) is entry["kept"]
            assert len(torch.load(folder / f"beta_values_task_{task}.pt")["beta_values"]) == task + 1
    return record


# CIFAR-100


@pytest.mark.slow
def test_the_shipped_test_config_on_a_tiny_cifar_archive(tmp_path: Path, capsys) -> None:
    """exps/sdlora_c100_test.json as it is, but for the weights, the place of the data and the number of tasks."""
    pack_cifar(write_cifar100(tmp_path / "data"), CIFAR100)
    changes = {"backbone_type": "vit_tiny_patch16_224", "pretrained": "false", "data_path": tmp_path / "data",
               "filepath": tmp_path / "CF100_test", "nb_tasks": 2}
    assert main(["--config", str(ROOT / "exps/sdlora_c100_test.json"), *sets(changes)]) == 0
    record = finished(tmp_path / "CF100_test")
    assert record["class_order"] == np.random.RandomState(1993).permutation(100)[:20].tolist()
    assert [task["classes"] for task in record["tasks"]] == [10, 10]
    assert record["backbone"]["name"] == "vit_tiny_patch16_224" and record["backbone"]["source"] == "random"
    alphas = torch.load(tmp_path / "CF100_test" / "beta_values_task_1.pt")["alphas"]
    assert alphas.shape == (2, 12, 2)
    assert load_network(tmp_path / "CF100_test", 1)(torch.rand(1, 3, 224, 224)).shape == (1, 20)
    out = capsys.readouterr().out
    assert out.count("Saved: ") == 2 and "gumbel_anneal_rate" in out  # 0.999 does not arrive in so few steps: one warning


def test_an_official_sdlora_file_runs_with_one_warning(tmp_path: Path, capsys) -> None:
    """The file's own keys (memory_size, init_milestones, tuned_epoch, ...) stay; size and place are this machine's."""
    write_cifar100(tmp_path / "data")
    official = tmp_path / "official.json"
    official.write_text(json.dumps(OFFICIAL_FILES["sdlora_c100"]))
    changes = {"backbone_type": NAME, "pretrained": "false", "data_path": tmp_path / "data",
               "filepath": tmp_path / "run", "nb_tasks": 2, "init_epoch": 1, "epochs": 1}
    assert main(["--config", str(official), "--device", "cpu", *sets(changes)]) == 0
    record, out = finished(tmp_path / "run"), capsys.readouterr().out
    assert out.count("The official SD-LoRA code ignores these keys") == 1 and "memory_size" in out
    assert record["config"]["init_milestones"] == [60, 120, 170] and record["config"]["tuned_epoch"] == 20


def test_sdlora_as_published_on_cifar(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "data", classes=6)
    with pictures():
        record = run(tmp_path, dataset="cifar224", data_path=str(tmp_path / "data"), init_cls=2, gate="none")
    for name in ("accuracy.png", "gates.png", "growth.png"):
        with Image.open(tmp_path / "run" / name) as picture:
            assert min(picture.size) > 200
    assert [task["kept"] for task in record["tasks"]] == [True] * 3
    assert torch.load(tmp_path / "run" / "beta_values_task_2.pt")["beta_values"].tolist() == [1, 1, 1]


def test_simplecil_on_cifar_finds_the_colors(tmp_path: Path) -> None:
    write_cifar100(tmp_path / "data", train_per_class=4, test_per_class=2, classes=9)
    values = {**TINY, "device": "cpu", "filepath": str(tmp_path / "run"),
              "model_name": "simplecil", "dataset": "cifar224", "data_path": str(tmp_path / "data"), "init_cls": 3}
    path = tmp_path / "c.json"
    path.write_text(json.dumps(values))
    assert main(["--config", str(path)]) == 0
    assert finished(tmp_path / "run")["metrics"]["last_accuracy"] > 50  # chance is 11


# Class folders and lists


@pytest.mark.slow
def test_class_folders_give_the_same_bits_lazily_and_in_memory_with_any_workers(tmp_path: Path) -> None:
    """Also a first task of its own size and a smaller last one."""
    write_class_folders(tmp_path / "data" / "imagenet-r", [f"n{number}" for number in range(9)], suffix=".jpg")
    results = {}
    for placement, workers in (("lazy", 0), ("lazy", 2), ("memory", 0), ("memory", 2)):
        folder = tmp_path / f"{placement}_{workers}"
        folder.mkdir()
        record = run(folder, dataset="imagenetr", data_path=str(tmp_path / "data"), init_cls=4, increment=3,
                     data_placement=placement, num_workers=workers)
        assert [task["classes"] for task in record["tasks"]] == [4, 3, 2]
        files = {path.name: path.read_bytes() for path in (folder / "run").iterdir()
                 if path.suffix in (".pt", ".safetensors") or path.name == "split.json"}
        results[placement, workers] = record["metrics"], [task["counts"] for task in record["tasks"]], files
        assert len(files) >= 3 * 2 + 1 + 1
    first = results["lazy", 0]
    assert all(other == first for other in results.values())


def test_domainnet_lists(tmp_path: Path) -> None:
    write_domainnet(tmp_path / "domainnet", classes=6)
    record = run(tmp_path, dataset="domainnet", data_path=str(tmp_path), init_cls=3, normalize="backbone")
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert [task["train"]["images"] for task in split["tasks"]] == [12, 12]  # 2 images of 3 classes in 2 domains
    assert sorted(split["class_names"]) == [f"thing_{label}" for label in range(6)]
    assert record["tasks"][1]["counts"]["images"] == [12, 12]


def test_more_than_a_hundred_classes_keep_their_tasks_in_integer_order(tmp_path: Path) -> None:
    """METHOD.md, section 8, mistake 7: group names sorted as text put "100-119" before "20-39"."""
    for label in range(120):
        for split, number in (("train", 0), ("train", 1), ("test", 2), ("test", 3)):
            path = tmp_path / "data" / split / f"class_{label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(class_pixels(label, number, 8, 8)).save(path)
    record = run(tmp_path, dataset="folder", data_path=str(tmp_path / "data"), init_cls=20, shuffle=False,
                 backbone_type="vit_glyph_tiny_patch8_32", pretrained=True, growth_threshold=0.0)
    assert len(record["tasks"]) == 6 and record["class_order"] == list(range(120))
    matrix = record["metrics"]["accuracy_matrix"]
    for task, entry in enumerate(record["tasks"]):
        assert entry["counts"]["images"] == [40] * (task + 1)
        assert matrix[task][: task + 1] == [2.5 * right for right in entry["counts"]["top1"]]
    assert torch.load(tmp_path / "run" / "beta_values_task_5.pt")["pruning_mask"].shape == (6,)
    network = load_network(tmp_path / "run", 5)
    names = json.loads((tmp_path / "run" / "split.json").read_text())["class_names"]
    assert names[10] == "class_107" and network.head.weight.shape == (120, 128)  # natural order is that of the names as text


# What is missing or damaged


def refused(capsys, path: Path, *arguments: str) -> str:
    return refusal(main, capsys, "--config", path, *arguments)


def test_missing_data_leave_nothing_behind(tmp_path: Path, capsys) -> None:
    path = write_config(tmp_path, dataset="imagenetr", data_path=str(tmp_path / "data"), init_cls=5)
    assert f"'{tmp_path / 'data/imagenet-r/train'}'" in refused(capsys, path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_refused_config_leaves_the_folder_as_it_was(tmp_path: Path, capsys) -> None:
    """What stops a run before its first step must not make the folder that of a config which never ran: it can be mended in
    place. Nor may it move an old run away. The run in between has a single task, which is joint training."""
    write_class_folders(tmp_path / "data", classes=["a", "b", "c", "d"])
    path = write_config(tmp_path, dataset="folder", data_path=str(tmp_path / "data"), init_cls=4)
    for wrong, word in (("data_path=/nowhere", "/nowhere"), ("rank=33", "32"), ("init_cls=5", "init_cls"),
                        ("backbone_type=resnet10t", "resnet10t"), ("backbone_type=test_vitt", "test_vit")):
        assert word in refused(capsys, path, "--set", wrong)
        assert not (tmp_path / "run").exists(), wrong
    assert main(["--config", str(path)]) == 0
    record = finished(tmp_path / "run")
    assert record["metrics"]["forgetting"] == 0 and record["tasks"][0]["seen_classes"] == 4
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    assert "/nowhere" in refused(capsys, path, "--overwrite", "--set", "data_path=/nowhere")
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_undecodable_image_names_its_file(tmp_path: Path, capsys, num_workers: int) -> None:
    root = write_class_folders(tmp_path / "data", classes=["a", "b"])
    (root / "train" / "b" / "1.png").write_bytes(b"not an image")
    path = write_config(tmp_path, dataset="folder", data_path=str(root), init_cls=2, num_workers=num_workers,
                        data_placement="lazy")
    assert str(root / "train" / "b" / "1.png") in refused(capsys, path)
