"""models/ease.py against the paper on plain tensors, class by class."""

import pytest
import torch
from torch import Tensor

from models.ease import EASE
from tests.helpers import ROOT, test_images
from tests.models.plain_adapters import (
    begun,
    check_training_step,
    fresh,
    leaves,
    look_trained,
    plain_features,
    task_images,
)
from utils.config import load_config
from utils.errors import UserError

SIZES = [3, 2, 2]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def stream() -> EASE:
    return begun("ease", init_cls=3, increment=2, nb_tasks=3, ease_alpha=0.3)


def test_loss_and_gradients_of_every_task() -> None:
    learner = stream()
    check_training_step(learner)
    learner.end_task()
    learner.begin_task(1)
    assert learner.bank.new_up.abs().max() == 0, "every task starts with an adapter that adds nothing"
    look_trained(learner)
    check_training_step(learner)


def test_prediction_is_that_of_the_paper_with_missing_means_put_together() -> None:
    learner, vit, adapters = stream(), fresh(), []
    known: dict[tuple[int, int], Tensor] = {}  # class, subspace
    images = test_images(learner, 5).double()
    owner = [task for task, size in enumerate(SIZES) for _ in range(size)]
    for task in range(3):
        if task:
            learner.begin_task(task)
            look_trained(learner)
        adapters.append(leaves(learner.bank.current))
        learner.end_task()
        x, y = task_images(learner, task)
        with torch.no_grad():
            for j, adapter in enumerate(adapters):
                features = plain_features(vit, x, adapter)
                for label in range(SIZES[task]):
                    known[sum(SIZES[:task]) + label, j] = features[y == label].mean(0)
            tested = [plain_features(vit, images, adapter) for adapter in adapters]
        classes = sum(SIZES[:task + 1])
        whole = dict(known)
        for c in range(classes):
            for j in range(owner[c] + 1, task + 1):
                others = [other for other in range(classes) if owner[other] >= j]
                alike = torch.stack([cosine(known[c, owner[c]], known[other, owner[c]]) for other in others]).softmax(0)
                whole[c, j] = sum(weight * known[other, j] for weight, other in zip(alike, others, strict=True))
        want = torch.zeros(5, classes).double()
        for image in range(5):
            for c in range(classes):
                for j in range(task + 1):
                    weight = 1 if j == owner[c] else 0.3 / task
                    want[image, c] += weight * cosine(tested[j][image], whole[c, j])
        torch.testing.assert_close(learner.predict(images), want, rtol=1e-6, atol=1e-6)
    stored = 3 * 6 * (2 * 128 * 5 + 5 + 128) + 128 * (3 * 1 + 2 * 2 + 2 * 3)
    assert sum(tensor.numel() for tensor in learner.stored_tensors()) == stored


def test_new_classes_answer_with_their_rows_while_they_are_trained() -> None:
    learner = stream()
    images = test_images(learner, 5).double()
    learner.end_task()
    old = learner.predict(images)
    learner.begin_task(1)
    look_trained(learner)
    logits = learner.predict(images)
    features = plain_features(fresh(), images, leaves(learner.bank.current)).detach()
    torch.testing.assert_close(logits[:, :3], old)
    for c, row in enumerate(learner.head.new_weight.detach()):
        torch.testing.assert_close(logits[:, 3 + c], torch.stack([cosine(f, row) for f in features]))
    assert learner.bank.chosen.down is learner.bank.new_down, "training goes on with the current adapter"


def test_bad_values_are_one_sentence() -> None:
    with pytest.raises(UserError, match="'ease_alpha' is -0.1"):
        begun("ease", ease_alpha=-0.1)
    with pytest.raises(UserError, match="'ease_alpha'.*no effect for"):
        begun("aper", ease_alpha=0.2)


@pytest.mark.parametrize("name, rate, decay, batch", [("ease_c100", 0.025, 5e-4, 48), ("ease_inr", 0.05, 5e-3, 16)])
def test_configs_follow_the_published_protocol(name: str, rate: float, decay: float, batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.epochs, config.batch_size) == (20, 20, batch)
    assert (config.init_lr, config.lrate, config.weight_decay) == (rate, rate, decay)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.bottleneck, config.adapter_scale, config.adapter_dropout, config.ease_alpha) == (64, 0.1, 0.1, 0.1)
