"""models/zero_shot.py: both sides of forward transfer against plain loops, and that measuring it changes nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainer
from backbone import create_backbone
from models import LEARNERS, BaseLearner
from models.zero_shot import Reference, nearest_means
from tests.helpers import grown, images, learn, learner_of, method_values, test_images, tiny_config
from utils.config import Config, config_from_dict

ROUTED = {"gate_prior": "shift", "inference": "routed", "growth_threshold": 0.05}


def run_of(folder: Path, config: Config) -> dict[str, Any]:
    return trainer.Run(config, 1993, folder, torch.device("cpu")).finish()


def plain_right(learner: BaseLearner, network: Any, task: int) -> list[int]:
    """Of the test images of `task`: how many there are and how many are nearest, by cosine, to their class's mean feature."""
    means, found = [], []
    with torch.no_grad():
        for label in learner.data.task_classes(task):
            batches = learner.data.eval_batches("train", range(label, label + 1), 64)
            means.append(np.concatenate([network(x).double().numpy() for x, _ in batches]).mean(0))
        for x, labels in learner.data.eval_batches("test", learner.data.task_classes(task), 64):
            for feature, label in zip(network(x).double().numpy(), labels.tolist(), strict=True):
                cosines = [feature @ mean / np.linalg.norm(feature) / np.linalg.norm(mean) for mean in means]
                found.append(learner.data.task_classes(task).start + int(np.argmax(cosines)) == label)
    return [len(found), sum(found)]


def test_the_counts_are_those_of_a_plain_loop() -> None:
    config = tiny_config(gate="none", init_lr=0.1, init_epoch=2, eval_every=0)
    backbone = create_backbone(config)
    learner = learn(learner_of(config), range(1))
    learner.start_evaluation()
    total, right = nearest_means(learner, [learner.represent, backbone], 1)
    assert [total, right[0]] == plain_right(learner, learner.embed, 1)
    assert [total, right[1]] == plain_right(learner, backbone, 1)
    assert right[0] != right[1] and 0 < min(right), "training moved the features"


def test_the_reference_is_the_network_before_anything_was_put_into_it() -> None:
    config = tiny_config(gate="none")
    backbone, plain = create_backbone(config), create_backbone(config)
    reference = Reference(backbone, config, torch.device("cpu"))
    with torch.no_grad():
        for tensor in backbone.parameters():
            tensor.zero_()
        x = images(3, torch.float32)
        torch.testing.assert_close(reference.represent(x), plain(x))


@pytest.mark.parametrize("name, changes", [("sdlora", {}), ("sdlora", ROUTED), ("ease", {}), ("aper", {}), ("l2p", {}),
                                           ("mos", {}), ("tuna", {})])
def test_a_learner_represents_images_as_its_head_reads_them(name: str, changes: dict) -> None:
    learner = learner_of(config_from_dict({**method_values(name, **changes), "filepath": "./unused/"}))
    learn(learner, range(2)) if name != "sdlora" else grown(learner, range(2))
    learner.start_evaluation()
    x: Tensor = test_images(learner)
    with torch.no_grad():
        assert torch.equal(learner.head(learner.represent(x)), learner.predict(x))


@pytest.mark.parametrize("name", LEARNERS)
def test_measuring_it_changes_no_other_result(name: str, tmp_path: Path) -> None:
    values = {**method_values(name), "eval_every": 0} if name != "simplecil" else method_values(name)
    plain, told = (run_of(tmp_path / str(asked), config_from_dict(
        {**values, "filepath": str(tmp_path / str(asked)), "forward_transfer": asked})) for asked in (False, True))
    assert [task["files"] for task in plain["tasks"]] == [task["files"] for task in told["tasks"]]
    assert [task["counts"] for task in plain["tasks"]] == [task["counts"] for task in told["tasks"]]
    *before, last = [task["zero_shot"] for task in told["tasks"]]
    assert last is None and all(task["zero_shot"] is None for task in plain["tasks"])
    for counts, later in zip(before, told["tasks"][1:], strict=True):
        assert counts["images"] == later["counts"]["images"][-1] >= max(counts["learned"], counts["frozen"]) > 0
    gains = [100 * (counts["learned"] - counts["frozen"]) / counts["images"] for counts in before]
    assert told["metrics"]["forward_transfer"] == (pytest.approx(np.mean(gains)) if gains else None)


@pytest.mark.parametrize("name", ["simplecil", "finetune_head"])
def test_frozen_features_transfer_nothing(name: str, tmp_path: Path) -> None:
    config = config_from_dict({**method_values(name), "filepath": str(tmp_path), "forward_transfer": True})
    assert run_of(tmp_path, config)["metrics"]["forward_transfer"] == 0
