"""Learning a task by gradient descent: the loop that the methods with a trained head share."""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.head import GrowingHead
from models.base import BaseLearner
from utils.config import Config
from utils.errors import UserError
from utils.progress import LOGGER
from utils.rng import generator

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(config: Config, groups: list[dict], task: int) -> torch.optim.Optimizer:
    """The task's optimizer; groups carry their own `lr`, and `weight_decay` 0 where none applies."""
    decay = config.init_weight_decay if task == 0 and config.init_weight_decay is not None else config.weight_decay
    options = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    return OPTIMIZERS[config.optimizer](groups, lr=learning_rate(config, task), weight_decay=decay, fused=True, **options)


def learning_rate(config: Config, task: int) -> float:
    """Initial learning rate of `task`."""
    return config.init_lr if task == 0 else config.lrate


def epochs_of(config: Config, task: int) -> int:
    """Epochs that `task` is trained for."""
    return config.init_epoch if task == 0 else config.epochs


def schedule_factor(config: Config, task: int, epoch: int) -> float:
    """Learning rate of `epoch` over the initial one; every parameter group follows the same factor.

    Cosine (Loshchilov & Hutter, 2017) falls to `min_lr` over `tuned_epoch` epochs and stays there.
    """
    base = learning_rate(config, task)
    if config.scheduler == "cosine":
        period = config.tuned_epoch or epochs_of(config, task)
        floor = config.min_lr / base
        return floor + (1 - floor) * (1 + math.cos(math.pi * min(epoch / period, 1))) / 2
    if config.scheduler == "steplr":
        first = task == 0
        milestones = config.init_milestones if first and config.init_milestones is not None else config.milestones
        decay = config.init_lr_decay if first and config.init_lr_decay is not None else config.lrate_decay
        return decay ** sum(epoch >= milestone for milestone in milestones)
    return 1.0


class Meter:
    """Running sums on the device, read only when they are shown: reading waits for the device."""

    NAMES = ("loss", "clf", "sparse", "correct", "images")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.long, device=device)
        self.batches = 0

    def add(self, step: int, clf: Tensor, sparse: Tensor, correct: Tensor, images: int) -> None:
        """One optimizer step: mean losses, number of correct predictions, number of images."""
        row = torch.stack([(clf + sparse).double(), clf.double(), sparse.double(), correct.double(),
                           correct.new_tensor(images, dtype=torch.float64)]).detach()
        self.sums += row
        self.bad_step = torch.where((self.bad_step < 0) & ~row.isfinite().all(), step, self.bad_step)
        self.batches += 1

    def read(self) -> dict[str, float]:
        """Mean losses and the accuracy in percent since the meter was made."""
        sums = dict(zip(self.NAMES, self.sums.tolist(), strict=True))
        means = {name: sums[name] / max(self.batches, 1) for name in ("loss", "clf", "sparse")}
        return {**means, "accuracy": 100 * sums["correct"] / max(sums["images"], 1)}


class GradientLearner(BaseLearner):
    """A frozen backbone with a growing linear head, trained with cross-entropy over the current task's classes."""

    inactive = frozenset()

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.head = GrowingHead(self.backbone.width).to(self.device)

    # ---- what a method adds

    @abstractmethod
    def groups(self) -> list[dict]:
        """Parameter groups of the current task's optimizer."""

    def before_step(self, step: int) -> Tensor | None:
        """Prepares optimizer step `step` of the task; returns a term to add to the loss, if the method has one."""

    def describe(self) -> dict[str, float]:
        """Figures of the method for the progress display."""
        return {}

    def advice(self) -> str:
        """What to change when the loss is no longer finite."""
        return "lower init_lr or lrate"

    # ---- the task

    def begin_task(self, task: int) -> None:
        self.task = task
        self.head.grow(len(self.data.task_classes(task)), generator(self.seed, "head", task))

    def train(self, evaluate: Callable[[], float]) -> None:
        config, task = self.config, self.task
        optimizer = make_optimizer(config, self.groups(), task)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: schedule_factor(config, task, epoch))
        epochs, step = epochs_of(config, task), 0
        for epoch in range(epochs):
            meter = Meter(self.device)
            for images, labels in self.data.train_batches(task, epoch, config.batch_size):
                extra = self.before_step(step)
                meter.add(step, *self._accumulate(images, labels, extra), len(labels))
                optimizer.step()
                optimizer.zero_grad()
                shown = self.progress.step(f"Task {task}, Epoch {epoch + 1}/{epochs}", lambda: self._figures(meter))  # noqa: B023
                if shown or self.device.type == "cpu":
                    self._stop_if_not_finite(meter, epoch)
                step += 1
            scheduler.step()
            self._stop_if_not_finite(meter, epoch)
            wanted = config.eval_every and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs)
            LOGGER.info(self._epoch_line(epoch, epochs, meter.read(), evaluate() if wanted else None))

    def _accumulate(self, images: Tensor, labels: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one optimizer step, in `grad_accum` parts; mean cross-entropy, extra term, correct predictions."""
        targets = labels - self.data.task_classes(self.task).start
        parts = min(self.config.grad_accum, len(labels))
        clf, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.long, device=self.device)
        extra = torch.zeros((), device=self.device) if extra is None else extra
        pieces = list(zip(images.chunk(parts), targets.chunk(parts), strict=True))
        for index, (x, y) in enumerate(pieces):
            logits = self.head.current_logits(self.embed(x))
            share = F.cross_entropy(logits, y, reduction="sum") / len(labels)
            last = index + 1 == len(pieces)  # the gates' graph is shared by the parts, so only the last may free it
            (share + extra if last else share).backward(retain_graph=not last)
            clf += share.detach()
            correct += (logits.detach().argmax(1) == y).sum()
        return clf, extra.detach(), correct

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def refit_head(self, epochs: int) -> None:
        """Fits the current task's head rows to the network as it now is, everything else fixed."""
        optimizer = make_optimizer(self.config, [{"params": [self.head.new_weight, self.head.new_bias]}], self.task)
        start = self.data.task_classes(self.task).start
        self.start_evaluation()
        for epoch in range(epochs):
            first = epochs_of(self.config, self.task)
            for images, labels in self.data.train_batches(self.task, first + epoch, self.config.batch_size):
                with torch.no_grad():
                    features = self.embed(images)
                F.cross_entropy(self.head.current_logits(features), labels - start).backward()
                optimizer.step()
                optimizer.zero_grad()

    def modules(self) -> list[nn.Module]:
        return [self.head]

    # ---- log and checks

    def _figures(self, meter: Meter) -> dict[str, float]:
        means = meter.read()
        return {"loss": means["loss"], **self.describe(), "accuracy": means["accuracy"]}

    def _epoch_line(self, epoch: int, epochs: int, means: dict[str, float], test: float | None) -> str:
        parts = [f"Loss {means['loss']:.3f}{self._loss_parts(means)}", *self._line_figures(),
                 f"Train_accy {means['accuracy']:.2f}", *([] if test is None else [f"Test_accy {test:.2f}"])]
        return f"Task {self.task}, Epoch {epoch + 1}/{epochs} => {', '.join(parts)}"

    def _loss_parts(self, means: dict[str, float]) -> str:
        return ""

    def _line_figures(self) -> list[str]:
        return [f"{name}={value:.3f}" for name, value in self.describe().items()]

    def _stop_if_not_finite(self, meter: Meter, epoch: int) -> None:
        step = int(meter.bad_step)
        if step >= 0:
            tau = "".join(f", {name} {value:.3f}" for name, value in self.describe().items())
            raise UserError(f"The loss is no longer finite at task {self.task}, epoch {epoch + 1}, step {step}{tau}, learning "
                            f"rate {learning_rate(self.config, self.task):g}; {self.advice()}, then run again: finished "
                            "tasks are saved.")
