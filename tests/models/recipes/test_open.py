"""models/recipes/open.py: SD-LoRA against a few lines of plain tensor code that follow METHOD.md, section 4."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.embedded import EMBEDDED
from tests.helpers import grown, learner_of, small_config, test_images
from utils.rng import generator

CONFIG = {"gate": "none", "scheduler": "constant", "init_lr": 0.02, "lrate": 0.02}


class PlainSDLoRA:
    """One adapter per task, a scalar magnitude each; old ones divided by `||A|| ||B||`, the current one as it is."""

    def __init__(self) -> None:
        self.vit = timm.create_model(EMBEDDED, pretrained=True, num_classes=0).requires_grad_(False).eval()
        self.adapters: list[tuple[Tensor, Tensor]] = []  # per task: A [6, 2, r, d], B [6, 2, d, r]
        self.alphas: list[Tensor] = []
        self.heads: list[tuple[Tensor, Tensor]] = []
        for number, block in enumerate(self.vit.blocks):
            block.attn.qkv.register_forward_hook(lambda m, x, y, number=number: self.add(number, x[0], y))

    def add(self, block: int, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = y.chunk(3, -1)
        for task, ((A, B), alpha) in enumerate(zip(self.adapters, self.alphas)):
            parts = []
            for p in (0, 1):
                norm = 1.0 if task + 1 == len(self.adapters) else A[block, p].norm() * B[block, p].norm()
                parts.append(alpha * (x @ A[block, p].T @ B[block, p].T) / norm)
            q, v = q + parts[0], v + parts[1]
        return torch.cat([q, k, v], -1)

    def learn(self, task: int, batches, classes: int = 2, rank: int = 4, lr: float = 0.02) -> None:
        width = self.vit.num_features
        A, rows = ((2 * torch.rand(*shape, generator=generator(1993, name, task)) - 1) * bound for name, shape, bound in (
            ("adapter", (6, 2, rank, width), 1 / math.sqrt(width)), ("head", (classes, width), math.sqrt(3 / width))))
        self.adapters.append((nn.Parameter(A), nn.Parameter(torch.zeros(6, 2, width, rank))))
        self.alphas = [nn.Parameter(torch.tensor(0.8)) for _ in self.adapters]
        self.heads.append((nn.Parameter(rows), nn.Parameter(torch.zeros(classes))))
        optimizer = torch.optim.SGD([*self.adapters[-1], *self.alphas, *self.heads[-1]], lr=lr, momentum=0.9)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(F.linear(self.vit(images), *self.heads[-1]), labels - classes * task).backward()
            optimizer.step()
        self.adapters[-1] = tuple(part.detach() for part in self.adapters[-1])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        features = self.vit(images)
        return torch.cat([F.linear(features, *head) for head in self.heads], 1)


def test_two_tasks_of_training_give_the_same_logits() -> None:
    learner, plain = learner_of(small_config(**CONFIG)), PlainSDLoRA()
    images = test_images(learner)
    frozen = plain.vit(images)
    for task in range(2):
        learner.begin_task(task)
        plain.learn(task, learner.data.train_batches(task, 0, 32))
        learner.train()
        assert not torch.allclose(plain.vit(images), frozen, atol=1e-4), "the adapters must matter"
        assert torch.allclose(learner.bank.new_B, plain.adapters[-1][1], atol=2e-5)
        learner.end_task()
        learner.start_evaluation()
        assert torch.allclose(learner.predict(images), plain.logits(images), atol=2e-3, rtol=1e-3), f"task {task}"
        assert torch.allclose(learner.bank.alpha.detach(), torch.stack([a.detach() for a in plain.alphas]), atol=1e-4)


def test_magnitudes_start_at_the_published_value_in_every_task() -> None:
    learner = grown(learner_of(small_config(**CONFIG)), range(1))
    with torch.no_grad():
        learner.bank.alpha.fill_(0.3)
    learner.begin_task(1)
    assert learner.bank.alpha.tolist() == pytest.approx([0.8, 0.8]) and learner.gate().tolist() == [1, 1]
    assert learner.before_step(0) is None and learner.gate_weights() is None
