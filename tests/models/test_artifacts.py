"""models/artifacts.py: damaged files of a finished run are named and refused, never loaded as if whole."""

import random
import shutil
from pathlib import Path

import pytest
import torch

import trainer
from models import load_network
from tests.helpers import small_config
from utils.errors import UserError
from utils.runs.files import sha256_of


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer.run(small_config(folder, nb_tasks=2, growth_rule="none"))
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(folder, 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_whole_run_loads(run: Path) -> None:
    assert load_network(run, 1)(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


@pytest.mark.slow
def test_two_hundred_damaged_files_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    names = ["results.json", "beta_values_task_1.pt", "head_task_1.safetensors", "adapter_task_0.safetensors",
             "adapter_task_1.safetensors"]
    draw = random.Random(0)
    for case in range(200):
        folder = tmp_path / "copy"
        shutil.copytree(run, folder)
        path = folder / names[case % len(names)]
        data = bytearray(path.read_bytes())
        kind = ("truncated", "flipped", "empty", "swapped")[case // len(names) % 4]
        if kind == "truncated":
            del data[draw.randrange(1, len(data)):]
        elif kind == "flipped":
            position = draw.randrange(len(data))
            if chr(data[position]).isspace():  # white space between JSON's tokens means nothing; damage what does
                position = data.index(b'"')
            data[position] ^= 1 << draw.randrange(8)
        elif kind == "empty":
            data.clear()
        else:
            data[:] = (folder / names[(case + 1) % len(names)]).read_bytes()
        path.write_bytes(data)
        assert path.name in refused(folder), (kind, path.name)
        shutil.rmtree(folder)


def test_a_missing_file_and_an_unknown_task_are_named(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "adapter_task_0.safetensors").unlink()
    assert "adapter_task_0.safetensors" in refused(tmp_path / "copy")
    with pytest.raises(UserError, match="task 2 has not been finished"):
        load_network(run, 2)
    with pytest.raises(UserError, match="results.json"):
        load_network(tmp_path, 0)


def test_a_file_of_another_run_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    trainer.run(small_config(tmp_path / "other", nb_tasks=1, seed=7))
    shutil.copy(tmp_path / "other" / "adapter_task_0.safetensors", tmp_path / "copy")
    assert sha256_of(run / "adapter_task_0.safetensors") != sha256_of(tmp_path / "copy" / "adapter_task_0.safetensors")
    assert "adapter_task_0.safetensors" in refused(tmp_path / "copy")
