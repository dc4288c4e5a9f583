"""The SD-LoRA baseline against a few lines of plain tensor code that follow METHOD.md, section 4."""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.embedded import EMBEDDED
from tests.helpers import learner_of, small_config, test_images
from utils.rng import generator


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

    def learn(self, A: Tensor, head: tuple[Tensor, Tensor], batches, start: int, lr: float) -> None:
        B = torch.zeros(*A.shape[:2], A.shape[3], A.shape[2])
        self.adapters.append((nn.Parameter(A.clone()), nn.Parameter(B)))
        self.alphas = [nn.Parameter(torch.tensor(0.8)) for _ in self.adapters]
        self.heads.append(tuple(nn.Parameter(part.clone()) for part in head))
        parameters = [*self.adapters[-1], *self.alphas, *self.heads[-1]]
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(F.linear(self.vit(images), *self.heads[-1]), labels - start).backward()
            optimizer.step()
        self.adapters[-1] = tuple(part.detach() for part in self.adapters[-1])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        features = self.vit(images)
        return torch.cat([F.linear(features, *head) for head in self.heads], 1)


def test_three_tasks_of_training_give_the_same_logits() -> None:
    config = small_config(gate="none", gate_lr=None, scheduler="constant", rank=4, init_lr=0.02, lrate=0.02)
    learner, plain = learner_of(config), PlainSDLoRA()
    images = test_images(learner)
    frozen = plain.vit(images)
    for task in range(3):
        learner.begin_task(task)
        A = learner.bank.new_A.detach()
        head = (learner.head.new_weight.detach(), learner.head.new_bias.detach())
        plain.learn(A, head, learner.data.train_batches(task, 0, config.batch_size), 2 * task, 0.02)
        learner.train()
        assert not torch.allclose(plain.vit(images), frozen, atol=1e-4), "the adapters must matter"
        trained = learner.bank.new_B.detach().clone()
        assert torch.allclose(trained, plain.adapters[-1][1], atol=2e-5)
        learner.end_task()
        learner.start_evaluation()
        assert torch.allclose(learner.predict(images), plain.logits(images), atol=2e-3, rtol=1e-3), f"task {task}"
        assert torch.allclose(learner.bank.alpha.detach(), torch.stack([a.detach() for a in plain.alphas]), atol=1e-4)


def test_magnitudes_start_at_the_published_value() -> None:
    learner = learner_of(small_config(gate="none", gate_lr=None))
    learner.begin_task(0)
    assert learner.bank.alpha.tolist() == [torch.tensor(0.8).item()]
    bound = learner.bank.new_A.abs().max()
    assert 0 < bound <= 1 / 128**0.5 and learner.bank.new_B.abs().max() == 0
    again = (torch.rand(6, 2, 4, 128, generator=generator(1993, "adapter", 0)) * 2 - 1) / 128**0.5
    assert torch.allclose(learner.bank.new_A, again)
