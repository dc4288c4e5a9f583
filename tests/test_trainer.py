"""trainer.py and main.py: whole runs on the digits, what they leave behind, and how bad input ends."""

import hashlib
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer

import trainer
from backbone.heads import HEADS
from main import main
from models import LEARNERS, load_network
from models.recipes import GATES
from models.sdlora import SDLoRA
from tests.helpers import (
    OF_METHOD,
    PRETRAINED,
    ROOT,
    SMALL,
    learn,
    learner_of,
    method_values,
    refusal,
    small_values,
    tiny_config,
)
from tests.tiny_backbone import BLOCKS, TINY, WIDTH
from utils.data_manager import DataManager
from utils.results.calibration import Calibration
from utils.results.metrics import ClassCounts, TaskCounts, count_predictions, summary, tally_classes
from utils.runs import distributed
from utils.runs.checkpoint import Checkpoints
from utils.runs.progress import LOGGER, Progress


def write_config(folder: Path, **changes) -> Path:
    path = folder / "config_file.json"
    path.write_text(json.dumps({**SMALL, **TINY, "filepath": str(folder / "run"), **changes}))
    return path


def refused(capsys, *arguments: str) -> str:
    return refusal(main, capsys, *arguments)


def test_a_checkpoint_is_due_for_all_processes_or_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of any of them: they write it together."""
    written = []
    run = trainer.Run(tiny_config(), 1993, Path("unused"), torch.device("cpu"))
    run.progress = Progress(1, terminal=False)
    monkeypatch.setattr(run, "_checkpoint", lambda: written.append(run.checkpoint_written))
    for others in (0, 1):
        monkeypatch.setattr(distributed, "largest", lambda mine, signal, theirs=others: [max(mine, theirs), signal])
        run.work("looking", 0, 1, whole=True)
        run.work("looking", 0, 1)
        run.after_step()
        assert len(written) == 2 * others, "work that is no state to go on from is none of the two"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished gated run of three tasks in which the last adapter is pruned or kept as the gate decides."""
    folder = tmp_path_factory.mktemp("gated")
    path = write_config(folder, growth_threshold=0.2)
    assert main([f"--config={path}"]) == 0
    return folder / "run"


def result_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_artifacts_are_those_of_the_contract(run: Path) -> None:
    kept = []
    for task in range(3):
        data = torch.load(run / f"beta_values_task_{task}.pt")
        assert data["beta_values"].dtype == torch.float32 and data["beta_values"].shape == (task + 1,)
        assert data["beta_values"].sum().item() == pytest.approx(1) and data["beta_after"].sum().item() == pytest.approx(1)
        assert data["pruning_mask"].dtype == torch.int64 and data["pruning_mask"].shape == (3,)
        assert data["alphas"].shape == (task + 1, BLOCKS, 2) and data["alphas"].dtype == torch.float32
        assert data["gate_logits"].shape == (task + 1,) and data["gate_scale"] == 1.0
        assert data["kept"] == bool(data["pruning_mask"][task]) == bool(data["beta_values"][task] > 0.2 or task == 0)
        assert (data["task_id"], data["threshold"], data["tau"], data["growth_rule"]) == (task, 0.2, 0.5, "threshold")
        for old in range(task + 1):
            gone = data["pruning_mask"][old] == 0
            assert gone == torch.isinf(data["gate_logits"][old]) == (data["alphas"][old].abs().sum() == 0)
        kept.append(data["kept"])
        adapter = run / f"adapter_task_{task}.safetensors"
        assert adapter.exists() is data["kept"]
        if data["kept"]:
            tensors = load_file(adapter)
            assert len(tensors) == BLOCKS * 4 and tensors["blocks.1.v.A"].shape == (4, WIDTH)
            direction = tensors["blocks.0.q.B"] @ tensors["blocks.0.q.A"]
            assert torch.linalg.matrix_norm(direction).item() == pytest.approx(1, abs=1e-5)
        head = load_file(run / f"head_task_{task}.safetensors")
        assert head["weight"].shape == (2 * task + 2, WIDTH) and head["bias"].shape == (2 * task + 2,)
    assert kept[0]
    assert not list(run.glob(".*.part"))


def test_analysis_snippets_run_as_they_are(run: Path) -> None:
    data = torch.load(f"{run}/beta_values_task_1.pt")
    assert data["beta_values"].numpy().shape == (2,) and len(data["pruning_mask"][:2]) == 2
    for t in range(3):
        data = torch.load(f"{run}/beta_values_task_{t}.pt")
        mask = data["pruning_mask"][: t + 1]
        active = mask.sum().item()
        assert f"{active}/{t + 1} ({100 * active / (t + 1):.1f}%)" in (run / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_i3_a_fresh_process_rebuilds_the_evaluated_network(run: Path, tmp_path: Path) -> None:
    learner = learner_of(tiny_config(run, growth_threshold=0.2))
    learn(learner, range(3))
    images = next(iter(learner.data.eval_batches("test", range(6), 32)))[0]
    learner.start_evaluation()
    torch.save((images, learner.predict(images)), tmp_path / "expected.pt")
    script = ("import sys, torch, tests.tiny_backbone;"
              "from models import load_network; torch.set_num_threads(int(sys.argv[3]));"
              "x, y = torch.load(sys.argv[1]); z = load_network(sys.argv[2], 2)(x); assert torch.equal(y, z)")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "expected.pt"), str(run), str(torch.get_num_threads())],
                   check=True, cwd=ROOT)


def test_rebuilt_networks_have_the_accuracies_that_were_recorded(run: Path) -> None:
    learner, record = learner_of(tiny_config(run)), result_of(run)
    for task in range(3):
        network = load_network(run, task)
        counts, by_class = TaskCounts.zeros(task + 1), torch.zeros(2 * task + 2, task + 2, dtype=torch.long)
        confidence = 0.0
        for images, labels in learner.data.eval_batches("test", range(2 * task + 2), 32):
            logits = network(images)
            counts += count_predictions(logits, labels, learner.data.task_of_class, task + 1)
            by_class += tally_classes(logits, labels, torch.as_tensor(learner.data.task_of_class), task + 1)
            confidence += logits.softmax(1).amax(1).double().sum().item()
        assert counts == TaskCounts(**record["tasks"][task]["counts"])
        assert ClassCounts.of(by_class) == ClassCounts(**record["tasks"][task]["class_counts"])
        calibration = Calibration(**record["tasks"][task]["calibration"])
        assert sum(calibration.images) == sum(counts.images) and sum(calibration.right) == sum(counts.top1)
        assert sum(calibration.confidence) == pytest.approx(confidence)


def test_results_hold_what_is_needed_to_repeat_the_run(run: Path) -> None:
    record = result_of(run)
    assert record["finished"] and record["config"]["rank"] == 4 and record["config"]["seed"] == [1993]
    assert record["class_order"][:6] == np.random.RandomState(1993).permutation(10).tolist()[:6]
    assert record["class_order_sha256"] == hashlib.sha256(json.dumps(record["class_order"]).encode()).hexdigest()
    assert re.fullmatch("[0-9a-f]{64}", record["backbone"]["sha256"]) and record["versions"]["torch"] == torch.__version__
    assert record["split_sha256"] == json.loads((run / "split.json").read_text())["sha256"]
    assert record["metrics"] == summary([TaskCounts(**task["counts"]) for task in record["tasks"]],
                                        [Calibration(**task["calibration"]) for task in record["tasks"]])
    first = record["tasks"][0]
    assert first["trainable_parameters"] == BLOCKS * 2 * (2 * 4 * WIDTH + 1) + 1 + 2 * (WIDTH + 1)
    assert all(task["seconds"] > 0 and task["peak_memory_bytes"] > 0 for task in record["tasks"])
    for task in record["tasks"]:
        assert task["training_seconds"] > 0 < task["evaluation_seconds"] and task["zero_shot"] is None
        assert task["training_seconds"] + task["evaluation_seconds"] <= task["seconds"] + 0.002  # each is rounded


def test_log_lines_are_those_of_the_contract(run: Path) -> None:
    text = (run / "train.log").read_text()
    number = r"\d+\.\d"
    for pattern in (
        r"\[Gumbel CL-LoRA\] tau_init=5.0, tau_final=0.5, anneal_rate=auto, lambda_sparsity=0.01\n",
        rf"Task 0, Epoch 1/1 => Loss {number}{{3}}, Train_accy {number}\d, Test_accy {number}\d\n",
        rf"Task 1, Epoch 1/1 => Loss {number}{{3}} \(clf={number}{{3}}, sparse={number}{{3}}\), tau={number}{{3}}, "
        rf"Train_accy {number}\d, Test_accy {number}\d\n",
        rf"\[Conditional Growth\] Task 2 - Beta values: \[{number}\d {number}\d {number}\d\]\n",
        rf"\[Conditional Growth\] Current task beta: {number}{{4}}, threshold: 0\.2000\n",
        r"\[Conditional Growth\] ✓ Keeping adapter for task 0 \(beta=1\.0000 > 0\.2000\)\n",
        r"\[Conditional Growth\] Active adapters: 1/1 \(100\.0%\)\n",
        rf"CNN top1 curve: \[{number}\d?, {number}\d?, {number}\d?\]\n",
        rf"Average Accuracy \(CNN\): {number}\d\n",
        rf"Forgetting \(CNN\): -?{number}\d\n",
        rf"Backward Transfer \(CNN\): -?{number}\d, Calibration Error \(CNN\): {number}\d\n",
    ):
        assert re.search(pattern, text), pattern
    assert text.count("[Gumbel CL-LoRA]") == 1


def test_a_finished_run_is_reported_not_repeated(run: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    assert main(["--config", str(run.parent / "config_file.json")]) == 0
    assert "finished run" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.iterdir()}


def test_a_folder_of_another_config_is_refused(run: Path, capsys) -> None:
    path = run.parent / "config_file.json"
    message = refused(capsys, "--config", str(path), "--set", "rank=5")
    assert "rank (there 4, now 5)" in message and "--overwrite" in message
    assert main(["--config", str(path), "--device", "cpu", "--set", "prefix=other", "--set", "num_workers=1"]) == 0


@pytest.mark.parametrize("left", ["results.json", "checkpoint_1.ckpt"])
def test_what_a_run_of_another_config_has_left_is_not_taken_for_this_one_s(left: str, run: Path, tmp_path: Path,
                                                                         capsys) -> None:
    """Also where its config.json has gone."""
    path = write_config(tmp_path, rank=3)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / left).write_bytes((run / "results.json").read_bytes())
    message = refused(capsys, "--config", str(path))
    assert ("rank (there" if left == "results.json" else "without its config.json") in message
    assert [each.name for each in (tmp_path / "run").iterdir()] == [left]
    assert main(["--config", str(path), "--overwrite", "--dry-run"]) == 0


def test_the_folder_that_the_user_is_in_is_not_set_aside(tmp_path: Path, capsys, monkeypatch) -> None:
    path = write_config(tmp_path, filepath=".")
    monkeypatch.chdir(tmp_path)
    assert "is the folder that you are in" in refused(capsys, "--config", str(path), "--overwrite")


def test_overwrite_moves_the_old_run_aside(tmp_path: Path, capsys) -> None:
    path = write_config(tmp_path, nb_tasks=1)
    assert main(["--config", str(path)]) == 0
    assert main(["--config", str(path), "--overwrite", "--set", "rank=2"]) == 0
    assert "run.old-1" in capsys.readouterr().out
    assert result_of(tmp_path / "run")["config"]["rank"] == 2 and result_of(tmp_path / "run.old-1")["config"]["rank"] == 4


def test_each_seed_has_a_folder_and_a_log_of_its_own(tmp_path: Path, capsys) -> None:
    """METHOD.md, section 8, mistakes 8 and 11: one log for all seeds; the command line's seed lost."""
    path = write_config(tmp_path, nb_tasks=2, seed=[7])
    assert main(["--config", str(path), "--seed", "1", "2"]) == 0
    out = capsys.readouterr().out
    logs = [(tmp_path / "run" / f"seed_{seed}" / "train.log").read_text() for seed in (1, 2)]
    assert all(log.count("Task 1, Epoch 1/1") == 1 and f"seed {seed}" in log for seed, log in zip((1, 2), logs))
    assert "mean ± std" in out and not any(isinstance(h, logging.FileHandler) for h in LOGGER.handlers)
    orders = [result_of(tmp_path / "run" / f"seed_{seed}")["class_order"] for seed in (1, 2)]
    assert orders == [np.random.RandomState(seed).permutation(10).tolist()[:4] for seed in (1, 2)]


def test_dry_run_prints_and_writes_nothing(tmp_path: Path, capsys) -> None:
    path = write_config(tmp_path)
    assert main(["--config", str(path), "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["init_alpha"] == 1.0 and printed["split"]["task_sizes"] == [2, 2, 2]
    assert printed["trainable_parameters_task_0"] == BLOCKS * 2 * (2 * 4 * WIDTH + 1) + 1 + 2 * (WIDTH + 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_folder_that_cannot_be_made_is_said_before_anything_is_computed(options: list, tmp_path: Path, capsys,
                                                                          monkeypatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    path = write_config(tmp_path, filepath=str(tmp_path / "notes.txt" / "run"))
    assert f"'{tmp_path / 'notes.txt'}' is a file, not a folder" in refused(capsys, "--config", str(path), *options)
    path = write_config(tmp_path, filepath=str(tmp_path / "new" / "run"))
    monkeypatch.setattr("os.access", lambda place, mode: Path(place) != tmp_path)  # root may write anywhere
    assert f"nothing may be written into '{tmp_path}'" in refused(capsys, "--config", str(path), *options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config_file.json", "notes.txt"]


_CHOICES = [{key: name} for key, table in (("gate", GATES), ("model_name", LEARNERS), ("head", HEADS)) for name in table]


@pytest.mark.parametrize("changes", _CHOICES, ids=lambda changes: next(iter(changes.values())))
def test_a_dry_run_computes_nothing_on_images(changes: dict, tmp_path: Path, capsys, monkeypatch) -> None:
    def no_images(*args: object, **kwargs: object) -> None:
        raise AssertionError("an image was passed through the network")

    for name in ("forward", "forward_features", "forward_intermediates"):
        monkeypatch.setattr(VisionTransformer, name, no_images)
    for name in ("train_batches", "eval_batches"):
        monkeypatch.setattr(DataManager, name, no_images)
    path = tmp_path / "config.json"
    values = small_values(**TINY, **OF_METHOD.get(changes.get("model_name"), {}), **changes)
    path.write_text(json.dumps({**values, "filepath": str(tmp_path / "run")}))
    assert main(["--config", str(path), "--dry-run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["config"]["dataset"] == "digits" and (printed["trainable_parameters_task_0"] > 0) is (
        changes.get("model_name") != "simplecil")


@pytest.mark.parametrize("name", ["finetune_head", "simplecil"])
def test_controls_run_and_refuse_what_does_nothing(name: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({**method_values(name), "filepath": str(tmp_path / "run")}))
    assert main(["--config", str(path)]) == 0
    assert result_of(tmp_path / "run")["tasks"][-1]["active_adapters"] == 0
    message = refused(capsys, "--config", str(path), "--set", "rank=3")
    assert "'rank'" in message and name in message


@pytest.mark.parametrize("changes, words", [
    ({"model_name": "sdlroa"}, ["model_name", "sdlora"]),
    ({"dataset": "digit"}, ["dataset", "digits"]),
    ({"backbone_type": "vit_base_patch16_242"}, ["backbone_type", "vit_base_patch16_224"]),
    ({"backbone_type": "resnet10t", "pretrained": False}, ["resnet10t", "qkv"]),
    ({"rank": 33}, ["rank", "32"]),
    ({"init_cls": 11}, ["init_cls", "10"]),
    ({"init_cls": 1, "increment": 1}, ["init_cls"]),
    ({"dataset": "folder", "data_path": "/nowhere"}, ["/nowhere", "train"]),
    ({**PRETRAINED, "backbone_weights": "/nowhere.safetensors"}, ["backbone_weights", "/nowhere.safetensors"]),
    ({"filepath": "/proc/no/such"}, ["filepath", "/proc/no/such"]),
])
def test_bad_input_is_one_sentence(changes: dict, words: list[str], tmp_path: Path, capsys) -> None:
    message = refused(capsys, "--config", str(write_config(tmp_path, **changes)))
    assert all(word in message for word in words), message


def test_cuda_device_without_cuda_runs_on_the_cpu_with_one_warning(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = write_config(tmp_path, nb_tasks=1)
    assert main(["--config", str(path), "--device", "0"]) == 0
    assert capsys.readouterr().out.count("running on the CPU") == 1


def test_a_run_that_is_no_longer_finite_ends_in_one_sentence_and_can_go_on(tmp_path: Path, capsys, monkeypatch) -> None:
    path, step = write_config(tmp_path, nb_tasks=2), SDLoRA.before_step
    monkeypatch.setattr(SDLoRA, "before_step", lambda self, number: step(self, number) * (
        float("nan") if self.task == 1 and number == 3 else 1))
    message = refused(capsys, "--config", str(path))
    assert "task 1" in message and "step 3" in message
    assert torch.load(tmp_path / "run" / "beta_values_task_0.pt")["kept"]
    monkeypatch.undo()
    checkpoints = Checkpoints(tmp_path / "run")
    state = checkpoints.load()[0]
    learner = {name: part for name, part in state["learner"].items() if name != "head"}
    lacking = checkpoints.save({**state, "learner": learner})
    message = refused(capsys, "--config", str(path))
    assert "checkpoint is of other code and lacks 'head'" in message and "--overwrite" in message
    lacking.unlink()
    assert main(["--config", str(path)]) == 0


def test_unfitting_weights_are_named(tmp_path: Path, capsys) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pth")
    message = refused(capsys, "--config", str(write_config(tmp_path, **PRETRAINED, backbone_weights=str(tmp_path / "w.pth"))))
    assert "w.pth" in message and "does not fit" in message
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    path = write_config(tmp_path, **PRETRAINED, backbone_weights=str(tmp_path / "broken.safetensors"))
    message = refused(capsys, "--config", str(path))
    assert "broken.safetensors" in message


def test_out_of_memory_names_the_key_that_helps(tmp_path: Path, capsys, monkeypatch) -> None:
    def no_room(self, step: int):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(SDLoRA, "before_step", no_room)
    assert "grad_accum" in refused(capsys, "--config", str(write_config(tmp_path)))
    monkeypatch.setattr(SDLoRA, "make_room", no_room)
    assert "before training has begun" in refused(capsys, "--config", str(write_config(tmp_path)), "--dry-run", "--overwrite")


@pytest.mark.slow
def test_bf16_is_close_to_fp32(tmp_path: Path) -> None:
    accuracies = []
    for precision in ("fp32", "bf16"):
        path = write_config(tmp_path, nb_tasks=2, precision=precision, filepath=str(tmp_path / precision), **PRETRAINED)
        assert main(["--config", str(path)]) == 0
        accuracies.append(result_of(tmp_path / precision)["metrics"]["last_accuracy"])
        assert load_file(tmp_path / precision / "adapter_task_1.safetensors")["blocks.0.q.A"].dtype == torch.float32
    assert abs(accuracies[0] - accuracies[1]) < 5
