"""models/slca.py against the paper and its code on plain tensors."""

import pytest
import torch
import torch.nn.functional as F

from backbone.heads.aligned import JITTER
from models.slca import SLCA, ReturningHead
from tests.helpers import ROOT, in_batches, learner_of, small_config, with_images_in_float64
from tests.models.plain_adapters import fresh, plain_features
from utils.config import load_config
from utils.errors import UserError
from utils.rng import generator

QUICK = {"align_epochs": 2, "align_samples": 6, "align_lr": 0.05, "weight_decay": 0.01}


def begun(**changes) -> SLCA:
    learner = with_images_in_float64(learner_of(small_config(model_name="slca", nb_tasks=2, **{**QUICK, **changes})))
    learner.begin_task(0)
    return learner


def test_a_step_trains_the_whole_network_slowly() -> None:
    learner = begun(backbone_lr_scale=0.1, momentum=0.0, scheduler="constant", optimizer="sgd", init_lr=0.02)
    images, labels = next(iter(learner.data.train_batches(0, 0, 6)))
    head, optimizer = learner.head, learner.optimizer()
    learner.backward(images, labels, None, 6)
    plain = fresh().requires_grad_(True)
    rows = [row.detach().clone().requires_grad_() for row in (head.new_weight, head.new_bias)]
    loss = F.cross_entropy(plain_features(plain, images, None) @ rows[0].T + rows[1], labels)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in learner.backbone.vit.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-8, atol=1e-11)
        assert parameter.grad.abs().max() > 0, name
    torch.testing.assert_close(head.new_weight.grad, rows[0].grad, rtol=1e-9, atol=1e-12)
    optimizer.step()
    for name, before in plain.named_parameters():
        after = learner.backbone.vit.get_parameter(name)
        torch.testing.assert_close(after, before * (1 - 0.002 * 0.01) - 0.002 * before.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(head.new_weight, rows[0] * (1 - 0.02 * 0.01) - 0.02 * rows[0].grad)
    assert learner.trainable_parameters() == sum(p.numel() for p in plain.parameters()) + 2 * 129


def features_of(task: int, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    draw = generator(task, "features")
    labels = torch.arange(3).repeat_interleave(20)
    return torch.randn(60, width, generator=draw).double() + 2 * labels[:, None] - task, labels


def head_of(**changes) -> ReturningHead:
    config = small_config(model_name="slca", **{**QUICK, **changes})
    return ReturningHead(5, config, 7).double()


def learned(head: ReturningHead, task: int) -> None:
    head.grow(3, generator(task, "rows"))
    assert head.new_weight.std().item() == pytest.approx(0.02, rel=0.6) and head.new_bias.abs().max() == 0
    head.commit()
    head.absorb(head.collect(in_batches(*features_of(task)), 3), task, lambda *args: None)


def test_alignment_is_that_of_the_official_code() -> None:
    head = head_of()
    learned(head, 0)
    x = features_of(0)[0]
    assert torch.equal(head(x), F.linear(x, head.weight, head.bias)), "one task: nothing to align"
    learned(head, 1)
    means, factors = [], []
    for task in range(2):
        x, y = features_of(task)
        for label in range(3):
            members = x[y == label]
            covariance = torch.cov(members.T) + JITTER * torch.eye(5).double()
            means.append(members.mean(0) * (0.9 + (task + 1) / 2 * 0.1))
            factors.append(torch.linalg.cholesky(covariance))
    W, b = head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()
    speed = [torch.zeros_like(W), torch.zeros_like(b)]
    draw = generator(7, "align", 1)
    for epoch in range(2):
        rate = 0.05 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 2)).item()) / 2
        noise = [torch.randn(6, 5, generator=draw).double() for _ in range(6)]
        samples = torch.cat([mean + e @ L.T for mean, e, L in zip(means, noise, factors, strict=True)])
        labels = torch.arange(6).repeat_interleave(6)
        for batch in torch.randperm(36, generator=draw).split(6):
            logits = samples[batch] @ W.T + b
            norm = (logits[:, :3].norm(dim=1) + logits[:, 3:].norm(dim=1)) / 2 + 1e-7
            loss = F.cross_entropy(logits / norm[:, None] / 0.1, labels[batch])
            gradients = torch.autograd.grad(loss, (W, b))
            with torch.no_grad():
                for part, gradient, v in zip((W, b), gradients, speed, strict=True):
                    v.mul_(0.9).add_(gradient + 0.01 * part)
                    part -= rate * v
    torch.testing.assert_close(head.aligned_weight, W.detach(), rtol=1e-5, atol=1e-5)  # statistics are kept in float64 here
    torch.testing.assert_close(head.aligned_bias, b.detach(), rtol=1e-5, atol=1e-5)
    assert (head.aligned_weight - head.weight).abs().max() > 0.01


def test_the_next_task_goes_on_with_the_rows_as_they_were_trained() -> None:
    head, without = head_of(), head_of(align_epochs=0)
    for task in range(2):
        for each in (head, without):
            learned(each, task)
    assert torch.equal(head.weight, without.weight) and torch.equal(without.aligned_weight, without.weight)
    x = features_of(0)[0]
    assert torch.equal(head(x), F.linear(x, head.aligned_weight, head.aligned_bias))
    assert torch.equal(head.to_file()["weight"], head.aligned_weight.float())
    head.grow(3, generator(2, "rows"))
    torch.testing.assert_close(head(x)[:, :6], F.linear(x, head.weight, head.bias))


def test_a_frozen_network_is_neither_trained_nor_stored() -> None:
    learner = begun(backbone_lr_scale=0)
    assert learner.trainable_parameters() == 2 * 129 and not any(p.requires_grad for p in learner.backbone.parameters())
    assert len(learner.groups()) == 1 and learner.modules() == [learner.head] and learner.state()["network"] == {}


@pytest.mark.parametrize("changes, word", [({"backbone_lr_scale": -1}, "'backbone_lr_scale'"), ({"align_lr": 0}, "'align_lr'"),
                                           ({"align_epochs": -1}, "'align_epochs'"), ({"head": "ridge"}, "'head'")])
def test_bad_values_are_one_sentence(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        small_config(model_name="slca", **changes)


@pytest.mark.parametrize("name, epochs, milestone", [("slca_c100", 20, 18), ("slca_inr", 50, 40)])
def test_configs_follow_the_published_protocol(name: str, epochs: int, milestone: int) -> None:
    config = load_config(ROOT / "exps" / f"{name}.json")
    assert (config.init_epoch, config.epochs, config.batch_size) == (epochs, epochs, 128)
    assert (config.init_lr, config.lrate, config.normalize) == (0.01, 0.01, "backbone")
    assert (config.optimizer, config.momentum, config.weight_decay) == ("sgd", 0.9, 5e-4)
    assert (config.scheduler, config.milestones, config.lrate_decay) == ("steplr", [milestone], 0.1)
    assert (config.backbone_lr_scale, config.align_epochs, config.align_samples, config.align_lr) == (0.01, 5, 256, 0.01)
