"""Learning a task by gradient descent: the loop that the methods with a trained head share, and what it sums up."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads import HEADS
from backbone.heads.linear import Features, GrowingHead
from models import optimisation
from models.base import BaseLearner, TaskReport
from models.optimisation import Phase, epochs_of, make_optimizer, make_row_optimizer, scale_learning_rates, schedule_factor
from models.rows import RowFit, RowFitKeys, fit_alike
from utils.config import Config
from utils.errors import UserError
from utils.rng import generator
from utils.runs import distributed
from utils.runs.progress import LOGGER

WATCHED = ("loss", "gradient", "gate")  # in the order in which the first one that is not finite is named


class Meter:
    """Running sums of an epoch on the device, read only when they are shown: reading waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, clf, sparse, correct
        self.bad = torch.full((2,), -1, dtype=torch.long, device=device)  # first step that was not finite, and what in it
        self.steps = self.images = 0

    def add(self, clf: Tensor, sparse: Tensor, correct: Tensor, images: int) -> None:
        """One optimizer step: mean losses, number of correct predictions, number of images."""
        self.sums += torch.stack([(clf + sparse).double(), clf.double(), sparse.double(), correct.double()]).detach()
        self.steps += 1
        self.images += images

    def watch(self, step: int, loss: Tensor, gradients: list[Tensor], gate: Tensor | None) -> Tensor:
        """Notes the first step at which one of `WATCHED` is not finite; returns whether this one is, on the device."""
        norm = torch.nn.utils.get_total_norm(gradients)
        gate = norm.new_zeros(()) if gate is None else gate.detach().sum()
        finite = torch.stack([value.detach().double() for value in (loss, norm, gate)]).isfinite()
        first = torch.stack([torch.full_like(self.bad[0], step), (~finite).long().argmax()])
        self.bad = torch.where((self.bad < 0) & ~finite.all(), first, self.bad)
        return finite.all()

    def first_bad(self) -> tuple[int, str] | None:
        """Step and name of the first number that was not finite, None if all were; waits for the device."""
        step, what = self.bad.tolist()
        return None if step < 0 else (step, WATCHED[what])

    def state(self) -> dict[str, Any]:
        """The sums, for a checkpoint."""
        return {"sums": self.sums.clone(), "steps": self.steps, "images": self.images}

    def load(self, state: dict[str, Any]) -> None:
        """The sums as they were at `state`."""
        self.sums.copy_(state["sums"])
        self.steps, self.images = state["steps"], state["images"]

    def read(self) -> dict[str, float]:
        """Mean losses and the accuracy in percent since the meter was made."""
        loss, clf, sparse, correct = self.sums.tolist()
        steps = max(self.steps, 1)
        return {"loss": loss / steps, "clf": clf / steps, "sparse": sparse / steps,
                "accuracy": 100 * correct / max(self.images, 1)}


class Position(NamedTuple):
    """How far the current task has come, in all its phases: the next epoch, batch in it and step; the epoch's sums so far."""

    epoch: int
    batch: int
    step: int
    meter: Meter


class GradientLearner(BaseLearner):
    """A frozen backbone with a growing head, trained with cross-entropy over the current task's classes.

    In a run of several processes each computes its part of every batch, and one message per step adds up the gradients:
    DistributedDataParallel would average the gate's loss, which belongs to the step and not to the images.
    """

    class Keys(optimisation.OptimisationKeys, optimisation.LaterTaskKeys, optimisation.HeadKeys, RowFitKeys):
        """Training by gradient steps"""

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        yield from optimisation.contradictions(config)

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        return optimisation.warnings(config)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.head = self.make_head().to(self.device)
        self._process = distributed.part()  # asked for once: a step of a single process has nothing to do with others
        self._optimizer: torch.optim.Optimizer | None = None
        self._position = Position(0, 0, 0, Meter(self.device))
        self._resumed: dict[str, Any] | None = None  # state of the optimizer to go on with
        self._skipped = 0
        self._settled = False  # the task is decided and only its head rows may still have to be fitted
        self._row_fit: RowFit | None = None
        self._fits_alike = getattr(self.config, "row_fit", None) == "alike"  # rows that do not last have no such key
        self._views_seen: list[Tensor] = []  # of a row fit that is to go on

    # ---- what a method adds

    def make_head(self) -> GrowingHead:
        """The classifier: the one that the config names, unless a method brings its own."""
        return HEADS[self.config.head](self.backbone.width, self.config, self.seed)

    def grow_head(self, task: int) -> None:
        """Gives the head the rows of `task`, as they start."""
        self.head.begin(self.data.task_classes(task), self.data.visits(task), generator(self.seed, "head", task))

    def features(self, images: Tensor) -> Tensor:
        """What the settled head predicts from, and keeps its statistics of."""
        return self.embed(images)

    @abstractmethod
    def groups(self) -> list[dict]:
        """Parameter groups of the current task's optimizer."""

    def optimizer(self) -> torch.optim.Optimizer:
        """The current task's optimizer, before its first step."""
        return make_optimizer(self.config, self.groups(), self.task)

    def phases(self, task: int) -> list[Phase]:
        """The parts of `task`'s training, in turn: a single one, unless a method says otherwise."""
        config = self.config
        return [Phase(epochs_of(config, task), config.batch_size, self.optimizer, self.before_step,
                      partial(schedule_factor, config, task))]

    def row_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of a fit of the current task's head rows alone."""
        return make_row_optimizer(self.config, self.head.trainable(), self.task)

    def wants_step(self, step: int) -> bool:
        """Whether the task is trained by optimizer step `step`, if its epochs have one."""
        return not self._settled

    def before_step(self, step: int) -> Tensor | None:
        """Prepares optimizer step `step` of the task; returns a term to add to the loss, if the method has one."""

    def gate_weights(self) -> Tensor | None:
        """The gate weights of the current step, if the method has a gate."""

    def loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What images with `targets` int64 `[b]`, from 0, add to the loss, summed over them, and logits `[b, c]` of the task's
        classes."""
        logits = self.head.current_logits(self.embed(images))
        return F.cross_entropy(logits, targets, reduction="sum"), logits

    def settle(self) -> None:
        """After the last step: makes the network what it stays."""

    def row_fit(self, seen: list[Tensor]) -> RowFit | None:
        """How the new head rows are fitted to the settled network, going on from the views `seen`; None leaves them."""
        return fit_alike(self, seen) if self._fits_alike else None

    def figures(self) -> dict[str, float]:
        """Figures of the method for the progress display and the log."""
        return {}

    def advice(self) -> str:
        """What to change when the loss is no longer finite."""
        return "lower init_lr or lrate"

    # ---- the task

    def make_room(self, task: int) -> None:
        self.task = task
        self._optimizer, self._resumed, self._skipped = None, None, 0
        self._settled, self._row_fit, self._views_seen = False, None, []
        self._position = Position(0, 0, 0, Meter(self.device))
        self.grow_head(task)
        if self._fits_alike:
            self.head.clear()  # an adapter that is trained with rows of 0 moves the features less (docs/LOG.md)

    def train(self) -> None:
        begin = 0
        for phase in self.phases(self.task):
            if self._position.epoch < begin + phase.epochs and self.wants_step(self._position.step):
                self._train_phase(phase, begin)
            begin += phase.epochs

    def _train_phase(self, phase: Phase, begin: int) -> None:
        """What is left of a phase; `begin`: the epoch of the task with which it starts."""
        task, data, size, epochs = self.task, self.data, phase.batch_size, self.epochs()
        optimizer = self._optimizer = phase.optimizer()
        if self._resumed is not None:
            optimizer.load_state_dict(self._resumed)
            self._resumed = None
        for epoch in range(self._position.epoch, begin + phase.epochs):
            scale_learning_rates(optimizer, phase.rate(epoch - begin))
            title = f"Task {task}, Epoch {epoch + 1}/{epochs}"
            _, first, step, meter = self._position
            batches = data.train_batches(task, epoch, size, skip=first, part=self._process)
            for batch, (images, labels) in enumerate(batches, first):
                if not self.wants_step(step):
                    break
                total = data.images_in_batch(task, batch, size)
                extra = phase.step(step)
                clf, sparse, correct = self.backward(images, labels, extra, total)
                if self._process != (0, 1):
                    distributed.add_up_gradients(self._trained(), clf, correct)
                if self.take_step(clf + sparse):
                    meter.add(clf, sparse, correct, total)
                step += 1
                self._position = Position(epoch, batch + 1, step, meter)
                self._show(title)
                self.session.after_step()
            self._end_epoch(epoch, title)
            if not self.wants_step(step):
                break
        distributed.copy_from_main(self._trained())  # processors of different kinds may differ in the last bit

    def take_step(self, loss: Tensor) -> bool:
        """Moves what is trained by the gradients that are there and clears them; False where `nan_policy` leaves that out.
        `loss`: what they are of."""
        config, (_, _, step, meter) = self.config, self._position
        finite = meter.watch(step, loss, self._gradients(), self.gate_weights())
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self._trained(), config.max_grad_norm)
        taken = config.nan_policy != "skip" or bool(finite)
        if taken:
            self._optimizer.step()
        else:
            self._skip(meter)
        self._optimizer.zero_grad()
        return taken

    def backward(self, images: Tensor, labels: Tensor, extra: Tensor | None, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of one optimizer step, in `grad_accum` parts; mean cross-entropy, extra term, correct predictions.

        total: images of the whole batch, of which these are only this process's part. Gradients, cross-entropy and correct
        predictions are what these images add; the extra term's gradient is added by the main process alone.
        """
        targets = labels - self.data.task_classes(self.task).start
        parts = max(1, min(self.config.grad_accum, len(labels)))
        clf, correct = torch.zeros((), device=self.device), torch.zeros((), dtype=torch.long, device=self.device)
        extra = torch.zeros((), device=self.device) if extra is None else extra
        pieces = list(zip(images.chunk(parts), targets.chunk(parts), strict=True)) if len(labels) else []
        for index, (x, y) in enumerate(pieces):
            last = index + 1 == len(pieces)
            share, hits = self._part(x, y, extra if last and self._process[0] == 0 else None, total, last)
            clf += share
            correct += hits
        return clf, extra.detach(), correct

    def _part(self, x: Tensor, y: Tensor, extra: Tensor | None, total: int, last: bool) -> tuple[Tensor, Tensor]:
        """One part of a batch, forward and backward; a function of its own, so that nothing of it outlives it.

        The parts share the gate's graph, so only the last may free its graph as it goes; the others' go with their logits.
        """
        loss, logits = self.loss(x, y)
        share = loss / total
        (share if extra is None else share + extra).backward(retain_graph=not last)
        return share.detach(), (logits.detach().argmax(1) == y).sum()

    def end_task(self) -> TaskReport:
        if not self._settled:
            self.settle()
            self._settled, self._optimizer = True, None
        self._row_fit = self.row_fit(self._views_seen)
        if self._row_fit is not None:
            self._row_fit.run(whole=True)
        self._row_fit = None
        self.head.commit()
        self.start_evaluation()  # statistics are taken of the network as it is evaluated
        sums = self.head.collect(self._task_features(), len(self.data.task_classes(self.task)))
        distributed.add_up(*sums)
        self.head.absorb(sums, self.task, self.work)
        return TaskReport()

    def represent(self, images: Tensor) -> Tensor:
        return self.features(images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def _task_features(self) -> Features:
        """One pass over the task's training images under the test transform, with `features` in place of the images."""
        for images, labels, places in self.task_images("class statistics of the head"):
            yield self.features(images), labels, places

    def task_images(self, title: str, split: str = "train") -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's part of the current task's images under the test transform, with labels from 0 and places int64 `[b]`
        in the pass of all processes, batch by batch; a signal stops it between two. `title`: what is done with them."""
        data, cells, size, part = self.data, self.data.task_cells(self.task), self.config.batch_size, distributed.part()
        own, first = distributed.parts_of_batches(data.eval_size(split, cells), size, part), data.task_classes(self.task).start
        for number, (images, labels) in enumerate(data.eval_batches(split, cells, size, part)):
            self.work(title, number, len(own))
            if len(labels):
                yield images, labels - first, torch.arange(own[number].start, own[number].stop, device=self.device)

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        """`Session.work`, for the current task."""
        self.session.work(f"Task {self.task}: {title}", done, total, whole)

    # ---- state

    def epochs(self) -> int:
        """Epochs of the current task, in all its phases."""
        return sum(phase.epochs for phase in self.phases(self.task))

    def steps_in(self, task: int) -> int:
        return sum(phase.epochs * self.data.steps_per_epoch(task, phase.batch_size) for phase in self.phases(task))

    def steps_done(self) -> int:
        return self._position.step

    def modules(self) -> list[nn.Module]:
        return [self.head]

    def state(self) -> dict[str, Any]:
        self._stop_if_not_finite()  # a checkpoint of numbers that are not would make the loss permanent
        epoch, batch, step, meter = self._position
        return {"task": self.task, "head": self.head.snapshot(), "epoch": epoch, "batch": batch, "step": step,
                "optimizer": None if self._optimizer is None else self._optimizer.state_dict(), "meter": meter.state(),
                "skipped": self._skipped, "settled": self._settled,
                "views_seen": self._views_seen if self._row_fit is None else self._row_fit.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.task, self._skipped, self._settled = state["task"], state["skipped"], state["settled"]
        self._views_seen = state["views_seen"]
        self.head.restore(state["head"])
        self._resumed = state["optimizer"]
        meter = Meter(self.device)
        meter.load(state["meter"])
        self._position = Position(state["epoch"], state["batch"], state["step"], meter)

    def _trained(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._trained() if p.grad is not None]

    # ---- log and checks

    def _show(self, title: str) -> None:
        if self.session.progress.step(title, self._shown_figures) or self.device.type == "cpu":
            self._stop_if_not_finite()

    def _end_epoch(self, epoch: int, title: str) -> None:
        self._stop_if_not_finite()
        every, epochs, means = self.config.eval_every, self.epochs(), self._position.meter.read()
        wanted = every and ((epoch + 1) % every == 0 or epoch + 1 == epochs)
        test = {"test/accuracy": self.session.evaluate()} if wanted else {}
        parts = [f"Loss {means['loss']:.3f}{self.loss_parts(means)}", *self._line_figures(),
                 f"Train_accy {means['accuracy']:.2f}", *(f"Test_accy {accuracy:.2f}" for accuracy in test.values())]
        LOGGER.info(f"{title} => {', '.join(parts)}")
        self.session.track({**self.tracked(means), **test})
        self._position = Position(epoch + 1, 0, self._position.step, Meter(self.device))

    def _shown_figures(self) -> dict[str, float]:
        means = self._position.meter.read()
        return {"loss": means["loss"], **self.figures(), "accuracy": means["accuracy"]}

    def tracked(self, means: dict[str, float]) -> dict[str, float]:
        """What trackers get at the end of an epoch."""
        rates = {f"lr/{name}": rate for name, rate in optimisation.learning_rates(self._optimizer).items()}
        return {**{f"train/{name}": value for name, value in {**means, **self.figures()}.items()}, **rates}

    def loss_parts(self, means: dict[str, float]) -> str:
        """What the loss of an epoch's log line is made of."""
        return ""

    def _line_figures(self) -> list[str]:
        return [f"{name}={value:.3f}" for name, value in self.figures().items()]

    def _skip(self, meter: Meter) -> None:
        """Leaves out an update that is not finite, as long as the task has had no more than `nan_limit` of them."""
        self._skipped += 1
        if self._skipped > self.config.nan_limit:
            self._stop_if_not_finite()
        step, what = meter.first_bad()
        LOGGER.warning(f"Task {self.task}, step {step}: the {what} is not finite; the step is skipped "
                       f"({self._skipped} of at most {self.config.nan_limit}).")
        meter.bad.fill_(-1)

    def _stop_if_not_finite(self) -> None:
        bad = self._position.meter.first_bad()
        if bad is None:
            return
        step, what = bad
        epoch = self._position.epoch + 1
        figures = "".join(f", {name} {value:.3f}" for name, value in self.figures().items())
        rates = ", ".join(f"{rate:.3g}" for rate in sorted({g["lr"] for g in self._optimizer.param_groups}, reverse=True))
        raise UserError(f"The {what} is no longer finite at task {self.task}, epoch {epoch}, step {step}{figures}, learning "
                        f"rates {rates}; the likely cause is a learning rate that is too high: {self.advice()}, then run "
                        "again with --overwrite (what is finished stays readable).")
