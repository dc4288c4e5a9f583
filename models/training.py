"""Learning a task by gradient descent: the loop that the methods with a trained head share."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads import HEADS
from models.base import BaseLearner, Session, TaskReport
from models.meter import Meter
from utils.config import Config
from utils.errors import UserError
from utils.rng import generator
from utils.runs import distributed
from utils.runs.progress import LOGGER

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def make_optimizer(config: Config, groups: list[dict], task: int) -> torch.optim.Optimizer:
    """The task's optimizer; groups may carry their own `lr`, kept as `initial_lr`, and `weight_decay` 0 where none applies."""
    decay = config.init_weight_decay if task == 0 and config.init_weight_decay is not None else config.weight_decay
    options = {"momentum": config.momentum} if config.optimizer == "sgd" else {}
    groups = [{**group, "initial_lr": group.get("lr", learning_rate(config, task))} for group in groups]
    return OPTIMIZERS[config.optimizer](groups, lr=learning_rate(config, task), weight_decay=decay, fused=True, **options)


def make_row_optimizer(config: Config, rows: list[nn.Parameter], task: int) -> torch.optim.Optimizer:
    """The optimizer for head rows alone, over a network that stays as it is: SGD at `refit_lr`, if that is given."""
    if config.refit_lr is None:
        return make_optimizer(config, [{"params": rows}], task)
    group = {"params": rows, "initial_lr": config.refit_lr}
    return torch.optim.SGD([group], lr=config.refit_lr, momentum=config.momentum, fused=True)


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


def add_up_gradients(parameters: list[Tensor], *others: Tensor) -> None:
    """The gradients of `parameters`, and the `others`, become their sums over all processes."""
    if distributed.part() == (0, 1):
        return
    for p in parameters:
        if p.grad is None:  # a process without images in this batch
            p.grad = torch.zeros_like(p)
    distributed.add_up(*(p.grad for p in parameters), *others)


class Place(NamedTuple):
    """How far the current task has come: the next epoch, batch within it and optimizer step; the epoch's sums so far."""

    epoch: int
    batch: int
    step: int
    meter: Meter


class GradientLearner(BaseLearner):
    """A frozen backbone with a growing head, trained with cross-entropy over the current task's classes.

    In a run of several processes each computes its part of every batch, and one message per step adds up the gradients. A
    DistributedDataParallel wrapper would have to be rebuilt for the new parameters of every task, and would average the gate's
    loss, which belongs to the step and not to the images.
    """

    inactive = frozenset()

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.head = HEADS[self.config.head](self.backbone.width, self.config, self.seed).to(self.device)
        self._optimizer: torch.optim.Optimizer | None = None
        self._place = Place(0, 0, 0, Meter(self.device))
        self._resumed: dict[str, Any] | None = None  # state of the optimizer to go on with
        self._skipped = 0

    # ---- what a method adds

    @abstractmethod
    def groups(self) -> list[dict]:
        """Parameter groups of the current task's optimizer."""

    def optimizer(self) -> torch.optim.Optimizer:
        """The current task's optimizer, before its first step."""
        return make_optimizer(self.config, self.groups(), self.task)

    def before_step(self, step: int) -> Tensor | None:
        """Prepares optimizer step `step` of the task; returns a term to add to the loss, if the method has one."""

    def gate_weights(self) -> Tensor | None:
        """The gate weights of the current step, if the method has a gate."""

    def describe(self) -> dict[str, float]:
        """Figures of the method for the progress display."""
        return {}

    def advice(self) -> str:
        """What to change when the loss is no longer finite."""
        return "lower init_lr or lrate"

    # ---- the task

    def begin_task(self, task: int) -> None:
        self.task = task
        self._optimizer, self._resumed, self._place = None, None, Place(0, 0, 0, Meter(self.device))
        self._skipped = 0
        self.head.grow(len(self.data.task_classes(task)), generator(self.seed, "head", task))

    def train(self, session: Session) -> None:
        config, task = self.config, self.task
        self._optimizer = self.optimizer()
        if self._resumed is not None:
            self._optimizer.load_state_dict(self._resumed)
        start, meter, epochs = self._place, self._place.meter, epochs_of(config, task)
        self._resumed = None
        for epoch in range(start.epoch, epochs):
            for group in self._optimizer.param_groups:
                group["lr"] = group["initial_lr"] * schedule_factor(config, task, epoch)
            skipped = start.batch if epoch == start.epoch else 0
            batches = self.data.train_batches(task, epoch, config.batch_size, skip=skipped, part=distributed.part())
            for batch, (images, labels) in enumerate(batches, skipped):
                total = self.data.images_in_batch(task, batch, config.batch_size)
                self._step(self._place.step, images, labels, total, meter)
                self._place = Place(epoch, batch + 1, self._place.step + 1, meter)
                shown = self.progress.step(f"Task {task}, Epoch {epoch + 1}/{epochs}", self._figures)
                if shown or self.device.type == "cpu":
                    self._stop_if_not_finite()
                session.after_step()
            self._stop_if_not_finite()
            wanted = config.eval_every and ((epoch + 1) % config.eval_every == 0 or epoch + 1 == epochs)
            LOGGER.info(self._epoch_line(epoch, epochs, meter.read(), session.evaluate() if wanted else None))
            meter = Meter(self.device)
            self._place = Place(epoch + 1, 0, self._place.step, meter)
        distributed.copy_from_main(self._trained())  # processors of different kinds may differ in the last bit

    def _trained(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _step(self, step: int, images: Tensor, labels: Tensor, total: int, meter: Meter) -> None:
        """One optimizer step on this process's part of a batch of `total` images."""
        clf, sparse, correct = self._accumulate(images, labels, self.before_step(step), total)
        add_up_gradients(self._trained(), clf, correct)
        gradients = [p.grad for p in self._trained() if p.grad is not None]
        finite = meter.watch(step, clf + sparse, gradients, self.gate_weights())
        if self.config.nan_policy == "skip" and not finite:
            self._skip(meter)
        else:
            meter.add(clf, sparse, correct, total)
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _skip(self, meter: Meter) -> None:
        """Leaves out an update that is not finite, as long as the task has had no more than `nan_limit` of them."""
        self._skipped += 1
        if self._skipped > self.config.nan_limit:
            self._stop_if_not_finite()
        step, what = meter.first_bad()
        LOGGER.warning(f"Task {self.task}, step {step}: the {what} is not finite; the step is skipped "
                       f"({self._skipped} of at most {self.config.nan_limit}).")
        meter.bad.fill_(-1)

    def _accumulate(
        self, images: Tensor, labels: Tensor, extra: Tensor | None, total: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one optimizer step, in `grad_accum` parts; mean cross-entropy, extra term, correct predictions.

        total: images of the whole batch, if these are only this process's part of it. Gradients, cross-entropy and correct
        predictions are then what these images add; the extra term's gradient is added by the main process alone.
        """
        total = len(labels) if total is None else total
        targets = labels - self.data.task_classes(self.task).start
        parts = max(1, min(self.config.grad_accum, len(labels)))
        clf, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.long, device=self.device)
        extra = torch.zeros((), device=self.device) if extra is None else extra
        pieces = list(zip(images.chunk(parts), targets.chunk(parts), strict=True)) if len(labels) else []
        for index, (x, y) in enumerate(pieces):
            logits = self.head.current_logits(self.embed(x))
            share = F.cross_entropy(logits, y, reduction="sum") / total
            last = index + 1 == len(pieces)  # the gates' graph is shared by the parts, so only the last may free it
            (share + extra if last and distributed.is_main() else share).backward(retain_graph=not last)
            clf += share.detach()
            correct += (logits.detach().argmax(1) == y).sum()
        return clf, extra.detach(), correct

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def refit_head(self, epochs: int, scheduled: bool = False) -> None:
        """Fits the current task's head rows to the network as it now is, everything else fixed; `scheduled`: with the learning
        rate falling as in training."""
        optimizer = make_row_optimizer(self.config, self.head.trainable(), self.task)
        start = self.data.task_classes(self.task).start
        self.start_evaluation()
        for epoch in range(epochs):
            first = epochs_of(self.config, self.task)
            for group in optimizer.param_groups if scheduled else []:
                group["lr"] = group["initial_lr"] * schedule_factor(self.config, self.task, epoch)
            batches = self.data.train_batches(self.task, first + epoch, self.config.batch_size, part=distributed.part())
            for batch, (images, labels) in enumerate(batches):
                if len(labels):
                    with torch.no_grad():
                        features = self.embed(images)
                    loss = F.cross_entropy(self.head.current_logits(features), labels - start, reduction="sum")
                    (loss / self.data.images_in_batch(self.task, batch, self.config.batch_size)).backward()
                add_up_gradients(self.head.trainable())
                optimizer.step()
                optimizer.zero_grad()

    def steps_done(self) -> int:
        return self._place.step

    def end_task(self) -> TaskReport:
        self._optimizer = None
        self.head.commit()
        self.start_evaluation()  # statistics are taken of the network as it is evaluated
        sums = self.head.collect(self._task_features(), len(self.data.task_classes(self.task)))
        distributed.add_up(*sums)
        self.head.absorb(sums, self.task)
        return TaskReport()

    @torch.no_grad()
    def _task_features(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the task's training images under the test transform: features `[b, d]`, labels from 0."""
        classes = self.data.task_classes(self.task)
        for images, labels in self.data.eval_batches("train", classes, self.config.batch_size, distributed.part()):
            if len(labels):
                yield self.embed(images), labels - classes.start

    def modules(self) -> list[nn.Module]:
        return [self.head]

    def state(self) -> dict[str, Any]:
        self._stop_if_not_finite()  # a checkpoint of numbers that are not would make the loss permanent
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        place = {"epoch": self._place.epoch, "batch": self._place.batch, "step": self._place.step}
        return {"task": self.task, "head": self.head.snapshot(), **place, "optimizer": optimizer,
                "meter": self._place.meter.state(), "skipped": self._skipped}

    def load_state(self, state: dict[str, Any]) -> None:
        self.task, self._skipped = state["task"], state["skipped"]
        self.head.restore(state["head"])
        self._resumed = state["optimizer"]
        meter = Meter(self.device)
        meter.load(state["meter"])
        self._place = Place(state["epoch"], state["batch"], state["step"], meter)

    # ---- log and checks

    def _figures(self) -> dict[str, float]:
        means = self._place.meter.read()
        return {"loss": means["loss"], **self.describe(), "accuracy": means["accuracy"]}

    def _epoch_line(self, epoch: int, epochs: int, means: dict[str, float], test: float | None) -> str:
        parts = [f"Loss {means['loss']:.3f}{self._loss_parts(means)}", *self._line_figures(),
                 f"Train_accy {means['accuracy']:.2f}", *([] if test is None else [f"Test_accy {test:.2f}"])]
        return f"Task {self.task}, Epoch {epoch + 1}/{epochs} => {', '.join(parts)}"

    def _loss_parts(self, means: dict[str, float]) -> str:
        return ""

    def _line_figures(self) -> list[str]:
        return [f"{name}={value:.3f}" for name, value in self.describe().items()]

    def _stop_if_not_finite(self) -> None:
        bad = self._place.meter.first_bad()
        if bad is None:
            return
        step, what = bad
        epoch = step // self.data.steps_per_epoch(self.task, self.config.batch_size) + 1
        figures = "".join(f", {name} {value:.3f}" for name, value in self.describe().items())
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({g["lr"] for g in self._optimizer.param_groups}, reverse=True))
        raise UserError(f"The {what} is no longer finite at task {self.task}, epoch {epoch}, step {step}{figures}, learning "
                        f"rates {rates}; the likely cause is a learning rate that is too high: {self.advice()}, then run "
                        "again with --overwrite (what is finished stays readable).")
