"""Fitting the rows of the head to a network that stays as it is.

The frozen network sees some augmented views of the task's images once; the rows are then trained on its features, which cost
next to nothing. Shapes: n images of the task, d width.
"""


from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.optimisation import scale_learning_rates
from utils.config import KeyGroup, key
from utils.rng import generator
from utils.runs import distributed
from utils.runs.progress import LOGGER

if TYPE_CHECKING:
    from models.training import GradientLearner


class RowFitKeys(KeyGroup):
    """Fitting head rows"""

    row_fit: Literal["with_adapter", "alike"] = key(
        "with_adapter",
        'What the new head rows are: `"with_adapter"`, trained with the adapter as SD-LoRA does, or `"alike"`, fitted '
        "from 0 by an optimizer of their own to the network as it ends the task, so that no task's rows outshout others.")
    row_epochs: int | None = key(
        None, "Epochs of such a fit, in every task; they run over features and cost little.",
        unset="the epochs of a later task", ge=1)
    row_views: int = key(
        2, "Augmented views of the task's images from which the features are taken, each by one pass through the network.",
        ge=1)
    refit_lr: float | None = key(
        None, "Learning rate of SGD (with `momentum`) for head rows that are fitted to a network that stays as it is.",
        unset="the optimizer and learning rate of the task", gt=0)


class RefitKeys(KeyGroup):
    """Refitting head rows"""

    refit_epochs: int = key(
        2, 'Epochs of refitting the new rows of the head after an adapter was pruned, with `row_fit` `"with_adapter"`; 0 '
           "leaves them.", ge=0)


class RowFit:
    """One fit of the current task's rows, from where they are, in `epochs` epochs over `views` views of the images.

    An epoch takes the next view, in turn; from the second time on its batches are drawn anew. scheduled: with the learning
    rate falling as in training. Every process sees its part of the images and then fits the rows of all of them, alike.
    """

    def __init__(self, learner: "GradientLearner", epochs: int, views: int, scheduled: bool = False,
                 state: list[Tensor] | None = None) -> None:
        self.learner, self.epochs, self.views, self.scheduled = learner, epochs, min(views, epochs), scheduled
        self.features = [features.to(learner.device) for features in state or []]

    def state(self) -> list[Tensor]:
        """The features `[n, d]` of the views that have been seen, for a checkpoint."""
        return self.features

    def run(self, whole: bool = False) -> None:
        """Fits the rows. `whole`: a signal may be answered with a checkpoint of the learner, this fit's state in it."""
        learner = self.learner
        learner.start_evaluation()
        labels = [self._labels(view) for view in range(self.views)]
        for view in range(len(self.features), self.views):
            self.features.append(self._look(view, whole))
        optimizer, training = learner.row_optimizer(), learner.phases(learner.task)[0]
        loss = torch.zeros((), device=learner.device)
        for epoch in range(self.epochs):
            if self.scheduled:
                scale_learning_rates(optimizer, training.rate(epoch * training.epochs / self.epochs))
            view = epoch % self.views
            loss = self._epoch(optimizer, self.features[view], labels[view], epoch)
            learner.work("row fit", epoch, self.epochs)
        distributed.copy_from_main(learner.head.trainable())
        LOGGER.info(f"Task {learner.task}: head rows fitted in {self.epochs} epochs on {self.views} views, loss "
                    f"{loss.item():.3f}")

    def _labels(self, view: int) -> Tensor:
        """int64 `[n]`, from 0, in the order of the view's batches."""
        data, task = self.learner.data, self.learner.task
        return data.train_labels(task, self._epoch_number(view)) - data.task_classes(task).start

    def _epoch_number(self, view: int) -> int:
        """By which augmentation is keyed: views follow the epochs of training."""
        return self.learner.epochs() + view

    @torch.no_grad()
    def _look(self, view: int, whole: bool) -> Tensor:
        """Features `[n, d]` of one view, in the order of its batches."""
        learner, size = self.learner, self.learner.config.batch_size
        data, task, part = learner.data, learner.task, distributed.part()
        steps = data.steps_per_epoch(task, size)
        features = learner.head.weight.new_zeros(data.train_size(task), learner.backbone.width)
        places = distributed.parts_of_batches(data.train_size(task), size, part)
        batches = data.train_batches(task, self._epoch_number(view), size, part=part)
        for batch, (images, labels) in enumerate(batches):
            learner.work("features for the row fit", view * steps + batch, self.views * steps, whole)
            if len(labels):
                features[places[batch].start:places[batch].stop] = learner.embed(images)
        distributed.add_up(features)  # every process has filled in its part of zeros
        return features

    @torch.enable_grad()
    def _epoch(self, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """One epoch over the features of a view; the loss of its last batch."""
        learner = self.learner
        if epoch >= self.views:
            order = torch.randperm(len(labels), generator=generator(learner.seed, "rows", learner.task, epoch))
            features, labels = features[order.to(labels.device)], labels[order.to(labels.device)]
        size = learner.config.batch_size
        for x, y in zip(features.split(size), labels.split(size), strict=True):
            loss = F.cross_entropy(learner.head.current_logits(x), y, reduction="sum") / len(y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()


def fit_alike(learner: "GradientLearner", seen: list[Tensor]) -> RowFit:
    """The fit of `row_fit` "alike": from 0 and for as long in every task, so that no task's rows grow larger than others'."""
    learner.head.clear()
    later = min(1, learner.data.nb_tasks - 1)  # a first task that is trained for longer has no longer a fit
    epochs = learner.config.row_epochs or learner.phases(later)[0].epochs
    return RowFit(learner, epochs, learner.config.row_views, scheduled=True, state=seen)
