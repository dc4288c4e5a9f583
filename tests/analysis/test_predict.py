"""analysis/predict.py: what it says of an image is what the run's evaluation made of it."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import trainer
from analysis.finished import open_network
from analysis.predict import image_files, main, predict
from models.artifacts import SavedRun
from tests.data_files import write_class_folders
from tests.helpers import ROOT, small_config
from utils.data import load_dataset
from utils.errors import UserError
from utils.runs.files import read_sealed_json, write_sealed_json

OLD = ROOT / "tests" / "models" / "old_run"
ROUTED = {"gate_prior": "shift", "inference": "routed", "gate_price": 0.01}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A routed run on the digits with two keys."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    trainer.run(small_config(folder, nb_tasks=2, eval_every=0, **ROUTED))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, Path]:
    """A run on image files of other sizes than the network's, normalised, and the folder of its images."""
    root = write_class_folders(tmp_path_factory.mktemp("photos"))
    trainer.run(small_config(root / "run", nb_tasks=2, dataset="folder", data_path=str(root), model_name="simplecil",
                             normalize="backbone"))
    return root / "run", root


def test_the_answers_are_those_of_the_evaluation(run: Path, tmp_path: Path) -> None:
    saved, network = open_network(run)
    data, names = load_dataset("digits", "."), saved.class_names()
    assert names == saved.result["class_names"][:4] == [str(number) for number in saved.result["class_order"][:4]]
    files, labels = [], []
    for number, (image, label) in enumerate(zip(data.test.images, data.test.labels.tolist(), strict=True)):
        if str(label) in names:
            files.append(tmp_path / f"{number}.png")
            labels.append(str(label))
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    found = list(predict(saved, network, files))
    assert [prediction.image for prediction in found] == files
    right = sum(prediction.classes[0][0] == label for prediction, label in zip(found, labels, strict=True))
    assert right == sum(saved.result["tasks"][1]["counts"]["top1"])
    for prediction in found:
        values = [value for _, value in prediction.classes]
        assert values == sorted(values, reverse=True) and abs(sum(values) - 1) < 1e-5
        assert {name for name, _ in prediction.classes} == set(names)
    words = {f"key {key}, adapters " + ", ".join(f"{task} ({weight:.2f})" for task, weight in weights.items() if weight > 0)
             for key, weights in network.betas.items()}
    assert {prediction.met for prediction in found} == words and len(words) == 2


def test_files_are_seen_as_the_run_sees_them(photos: tuple[Path, Path]) -> None:
    folder, root = photos
    saved, network = open_network(folder)
    assert saved.result["test_view"]["eight_bit"] and saved.class_names() == saved.result["class_names"]
    files = image_files([str(root / "test")])
    found = list(predict(saved, network, files, top=4))
    right = sum(prediction.classes[0][0] == prediction.image.parent.name for prediction in found)
    assert right == sum(saved.result["tasks"][1]["counts"]["top1"])
    assert all(prediction.met is None for prediction in found)


def test_folders_patterns_and_files_give_each_image_once_in_order(photos: tuple[Path, Path]) -> None:
    root = photos[1] / "test"
    ants, bees = [root / "ant" / "0.png", root / "ant" / "1.png"], [root / "bee" / "0.png", root / "bee" / "1.png"]
    assert image_files([str(root / "bee"), str(root / "ant" / "*.png"), str(bees[0])]) == [*bees, *ants]
    assert image_files([str(root / "**" / "0.png")]) == [root / name / "0.png" for name in ("ant", "bee", "cat", "dog")]
    assert image_files([str(root / "a*"), str(root / "bee" / "1.png")]) == [*ants, bees[1]]


def test_the_command_prints_names_probabilities_and_adapters(run: Path, photos: tuple[Path, Path], capsys) -> None:
    image = photos[1] / "test" / "ant" / "0.png"
    assert main([str(run), str(image), "--top", "2", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}: the network after task 1, 4 classes"
    assert re.fullmatch(re.escape(str(image)) + r": key [01], adapters 0 \(\d\.\d\d\)(, 1 \(\d\.\d\d\))?|"
                        + re.escape(str(image)) + r": key 1, adapters 1 \(1\.00\)", lines[1])
    assert len(lines) == 4 and all(re.fullmatch(r" +\d+\.\d\d %  \d", line) for line in lines[2:])
    assert main([str(run), str(image), "--task", "0", "--device", "cpu"]) == 0
    assert "after task 0, 2 classes" in capsys.readouterr().out


def test_names_of_an_older_record_come_from_its_split(run: Path, tmp_path: Path) -> None:
    record = read_sealed_json(run / "results.json")
    write_sealed_json(tmp_path / "results.json", {key: value for key, value in record.items() if key != "class_names"})
    assert SavedRun(tmp_path).class_names()[0] == f"class {record['class_order'][0]}"
    shutil.copy(run / "split.json", tmp_path)
    assert SavedRun(tmp_path).class_names() == record["class_names"]
    write_sealed_json(tmp_path / "results.json", {**record, "class_names": None, "split_sha256": "another run's"})
    assert SavedRun(tmp_path).class_names()[0] == f"class {record['class_order'][0]}"


def test_a_record_without_names_is_answered_with_numbers(photos: tuple[Path, Path]) -> None:
    saved, network = open_network(OLD)
    assert "class_names" not in saved.result
    assert saved.class_names() == [f"class {number}" for number in saved.result["class_order"][:4]]
    image = Image.new("RGB", (32, 32))
    assert saved.test_view()(torch.zeros(3, 40, 32, dtype=torch.uint8)).shape == (3, 32, 32)
    path = photos[1] / "black.png"
    image.save(path)
    first, = predict(saved, network, [path])
    assert first.classes[0][0].startswith("class ") and first.met is None
    path.unlink()


@pytest.mark.parametrize("images, words", [
    (["nothing*.png"], "'nothing*.png' is no file or folder, and no pattern that matches any"),
    (["{root}/train/ant", "{root}/empty"], "empty' holds no image files"),
    (["{root}/bad.png"], "IMAGES: the image '{root}/bad.png' cannot be decoded")])
def test_what_is_no_image_is_one_sentence(images: list[str], words: str, photos: tuple[Path, Path], capsys: Any) -> None:
    folder, root = photos
    (root / "empty").mkdir(exist_ok=True)
    (root / "bad.png").write_text("no image")
    assert main([str(folder), *(name.format(root=root) for name in images), "--device", "cpu"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and words.format(root=root) in shown and shown.count("\n") == 1


def test_a_run_that_is_not_there_is_one_sentence(photos: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), str(photos[1] / "test")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    with pytest.raises(UserError, match="task 5 has not been finished"):
        open_network(photos[0], 5)
