"""models/joint.py: the upper bound trains on everything at once and is measured on every task of the stream."""

import json
from pathlib import Path

import pytest
import torch

import trainer
from models import LEARNERS, load_network
from tests.helpers import learner_of, pictures, small_config, tiny_config
from trainer import build
from utils.errors import UserError
from utils.results.metrics import TaskCounts, summary
from utils.results.report import curve_lines, final_table, seeds_table


def joint_config(folder: Path | str = "./unused/", **changes):
    return tiny_config(folder, model_name="joint", **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("joint") / "run"
    with pictures():
        return folder, trainer.run(small_config(folder, model_name="joint"))[0]


def test_one_record_covers_every_task(run: tuple[Path, dict]) -> None:
    _, result = run
    (record,) = result["tasks"]
    assert record["seen_classes"] == record["classes"] == 6 and len(record["counts"]["images"]) == 3
    assert record["active_adapters"] == 1 and record["kept"] is None and record["beta_values"] is None
    metrics = result["metrics"]
    assert len(metrics["accuracy_matrix"]) == 1 and None not in metrics["accuracy_matrix"][0]
    assert metrics["last_accuracy"] == metrics["top1_curve"][0] > 40
    for undefined in ("average_accuracy", "forgetting", "backward_transfer"):
        assert metrics[undefined] is None
    assert metrics["accuracy_when_learned"] == [None]


def test_results_are_strict_json_and_the_report_shows_dashes(run: tuple[Path, dict]) -> None:
    folder, result = run
    json.dumps(result, allow_nan=False)
    assert json.loads((folder / "results.json").read_text())["finished"]
    assert curve_lines(result["metrics"])[1:] == ["Average Accuracy (CNN): -", "Forgetting (CNN): -"]
    table = final_table(result).splitlines()
    assert table[0].split()[2:5] == ["T0", "T1", "T2"] and len(table) == 3
    assert seeds_table([result, result]).splitlines()[-1].split()[-5:-3] == ["-", "-"]
    assert {path.name for path in folder.glob("*.png")} == {"accuracy.png", "growth.png"}


def test_a_finished_run_is_reported_and_its_network_loads(run: tuple[Path, dict]) -> None:
    folder, result = run
    assert trainer.run(small_config(folder, model_name="joint"))[0]["metrics"] == result["metrics"]
    learner = learner_of(small_config())
    counts = 0
    network = load_network(folder, 0)
    for images, labels in learner.data.eval_batches("test", range(6), 32):
        counts += (network(images).argmax(1) == labels).sum().item()
    assert counts == sum(result["tasks"][0]["counts"]["top1"])


def test_it_trains_on_the_images_of_every_task_of_the_stream() -> None:
    config = joint_config()
    _, data = build(config, 1993, torch.device("cpu"))
    joined = LEARNERS["joint"].stream(data)
    images = torch.cat([x for x, _ in joined.eval_batches("train", joined.task_classes(0), 64)])
    each = torch.cat([x for task in range(3) for x, _ in data.eval_batches("train", data.task_classes(task), 64)])
    assert torch.equal(images, each) and joined.train_size(0) == len(images)
    labels = torch.cat([y for _, y in joined.train_batches(0, 0, 64)])
    assert labels.bincount().tolist() == [len(data._members["train"][label]) for label in range(6)]
    assert joined._sources is data._sources, "images are held in memory once"
    assert data.nb_tasks == 3 and data.task_sizes == [2, 2, 2], "the stream itself stays as it is"


@pytest.mark.slow
def test_it_is_sd_lora_on_a_single_task() -> None:
    """One adapter, trained for init_epoch epochs at init_lr with the gate open."""
    joint = learner_of(small_config(model_name="joint", nb_tasks=2, init_epoch=2))
    whole = learner_of(small_config(gate="none", init_cls=4, nb_tasks=1, init_epoch=2))
    for one in (joint, whole):
        one.begin_task(0)
        one.train()
        one.end_task()
    assert joint.head.weight.shape == (4, 128) and torch.allclose(joint.head.weight, whole.head.weight, atol=1e-3)
    assert joint.steps_done() == 2 * joint.data.steps_per_epoch(0, 32) and joint.bank.tasks == [0]


@pytest.mark.parametrize("key, value", [("gate", "none"), ("growth_rule", "topk"), ("lambda_sparsity", 0.5), ("lrate", 0.5),
                                        ("epochs", 3), ("gate_lr", 0.1)])
def test_keys_that_do_nothing_are_refused(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"'{key}' is .* no effect for model_name .joint."):
        trainer.run(joint_config(tmp_path / "run", **{key: value}))
    assert not (tmp_path / "run").exists()


def test_a_single_task_stream_learned_at_once_has_every_metric() -> None:
    counts = TaskCounts([10], [9], [10], [9], [0])
    assert summary([counts])["forgetting"] == 0.0 and summary([counts])["average_accuracy"] == 90.0
