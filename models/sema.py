"""SEMA: self-expansion with modular adapters (Wang, Lu, Yao & Gong, CVPR 2025, arXiv 2403.18886).

Every block has an adapter beside its MLP, `f(x) = U relu(D x + d) + u`; the last blocks may get more of them, mixed per image:
`sum_k w_k f_k(x)`, `w = softmax(R mean(x) + r)`, the mean being over tokens. Each adapter of these has a descriptor, an
autoencoder of `mean(x)`, and the mean and deviation of its last errors in training.

Task 0 trains all of it. A later task first looks through its images: a block for whose batch every descriptor's mean |z|, z an
error less its mean over its deviation, is above `expansion_threshold`, gets one more adapter, the shallowest such block first.
Cross-entropy over the task's classes then trains the adapter, its router column and the head rows; then the descriptor learns
to reconstruct; the look goes on with the next batch, until a pass finds nothing new. A block grows once per task. A task for
which none grows trains its head rows alone. What is trained once is trained no more.

As in the official code, huiyiwang01/SEMA-CL at 5a45512; docs/BASELINES.md says where the text and the code differ, and what of
the code is not done.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.mixture import ADAPTER, DESCRIPTOR, ROUTER, MixtureBank
from models.adapted import SideBySide
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import TaskReport
from models.optimisation import epochs_of, optimizer_of, schedule_factor
from models.training import GradientLearner, Phase
from utils.config import Config, key
from utils.rng import generator
from utils.runs import distributed
from utils.runs.files import write_safetensors
from utils.runs.progress import LOGGER

_LOOK = 1_000_000  # the views with which a task looks for what is new are numbered from here, those of training from 0


class SEMA(GradientLearner):
    """Adapters beside the MLPs that are mixed by a router; in the last blocks one more wherever a task's images look new."""

    reads_class_token_alone = False  # router and descriptors look at all tokens

    class Keys(GradientLearner.Keys):
        """Self-expansion of SEMA"""

        bottleneck: int = key(16, "Inner units of an adapter.", ge=1)
        growing_share: float = key(
            0.25, "Share of the blocks, the last ones, that may get more than one adapter; published: 3 of 12. At least one.",
            gt=0, le=1)
        expansion_threshold: float = key(
            2.0, "How many standard deviations off the errors of all descriptors of a block have to be for one more adapter.",
            ge=0)
        detect_batch_size: int = key(128, "Images over which these deviations are averaged.", ge=1)
        rd_dim: int = key(128, "Inner units of a descriptor.", ge=1)
        rd_epochs: int = key(20, "Epochs of training new descriptors.", ge=1)
        rd_lr: float = key(0.01, "Learning rate of this at the start; it falls along a cosine.", gt=0)
        rd_buffer: int = key(500, "Last errors of a descriptor in training that its mean and deviation are of.", ge=3)
        init_epoch: int = key(5, "Epochs of training in the first task.", ge=1)
        epochs: int = key(5, "Epochs of training in a later task, for every block that grows.", ge=1)
        init_lr: float = key(0.005, "Learning rate in the first task.", gt=0)
        lrate: float = key(0.005, "Learning rate in every later task.", gt=0)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bank = bank_on(self.backbone, self.config).to(self.device)
        self._grown: list[int] = []  # blocks that the current task has added an adapter to
        self._look_from: tuple[int, int, bool] | None = (0, 0, False)  # pass, batch, whether the pass has added; None: done
        self._describing = False
        self._errors: list[Tensor] = []  # of a step's descriptors

    # ---- the task

    def grow_head(self, task: int) -> None:
        """Rows from U(-1 / sqrt(d), 1 / sqrt(d)), biases 0, as the official code starts them."""
        super().grow_head(task)
        rows = self.head.new_weight
        draw = torch.rand(rows.shape, generator=generator(self.seed, "head", task))
        rows.data.copy_((draw * 2 - 1) / math.sqrt(self.backbone.width))

    def make_room(self, task: int) -> None:
        super().make_room(task)
        self._grown, self._look_from = [], None if task == 0 else (0, 0, False)
        self.bank.choose(0)
        if task == 0:
            for number, cell in enumerate(self.bank.cells):
                cell.add(generator(self.seed, "adapter", number))

    def phases(self, task: int) -> list[Phase]:
        """Adapters, then descriptors, for the first task and for every block that has grown; else head rows alone."""
        config = self.config
        adapters = Phase(epochs_of(config, task), config.batch_size, self.optimizer, partial(self._prepare, False),
                         partial(schedule_factor, config, task))
        descriptors = Phase(config.rd_epochs, config.batch_size, self._descriptor_optimizer, partial(self._prepare, True),
                            lambda epoch: (1 + math.cos(math.pi * epoch / config.rd_epochs)) / 2)
        rounds = 1 if task == 0 else len(self._grown) if task == self.task else 0
        return [adapters, descriptors] * rounds or [adapters]

    def groups(self) -> list[dict]:
        return [{"params": [*self.bank.current(*ADAPTER, *ROUTER), *self.head.trainable()], "name": "adapters and head"}]

    def _descriptor_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        decay = config.init_weight_decay if self.task == 0 else config.weight_decay
        groups = [{"params": self.bank.current(*DESCRIPTOR), "name": "descriptors"}]
        return optimizer_of(config.optimizer, groups, config.rd_lr, config.momentum, decay)

    def train(self) -> None:
        while self._look_from is not None and not self._settled:
            if self._grown:
                super().train()
                self.bank.commit()
            self._look()
        if not self._grown:
            super().train()

    @torch.no_grad()
    def _look(self) -> None:
        """Goes on looking through the task's images, until a block gets an adapter or a pass over them has ended without."""
        config, data, size = self.config, self.data, self.config.detect_batch_size
        number, start, added = self._look_from
        steps, left = data.steps_per_epoch(self.task, size), [b for b in self.bank.growing if b not in self._grown]
        while left:
            batches = data.train_batches(self.task, _LOOK + number, size, skip=start, part=self._process)
            for batch, (images, _) in enumerate(batches, start):
                self.work("looking for what is new", batch, steps)
                scores = self._scores(images, data.images_in_batch(self.task, batch, size))
                new = [block for block in left if scores[block] > config.expansion_threshold]
                if new:
                    self._grown.append(new[0])
                    self._look_from = number, batch + 1, True
                    self.bank.cells[new[0]].add(generator(self.seed, "adapter", self.task, new[0]))
                    LOGGER.info(f"Task {self.task}: block {new[0]} gets adapter {len(self.bank.cells[new[0]])}, since none of "
                                f"its descriptors knows these images (z {scores[new[0]]:.2f} > {config.expansion_threshold})")
                    return
            if not added:
                break
            number, start, added = number + 1, 0, False
        self._look_from = None

    def _scores(self, images: Tensor, total: int) -> dict[int, float]:
        """For every block that may grow the mean |z| of a batch by the descriptor to which it is least new.

        total: images of the whole batch, of which these are only this process's part."""
        sums = {block: self.bank.cells[block].mean.new_zeros(len(self.bank.cells[block])) for block in self.bank.growing}
        if len(images):
            for block, means in self._means(images)[1].items():
                sums[block] += self.bank.cells[block].scores(means).sum(1)
        distributed.add_up(*sums.values())
        least = torch.stack([part.min() for part in sums.values()]) / total
        return dict(zip(sums, least.tolist(), strict=True))

    def _means(self, images: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """Features, and what the descriptors look at, by block, in the bank's precision."""
        with self.bank.watching() as seen:
            features = self.embed(images, self.backbone.vit)
        return features, {block: means.to(self.head.weight.dtype) for block, means in seen.items()}

    # ---- a step

    def _prepare(self, describing: bool, step: int) -> None:
        self._describing, self._errors = describing, []

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not self._describing:
            return super().loss(images, targets)
        with torch.no_grad():
            features, means = self._means(images)
            logits = self.head.current_logits(features)
        blocks = [block for block in self.bank.growing if self.bank.cells[block].current(DESCRIPTOR)]
        errors = torch.stack([self.bank.cells[block].error(means[block]) for block in blocks])
        self._errors.append(errors.detach())
        return errors.sum(), logits

    def backward(self, images: Tensor, labels: Tensor, extra: Tensor | None, total: int) -> tuple[Tensor, Tensor, Tensor]:
        result = super().backward(images, labels, extra, total)
        if self._describing:
            self._remember(total)
        return result

    def _remember(self, total: int) -> None:
        """The errors of a step's whole batch, of `total` images, are put down for every descriptor in training."""
        cells = [cell for cell in self.bank.cells if cell.grows and cell.current(DESCRIPTOR)]
        own, errors = distributed.part_of_batch(total, self._process), cells[0].recent.new_zeros(len(cells), total)
        if self._errors:
            errors[:, own.start:own.stop] = torch.cat(self._errors, 1)
        distributed.add_up(errors)
        for cell, of_cell in zip(cells, errors, strict=True):
            cell.remember(of_cell)

    # ---- what is left

    def trainable_parameters(self) -> int:
        """Of a later task as far as it has grown, whether or not that is still being trained."""
        cells = self.bank.cells if self.task == 0 else [self.bank.cells[block] for block in self._grown]
        return sum(cell.size() for cell in cells) + sum(part.numel() for part in self.head.trainable())

    def settle(self) -> None:
        self.bank.commit()

    def end_task(self) -> TaskReport:
        super().end_task()
        counts = {f"adapters_block_{block}": len(self.bank.cells[block]) for block in self.bank.growing}
        return TaskReport(active_adapters=sum(len(cell) for cell in self.bank.cells), numbers=counts)

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, and in `mixture_task_<task>.safetensors` all adapters and routers."""
        path = folder / f"mixture_task_{self.task}.safetensors"
        write_safetensors(path, self.bank.to_file(), {"task": str(self.task), "backbone": self.backbone.identity.name})
        return [save_head(folder, self.head, self.task), path]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        bank = bank_on(backbone, saved.config)
        bank.from_file(saved.tensors(f"mixture_task_{saved.task}.safetensors"))
        return SavedNetwork(SideBySide(backbone, bank, [0]), None, saved.head(backbone.width))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.snapshot(), "grown": self._grown, "look_from": self._look_from}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.bank.restore(state["bank"])
        self._grown, look = list(state["grown"]), state["look_from"]
        self._look_from = None if look is None else tuple(look)


def bank_on(backbone: FrozenViT, config: Config) -> MixtureBank:
    """An empty bank on the network, as the config has it."""
    growing = max(1, int(config.growing_share * len(backbone.vit.blocks) + 0.5))
    return MixtureBank(backbone.vit, config.backbone_type, growing, config.bottleneck, config.rd_dim, config.rd_buffer)
