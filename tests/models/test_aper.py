"""models/aper.py against the paper on plain tensors."""

import pytest
import torch

from tests.helpers import ROOT, test_images
from tests.models.plain_adapters import begun, check_training_step, fresh, leaves, plain_features, task_images
from utils.config import load_config


def test_loss_and_gradients_of_the_first_task() -> None:
    check_training_step(begun("aper"))


def test_prediction_is_the_nearest_mean_of_both_networks_features() -> None:
    learner = begun("aper")
    adapter, vit = leaves(learner.bank.current), fresh()

    @torch.no_grad()
    def both(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([plain_features(vit, images, None), plain_features(vit, images, adapter)], 1)

    images, means = test_images(learner, 7).double(), []
    with torch.no_grad():  # while it is trained the task's own rows answer
        features = plain_features(vit, images, adapter)
    rows = learner.head.new_weight.detach()
    cosines = features @ rows.T / features.norm(dim=1)[:, None] / rows.norm(dim=1)
    torch.testing.assert_close(learner.predict(images), cosines * learner.head.scale.detach())
    for task in range(2):
        learner.end_task()
        x, y = task_images(learner, task)
        features = both(x)
        means += [features[y == label].mean(0) for label in range(2)]
        tested = both(images)
        want = torch.stack([torch.stack([f @ mean / (f.norm() * mean.norm()) for mean in means]) for f in tested])
        torch.testing.assert_close(learner.predict(images), want, rtol=1e-9, atol=1e-9)
        learner.begin_task(task + 1)
        learner.train()
        assert learner.trainable_parameters() == 0


@pytest.mark.parametrize("name, epochs, rate, decay, batch", [("aper_c100", 20, 0.01, 5e-4, 48),
                                                              ("aper_inr", 10, 0.05, 5e-3, 16)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, rate: float, decay: float, batch: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.init_lr, config.weight_decay, config.batch_size) == (epochs, rate, decay, batch)
    assert (config.optimizer, config.momentum, config.scheduler, config.min_lr) == ("sgd", 0.9, "cosine", 0)
    assert (config.bottleneck, config.adapter_scale, config.adapter_dropout) == (64, 0.1, 0.1)
