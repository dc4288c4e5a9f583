"""What the methods share that put bottleneck adapters beside the MLPs of the frozen network, one per task or one in all."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.bottleneck import Bottleneck, BottleneckBank
from backbone.heads.aligned import ContinuedHead
from backbone.heads.proxy import ProxyHead
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import TaskReport
from models.optimisation import OptimisationKeys
from models.training import GradientLearner, Phase
from utils.config import Config, KeyGroup, key
from utils.errors import UserError
from utils.rng import generator, stream_seed
from utils.runs import distributed
from utils.runs.files import write_safetensors


class BottleneckKeys(KeyGroup):
    """Bottleneck adapters"""

    bottleneck: int = key(64, "Inner units of an adapter in every block.", ge=1)
    adapter_scale: float = key(0.1, "Factor on what an adapter adds to its block.", gt=0)
    adapter_dropout: float = key(
        0.1, "Share of an adapter's inner units that every training step leaves out, for each token anew, as the official "
             "code of the methods with these adapters does.", ge=0, lt=1)


class ContinuedKeys(BottleneckKeys):
    """Bottleneck adapters that go on from task to task, and a head aligned on samples"""

    bottleneck: int = key(16, "Inner units of an adapter in every block.", ge=1)
    align_epochs: int = key(30, "Epochs of training the whole head after each task but the first; 0 leaves it.", ge=0)
    align_samples: int | None = key(
        None, "Features drawn per class and epoch, and the size of a batch of them.", unset="5 times `batch_size`",
        derive=lambda config: 5 * config.batch_size, ge=1)
    align_lr: float = key(0.005, "Learning rate of this at the start; it follows a cosine.", gt=0)


class BottleneckLearner(GradientLearner):
    """A frozen network with bottleneck adapters."""

    head: ProxyHead | ContinuedHead

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bank = bank_on(self.backbone, self.config).to(self.device)
        self._drawn = (torch.zeros((), dtype=torch.long, device=self.device), 0)  # of the step: key, and its first image here

    def make_room(self, task: int) -> None:
        super().make_room(task)
        self.bank.add(generator(self.seed, "adapter", task))

    def groups(self) -> list[dict]:
        return [{"params": [*self.bank.current, *self.head.trainable()]}]

    # ---- a step

    def before_step(self, step: int) -> None:
        """What the step's dropout hangs on: (seed, task, step), and which images of the batch this process has."""
        config, data = self.config, self.data
        total = data.images_in_batch(self.task, step % data.steps_per_epoch(self.task, config.batch_size), config.batch_size)
        drawn = stream_seed(self.seed, "dropout", self.task, step) % 2**32
        self._drawn = torch.full((), drawn, device=self.device), distributed.part_of_batch(total, distributed.part()).start

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head.current_logits(self.embed_dropping(images))
        return F.cross_entropy(logits, targets, reduction="sum"), logits

    def embed_dropping(self, images: Tensor) -> Tensor:
        """Features `[b, d]` of the step's next images, with dropout."""
        drawn, first = self._drawn
        self._drawn = drawn, first + len(images)
        with self.bank.dropping(drawn, first):
            return self.embed(images)

    # ---- what the head reads

    @classmethod
    def networks(cls, adapters: int) -> list[int | None]:
        """Of the first `adapters` adapters, those in turn in force whose features the head reads side by side; None stands for
        the network as it was pretrained."""
        return [adapters - 1]

    def features(self, images: Tensor) -> Tensor:
        parts = []
        for number in self.networks(len(self.bank) + (self.bank.current is not None)):
            self.bank.choose(number)
            parts.append(self.embed(images))
        return torch.cat(parts, 1)

    def settle(self) -> None:
        if self.bank.current is not None:
            self.bank.commit()

    def end_task(self) -> TaskReport:
        super().end_task()
        return TaskReport(active_adapters=len(self.bank))

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, and the adapter if the task has trained one: `adapter_task_<task>.safetensors`."""
        written = [save_head(folder, self.head, self.task)]
        if self.task < len(self.bank):
            path = folder / f"adapter_task_{self.task}.safetensors"
            parts = {field: getattr(self.bank, field)[-1].float() for field in Bottleneck._fields}
            write_safetensors(path, parts, {"task": str(self.task), "backbone": self.backbone.identity.name})
            written.append(path)
        return written

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.snapshot()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.bank.restore(state["bank"])


class ContinuedLearner(BottleneckLearner):
    """An adapter for every task, which starts as that of the task before has ended, under a head that goes on likewise.

    network: images to what the head reads between tasks, for which each image is shown several adapters. It runs in float32
    with any `precision`: rounding must not give an image other adapters than in the network loaded from the run's files.
    """

    head: ContinuedHead
    network: nn.Module

    def make_room(self, task: int) -> None:
        super().make_room(task)
        if task > 0:
            self.bank.go_on()

    @torch.no_grad()
    def represent(self, images: Tensor) -> Tensor:
        """While a task is trained, with its adapter alone."""
        return self.embed(images) if self.head.training_rows else self.network(images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.represent(images))


class FirstTaskLearner(BottleneckLearner):
    """One adapter, trained on the first task; later tasks only add to the statistics that the head predicts from."""

    class Keys(OptimisationKeys, BottleneckKeys):
        """Training in the first task"""

    def make_room(self, task: int) -> None:
        if task == 0:
            super().make_room(task)
            return
        GradientLearner.make_room(self, task)
        self.head.commit()  # there is nothing to train rows with

    def phases(self, task: int) -> list[Phase]:
        return super().phases(task) if task == 0 else []

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        network = saved_network(saved, cls.networks, 1)
        return SavedNetwork(network, None, saved.head(len(network.networks) * network.backbone.width))


def bank_on(backbone: FrozenViT, config: Config) -> BottleneckBank:
    """An empty bank on the network, as the config has it."""
    return BottleneckBank(backbone.vit, config.backbone_type, config.bottleneck, config.adapter_scale, config.adapter_dropout)


class SideBySide(nn.Module):
    """Images `[b, 3, S, S]` to the features with each of `networks` (as of a learner) in force, side by side, `[b, k d]`."""

    def __init__(self, backbone: FrozenViT, bank: BottleneckBank, networks: Sequence[int | None] = ()) -> None:
        super().__init__()
        self.backbone, self.bank, self.networks, self.image_size = backbone, bank, networks, backbone.image_size

    def forward(self, images: Tensor) -> Tensor:
        parts = []
        for number in self.networks:
            self.bank.choose(number)
            parts.append(self.backbone(images))
        return torch.cat(parts, 1)

    def as_timm(self) -> nn.Module:
        """Refuses: see `SavedNetwork.as_timm`."""
        raise UserError("model_name: this run's network has adapters beside its MLPs, which no network of timm has; export it "
                        "as torchscript or onnx.")


def saved_network(saved: SavedRun, networks: Callable[[int], Sequence[int | None]], adapters: int) -> SideBySide:
    """The network that the head of a run reads, with the adapters that its first tasks have saved."""
    backbone = saved.backbone()
    bank = bank_on(backbone, saved.config)
    for task in range(adapters):
        bank.store(Bottleneck(**saved.tensors(f"adapter_task_{task}.safetensors")))
    return SideBySide(backbone, bank, networks(adapters))
