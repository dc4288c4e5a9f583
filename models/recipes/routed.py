"""The routed gate (METHOD.md, section 9): every kept adapter founds a key, each key keeps the gate weights that were
learned for it, and an image meets the network of the key that it resembles most.

Shapes: b images, n active adapters, c classes of a task, p statistics of a class, q of an image.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.keys import Key, Keys, key_size, shift_numbers, token_statistics
from backbone.lora import AdapterBank
from backbone.routing import Moments, Router
from models.artifacts import SavedNetwork, SavedRun
from models.growth import Decision
from models.recipes.base import GrowthKeys
from models.recipes.evidence import PriceKeys
from models.recipes.routed_graph import RoutedGraph
from models.recipes.trained import GumbelKeys, GumbelSparsemax, TrainedKeys
from utils.config import Config, key
from utils.errors import UserError
from utils.gumbel_utils import sparsity_loss
from utils.runs import distributed
from utils.runs.files import write_safetensors
from utils.runs.progress import LOGGER


class RoutedKeys(TrainedKeys, GumbelKeys, PriceKeys, GrowthKeys):
    """Routed inference"""

    gate_prior: Literal["shift", "none"] = key(
        "shift",
        'Where the logits start in a task: `"shift"`, at minus the logarithm of how far its images have moved from each key, '
        'the newcomer at minus the logarithm of `gate_price`; `"none"`, all at 0.')
    gate_phase: float = key(
        0.5, "Share of a task's optimizer steps after which growth is decided; a refused adapter is trained no further.",
        gt=0, le=1)
    route_classes: bool = key(False, "Let only the classes of the tasks of an image's key compete.")
    growth_threshold: float = key(
        0.5, "Gate weight that a newcomer has to exceed: at 0.5 it must outweigh all old adapters together.", ge=0, le=1)
    alpha_scope: Literal["layer"] = key("layer", "The norm of every block and projection moves into its magnitude.")
    init_alpha: float = key(1.0, "Magnitude that a new adapter is trained with.", gt=0)
    row_fit: Literal["alike"] = key("alike", "Head rows are fitted alike in every task, under the network of its key.")


class Routed(GumbelSparsemax):
    """Each image meets the network of the key that it resembles most; a key is founded by every kept adapter."""

    Keys = RoutedKeys
    offers = frozenset()
    train_alpha = False

    def __init__(self, *args) -> None:
        super().__init__(*args)
        learner = self.learner
        self.keys = Keys()
        self.router = Router(learner.backbone.width, learner.seed).to(learner.device)
        self.route: list[int] = []  # the key of every task
        self.betas: dict[int, dict[int, float]] = {}  # gate weights by adapter, for every key
        self._decision: Decision | None = None
        self._shifts: dict[int, float] = {}  # of the task's images, by key

    @property
    def alpha_scope(self) -> str:
        return "layer"

    @classmethod
    def contradictions(cls, config: Config) -> list[str]:
        if config.route_classes and config.scenario == "domain":
            return ["'route_classes' is true but 'scenario' is \"domain\", in which every key has all classes; leave it out"]
        return super().contradictions(config)

    # ---- a task

    def newcomer_logit(self) -> float:
        return 0.0

    def begin(self) -> None:
        """The images are held against the keys, and the logits start accordingly; a key of the task's own stands until the
        decision."""
        learner, config, bank = self.learner, self.config, self.learner.bank
        means, moments = self._statistics()
        new = Key.of(means)
        # On the main process alone: processors of different kinds may differ in the last bit.
        shifts = self._shifts = distributed.on_main(self.keys.shifts, new)
        if config.gate_prior == "shift":
            ratios = torch.tensor([*(shifts[task] for task in bank.tasks[:-1]), config.gate_price])
            self.gate.replace(-ratios.clamp_min(torch.finfo(ratios.dtype).tiny).log().to(self.gate.logits))
        else:
            self.gate.replace(torch.zeros_like(self.gate.logits))
        self.gate.set_temperature(config.gumbel_tau_init)
        self.router.found(learner.task, moments)
        self.route.append(learner.task)
        self._new, self._decision = new, None

    def _statistics(self) -> tuple[Tensor, Moments]:
        """Mean statistics `[c, p]` of the current task's classes as the frozen network sees its training images, and the
        moments of what routes them."""
        learner, router = self.learner, self.router
        classes, size = len(learner.data.task_classes(learner.task)), router.means.shape[1]
        options = {"dtype": torch.float64, "device": learner.device}
        sums, counts = torch.zeros(classes, key_size(learner.bank.width), **options), torch.zeros(classes, **options)
        total, products = torch.zeros(size, **options), torch.zeros(size, size, **options)
        with learner.bank.silenced():
            for images, labels, _ in learner.task_images("how far its images have moved"):
                tokens = learner.backbone.early_tokens(images)
                members = F.one_hot(labels, classes).to(sums)  # [b, c]: a product sums in a fixed order
                sums += members.T @ token_statistics(tokens)
                counts += members.sum(0)
                looks = router.statistics(tokens)
                total += looks.sum(0)
                products += looks.T @ looks
        distributed.add_up(sums, counts, total, products)
        return sums / counts[:, None], Moments.of(learner.data.train_size(learner.task), total, products)

    def groups(self) -> list[dict]:
        return [self.group("gate", self.gate.logits, self.config.gate_lr)]  # magnitudes are fixed

    def annealed_steps(self) -> int:
        return math.ceil(self.config.gate_phase * self.task_steps())

    def wants_step(self, step: int) -> bool:
        """Decides when the gate's phase is over."""
        if self._decision is None and step >= self.annealed_steps():
            self._decide()
        return super().wants_step(step)

    def step(self, step: int) -> Tensor | None:
        if self._decision is None:
            return super().step(step)
        self._beta = self.learner.bank.train_step()
        return self.config.lambda_sparsity * sparsity_loss(self._beta)

    def decide(self) -> Decision:
        if self._decision is None:
            self._decide()
        return self._decision

    @torch.no_grad()
    def _decide(self) -> None:
        """At `tau_final` without noise; a refused newcomer leaves at once, and its images join the nearest key."""
        learner, task = self.learner, self.learner.task
        self._decision = super().decide()
        learner.drop(self._decision)
        kept = task in self._decision.keep
        nearest = None if kept else min(self._shifts, key=self._shifts.get)
        self.keys.learn(task, self._new, nearest)
        if not kept:
            LOGGER.info(f"Task {task}: its adapter is refused at step {learner.steps_done()} and trained no further; its "
                        f"images join the key of task {nearest}")
            learner.bank.keep_only(self._decision.keep)
            self.router.join(task, nearest)
            self.route[task] = nearest

    def settle(self, decision: Decision) -> None:
        """A kept adapter founds its key with the gate weights at the end of the task."""
        bank = self.learner.bank
        if bank.current is not None:
            self.betas[self.learner.task] = dict(zip(bank.tasks, self.gate().tolist(), strict=True))
            bank.commit()

    # ---- the networks

    def in_force(self) -> Tensor:
        """The gate weights `[n]` of the newest task's key."""
        bank, newest = self.learner.bank, self.route[-1]
        return weights_of(bank, self.betas[newest]) if newest in self.betas else self.gate()

    def merge(self) -> None:
        self._use(self.route[-1])

    def _use(self, key: int) -> None:
        bank = self.learner.bank
        if key in self.betas:
            merge_for(bank, self.betas[key])
        else:  # the key of the task that is being learned
            bank.merge()

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the images and their features, each under its key."""
        learner = self.learner
        return routed_features(images, learner.backbone, learner.bank, self.router, self._use, learner.embed)

    def represent(self, images: Tensor) -> Tensor:
        return self._look(images)[1]

    def predict(self, images: Tensor) -> Tensor:
        keys, features = self._look(images)
        logits = self.learner.head(features)
        if not self.config.route_classes:
            return logits
        classes = [self.learner.data.task_classes(task) for task in range(len(self.route))]
        return among_classes(logits, keys, self.router.tasks, self.route, classes)

    # ---- what is stored

    def numbers(self) -> dict[str, float]:
        price = {"price": self.config.gate_price} if self.config.gate_prior == "shift" else {}
        return {**price, **shift_numbers(self._shifts)}

    def save(self, folder: Path) -> list[Path]:
        path = folder / f"keys_task_{self.learner.task}.safetensors"
        write_safetensors(path, self.router.to_file(), {"task": str(self.learner.task)})
        return [path]

    def record(self) -> dict[str, Any]:
        count = len(self.route)
        betas = torch.zeros(count, count)
        for task, weights in self.betas.items():
            betas[task, list(weights)] = torch.tensor(list(weights.values()))
        return {"route": torch.tensor(self.route), "route_betas": betas}

    def stored_tensors(self) -> list[Tensor]:
        return [*self.keys.tensors(), *self.router.tensors()]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "keys": self.keys.state(), "router": self.router.state(), "route": list(self.route),
                "betas": {task: dict(weights) for task, weights in self.betas.items()}, "shifts": dict(self._shifts),
                "new": (self._new.classes, self._new.mean, self._new.scatter),
                "decision": None if self._decision is None else vars(self._decision)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        device = self.learner.device
        self.keys.load(state["keys"], device)
        self.router.load(state["router"], device)
        self.route, self.betas, self._shifts = state["route"], state["betas"], state["shifts"]
        classes, mean, scatter = state["new"]
        self._new = Key(classes, mean.to(device), scatter.to(device))
        self._decision = None if state["decision"] is None else Decision(**state["decision"])

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        """The network that routes."""
        return RoutedNetwork(saved)


class RoutedNetwork(SavedNetwork):
    """The networks of all keys of a finished run: images to logits, each image by its key's.

    keys: of the images of the last call, int64 `[b]`, the task that founded each one's key.
    """

    def __init__(self, saved: SavedRun) -> None:
        backbone, record = saved.backbone(), saved.gates()
        bank, beta = saved.adapters(backbone)
        super().__init__(backbone, bank, saved.head(backbone.width), beta)
        self.router = Router(backbone.width, saved.seed)
        self.router.from_file(saved.tensors(f"keys_task_{saved.task}.safetensors"))
        self.route = record["route"].tolist()
        self.betas = {key: {task: record["route_betas"][key, task].item() for task in self.bank.tasks if task <= key}
                      for key in self.router.tasks}
        self.classes = [range(entry["seen_classes"] - entry["classes"], entry["seen_classes"])
                        for entry in saved.result["tasks"][:saved.task + 1]]
        self.route_classes = saved.config.route_classes
        self.keys = torch.zeros(0, dtype=torch.long)

    @contextmanager
    def without(self, adapter: int) -> Iterator[None]:
        """The networks of all keys with the gate weight of an adapter, by task, at 0."""
        whole = self.betas
        self.betas = {key: {**weights, adapter: 0.0} for key, weights in whole.items()}
        try:
            yield
        finally:
            self.betas = whole

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        router = self.router
        keys, features = routed_features(images, self.backbone, self.bank, router,
                                         lambda key: merge_for(self.bank, self.betas[key]), self.backbone)
        self.keys = torch.tensor(router.tasks, device=keys.device)[keys]
        logits = self.head(features)
        return among_classes(logits, keys, router.tasks, self.route, self.classes) if self.route_classes else logits

    def as_timm(self) -> nn.Module:
        merge_for(self.bank, self.gate_weights())
        return super().as_timm()

    def gate_weights(self) -> dict[int, float]:
        if len(self.router.tasks) > 1:
            raise UserError(f"inference: this run routes every image to one of {len(self.router.tasks)} networks, which no "
                            "single ViT is; export it as torchscript or onnx.")
        return self.betas[self.router.tasks[0]]

    def as_graph(self) -> nn.Module:
        return RoutedGraph(self.backbone, self.bank, self.head, self.router,
                           [weights_of(self.bank, self.betas[key]) for key in self.router.tasks],
                           self._classes_of_keys() if self.route_classes else None)

    def _classes_of_keys(self) -> Tensor:
        """bool `[K, classes]`: which classes compete for the images of each key."""
        keys = torch.arange(len(self.router.tasks))
        none = torch.zeros(len(keys), self.classes[-1].stop)
        return among_classes(none, keys, self.router.tasks, self.route, self.classes) == 0

    def met(self) -> list[str]:
        words = {key: ", ".join(f"{task} ({weight:.2f})" for task, weight in weights.items() if weight > 0)
                 for key, weights in self.betas.items()}
        return [f"key {key}, adapters {words[key]}" for key in self.keys.tolist()]


def weights_of(bank: AdapterBank, weights: dict[int, float]) -> Tensor:
    """Gate weights by task as `[n]`, 0 for adapters that came later."""
    return torch.tensor([weights.get(task, 0.0) for task in bank.tasks]).to(bank.A)


def merge_for(bank: AdapterBank, weights: dict[int, float]) -> None:
    """Merges the network with these gate weights, the same to the bit whatever has been learned since."""
    bank.merge(weights_of(bank, weights), among=[task for task, weight in weights.items() if weight != 0])


def routed_features(images: Tensor, backbone: FrozenViT, bank: AdapterBank, router: Router, use: Callable[[int], None],
                    embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The number of every image's key in `router.tasks`, int64 `[b]`, and its features `[b, d]` in that key's network.

    `use` merges the network of a key, `embed` gives features in what is merged. The frozen early blocks run once more, and the
    processor waits for the device once, to know which keys there are.
    """
    with bank.silenced():
        keys = router(backbone.early_tokens(images))
    features, found = None, keys.cpu()  # the one wait
    for number in found.unique().tolist():
        use(router.tasks[number])
        members = (found == number).nonzero().squeeze(1).to(keys.device)
        part = embed(images[members])
        features = part.new_zeros(len(images), part.shape[1]) if features is None else features
        features[members] = part
    return keys, features


def among_classes(logits: Tensor, keys: Tensor, tasks: list[int], route: list[int], classes: list[range]) -> Tensor:
    """Logits `[b, classes]` with minus infinity for the classes of tasks that do not belong to an image's key; `classes`:
    those of each task."""
    key_of_class = torch.tensor([key for key, each in zip(route, classes) for _ in each]).to(keys.device)
    mine = torch.tensor(tasks, device=keys.device)[keys][:, None] == key_of_class[None, :logits.shape[1]]
    return logits.masked_fill(~mine, float("-inf"))
