"""EASE: a subspace for every task (Zhou, Sun, Ye & Zhan, CVPR 2024, arXiv 2403.12030).

Task t trains an adapter of its own with proxy rows, cross-entropy over its classes. With the adapters 0..t the network gives
features f_0..f_t, a subspace each. Means `P[c, j]` of class c in subspace j are known for every subspace up to that of the
class's own task i: later adapters come when its images are gone. The others are put together from classes c' of tasks from j
on, whose means are known in both subspaces: `P[c, j] = sum_c' softmax_c'(cos(P[c, i], P[c', i])) P[c', j]`. Logits:
`cos(f_i, P[c, i]) + alpha / t sum_{j != i} cos(f_j, P[c, j])`.

As in the official code, sun-hailong/CVPR24-Ease at 6d67508: the text has alpha without the division by t, the number of other
subspaces. Its options for the pretrained network as one more subspace, used there on CUB and OmniBenchmark, are left out.
Every image needs a forward per task. What is not known is a function of what is, and neither stored nor counted.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.heads.linear import Features, Pause
from backbone.heads.proxy import TaskMeansHead, class_means, class_sums
from models.adapted import BottleneckKeys, BottleneckLearner, saved_network
from models.artifacts import SavedNetwork, SavedRun
from models.optimisation import LaterTaskKeys, OptimisationKeys
from utils.config import Config, key


def complete(known: list[Tensor], sizes: list[int]) -> Tensor:
    """Means of every class in every subspace, `[classes, tasks, d]`, from those `known` for the classes of each task: for task
    i `[c, i + 1, d]`. sizes: c of each task."""
    tasks, starts = len(known), [sum(sizes[:task]) for task in range(len(sizes))]
    means = torch.cat([F.pad(part, (0, 0, 0, tasks - part.shape[1])) for part in known])
    for own in range(tasks):
        rows = slice(starts[own], starts[own] + sizes[own])
        for other in range(own + 1, tasks):
            both = means[starts[other]:]  # classes that have means of images in both subspaces
            alike = F.normalize(means[rows, own], dim=1) @ F.normalize(both[:, own], dim=1).T  # (10, 768) @ (768, 40)
            means[rows, other] = alike.softmax(1) @ both[:, other]
    return means


class SubspaceHead(TaskMeansHead):
    """Cosines in every subspace, features of all of them side by side `[b, tasks d]` in; while a task is trained its classes
    answer with the cosines of their proxy rows, of the newest features.

    known: one tensor `[c, i + 1, d]` for each task i. readout `[classes, tasks d]`: all means as unit vectors times the
    weights of their subspaces; made from `known`, and no parameter or buffer. Of a class that comes back every task has means,
    as if they were classes of their own; it is as likely as the likeliest of them.
    """

    kind = "ease"

    def __init__(self, width: int, config: Config, seed: int, alpha: float) -> None:
        super().__init__(width, config, seed)
        self.alpha = alpha
        self.classes: int | None = None  # of every task, where they come back
        self.readout = torch.zeros(0, 0)

    def begin(self, classes: range, visits: tuple[int, int], generator: torch.Generator) -> None:
        super().begin(classes, visits, generator)
        self.classes = len(classes) if visits[1] > 1 else None

    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """Sums `[c, tasks d]` and numbers `[c]` of the images of each class."""
        return class_sums(features, classes, self.weight.new_zeros(0, (len(self.known) + 1) * self.width))

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        self.know([*self.known, class_means(sums).unflatten(1, (-1, self.width)).to(self.weight)])

    @torch.no_grad()
    def know(self, known: list[Tensor]) -> None:
        super().know(known)
        tasks = len(known)
        self.readout = self.weight.new_zeros(0, tasks * self.width)
        if tasks:
            own = torch.tensor([task for task, size in enumerate(self.sizes) for _ in range(size)])
            weight = torch.full((len(own), tasks), self.alpha / max(tasks - 1, 1))
            weight[torch.arange(len(own)), own] = 1
            means = F.normalize(complete(list(self.known), self.sizes), dim=2)
            self.readout = (means * weight.to(means)[:, :, None]).flatten(1)

    def forward(self, features: Tensor) -> Tensor:
        parts = F.normalize(features.unflatten(1, (-1, self.width)), dim=2)  # (48, 7680) -> (48, 10, 768)
        logits = parts[:, :len(self.known)].flatten(1) @ self.readout.to(features).T  # (48, 7680) @ (7680, 100)
        if self.training_rows:
            logits = torch.cat([logits, parts[:, -1] @ F.normalize(self.new_weight).T], 1)
        return logits if self.classes is None else logits.unflatten(1, (-1, self.classes)).amax(1)

    # ---- what is stored

    def snapshot(self) -> dict:
        return {**super().snapshot(), "classes": self.classes}

    def restore(self, state: dict) -> None:
        super().restore(state)
        self.classes = state["classes"]


class EASE(BottleneckLearner):
    """An adapter and a subspace for every task; nearest class means by cosine in all subspaces, those that no image has shown
    put together from classes that resemble."""

    scenarios = ("class", "domain")

    class Keys(OptimisationKeys, LaterTaskKeys, BottleneckKeys):
        """Subspaces of EASE"""

        ease_alpha: float = key(
            0.1, "Weight of all subspaces together that are not of a class's own task; 0 looks at its own alone.", ge=0)

    def make_head(self) -> SubspaceHead:
        return SubspaceHead(self.backbone.width, self.config, self.seed, self.config.ease_alpha)

    @classmethod
    def networks(cls, adapters: int) -> list[int | None]:
        return list(range(adapters))

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        network = saved_network(saved, cls.networks, saved.task + 1)
        head = SubspaceHead(network.backbone.width, saved.config, saved.seed, saved.config.ease_alpha)
        head.from_file(saved.tensors(f"head_task_{saved.task}.safetensors"))
        seen = saved.result["tasks"][saved.task]["seen_classes"]
        head.classes = seen if seen < sum(head.sizes) else None
        return SavedNetwork(network, None, head)
