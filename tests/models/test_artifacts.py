"""models/artifacts.py and `BaseLearner.load`: the network of a run comes back to the bit, or one sentence says why not."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer
from models import LEARNERS, load_network
from models.artifacts import SavedNetwork, SavedRun
from models.sdlora import SDLoRA
from tests.helpers import ROOT, tiny_config
from utils.config import config_of_record
from utils.errors import UserError
from utils.runs.files import read_sealed_json, sha256_of, write_safetensors, write_sealed_json

OLD = Path(__file__).parent / "old_run"  # of the version before components owned their keys, and what it gave for images
OLD_LOGITS = [[2.9925194, -2.8777678, 0.2297343, -1.2655730], [1.7875180, -1.0677757, 0.8051363, -2.3694999]]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer.run(tiny_config(folder, nb_tasks=2, growth_rule="none", rank=1))
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def refused(folder: Path, task: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        load_network(folder, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- files that are not whole


@pytest.mark.parametrize("cases", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_by_name(cases: int, run: Path, tmp_path: Path) -> None:
    names = ["results.json", "beta_values_task_1.pt", "head_task_1.safetensors", "adapter_task_0.safetensors",
             "adapter_task_1.safetensors"]
    draw = random.Random(0)
    for case in range(cases):
        folder = shutil.copytree(run, tmp_path / "copy")
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


def test_a_missing_file_an_unknown_task_and_a_file_of_another_run_are_named(copied: Path, run: Path, tmp_path: Path) -> None:
    shutil.copy(copied / "adapter_task_1.safetensors", copied / "adapter_task_0.safetensors")
    assert "adapter_task_0.safetensors: is not the file that the run wrote" in refused(copied)
    (copied / "adapter_task_0.safetensors").unlink()
    assert "adapter_task_0.safetensors: there is no such file; restore it from a copy." in refused(copied)
    assert "task 2 has not been finished" in refused(run, 2) and "results.json" in refused(tmp_path)


def test_another_backbone_is_refused(copied: Path) -> None:
    record = read_sealed_json(copied / "results.json")
    write_sealed_json(copied / "results.json", {**record, "backbone": {**record["backbone"], "sha256": "0" * 64}})
    assert "has other weights than" in refused(copied)


# ---- runs of before


def test_a_run_of_an_older_version_gives_the_logits_that_it_gave_then() -> None:
    record = read_sealed_json(OLD / "results.json")
    assert {"ridge_dim", "kd_residual", "gate_price"} <= record["config"].keys(), "every key was in every record"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(load_network(OLD, 1)(images), torch.tensor(OLD_LOGITS), atol=1e-4)
    assert config_of_record(record["config"], "x").gate == "gumbel_sparsemax"


def test_every_record_that_is_kept_still_has_a_config() -> None:
    paths = sorted((ROOT / "docs" / "results").rglob("seed_*.json"))
    configs = [read_sealed_json(path)["config"] for path in paths]
    kept = [config_of_record(values, "x") for values in configs]
    assert len(kept) > 30 and {config.gate for config in kept if hasattr(config, "gate")} >= {"evidence", "none"}


# ---- a method that learns something of its own


class Shifted(SDLoRA):
    """SD-LoRA whose features are moved by one more learned tensor."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shift = nn.ParameterDict({"feature": torch.zeros(self.backbone.width)})

    def embed(self, images: Tensor) -> Tensor:
        return super().embed(images) + self.shift["feature"]

    def groups(self) -> list[dict]:
        return [*super().groups(), {"params": [self.shift["feature"]], "lr": 0.3}]

    def modules(self) -> list[nn.Module]:
        return [*super().modules(), self.shift]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "shift": self.shift["feature"].detach().clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.shift["feature"].data.copy_(state["shift"])


class Saving(Shifted):
    """With a file for it, which nothing reads."""

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"shift_task_{self.task}.safetensors"
        write_safetensors(path, {"feature": self.shift["feature"].detach()}, {})
        return [*super().save(folder), path]


class ShiftedHead(nn.Module):
    """A head behind the shift."""

    def __init__(self, shift: Tensor, head: nn.Module) -> None:
        super().__init__()
        self.shift, self.head = shift, head

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features + self.shift)


class Loading(Saving):
    """And with a way back."""

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        network = super().rebuild(saved)
        shift = load_file(saved.file(f"shift_task_{saved.task}.safetensors"))["feature"]
        return SavedNetwork(network.backbone, network.bank, ShiftedHead(shift, network.head))


@pytest.mark.parametrize("kind, words", [
    (Shifted, "it has learned something that is not saved or not read"),
    pytest.param(Saving, "has written shift_task_1.safetensors, which its class does not read", marks=pytest.mark.slow)])
def test_a_tensor_that_is_not_saved_or_not_read_is_refused(kind: type, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(LEARNERS, "toy", kind)
    trainer.run(tiny_config(tmp_path, nb_tasks=2, model_name="toy"))
    assert words in refused(tmp_path) and "'toy'" in refused(tmp_path)


def test_a_method_that_saves_and_rebuilds_gets_its_network_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a run that was broken off within a task and went on."""
    monkeypatch.setitem(LEARNERS, "toy", Loading)
    config = tiny_config(tmp_path / "run", nb_tasks=2, model_name="toy")
    step = trainer.Run.after_step

    def stop(run: trainer.Run) -> None:
        step(run)
        if run.steps == 15:
            run._checkpoint()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "after_step", stop)
        trainer.run(config)
    run = trainer.Run(config, 1993, tmp_path / "run", torch.device("cpu"))
    run.finish()
    plain = trainer.run(tiny_config(tmp_path / "plain", nb_tasks=2, model_name="toy"))[0]
    assert run.learner.shift["feature"].abs().max() > 0.01
    assert run.result["tasks"][1]["files"] == plain["tasks"][1]["files"]
    assert any(name.startswith("shift_") for name in plain["tasks"][1]["files"])
    images = next(iter(run.data.eval_batches("test", range(4), 64)))[0]
    run.learner.start_evaluation()
    assert torch.equal(load_network(tmp_path / "run", 1)(images), run.learner.predict(images))
    assert sha256_of(tmp_path / "run" / "shift_task_1.safetensors") == plain["tasks"][1]["files"]["shift_task_1.safetensors"]
