"""What a gate does in the course of a task: a recipe says its own begin, step, decide and settle."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from backbone.gates import Gate
from models.artifacts import SavedNetwork, SavedRun
from models.growth import Decision
from models.optimisation import learning_rate
from utils.config import Component, KeyGroup, key
from utils.config.rules import Name

if TYPE_CHECKING:
    from models.sdlora import SDLoRA


class GrowthKeys(KeyGroup):
    """Growth"""

    growth_rule: Name = key("threshold", "Which adapters stay after a task.")


class AlphaKeys(KeyGroup):
    """Trained magnitudes"""

    alpha_lr: float | None = key(
        None, "Learning rate of the magnitudes; 0 freezes them.", unset="the task's learning rate", ge=0)


class Recipe(Component):
    """The part of a gate in the life of a task (METHOD.md, section 3), for the learner that it serves.

    The learner has added the task's adapter to the bank before `begin`, and calls, in this order: begin, step before every
    optimizer step, decide, settle. offers: what growth rules may need (models/growth.py). alpha_scope, train_alpha:
    those of the bank.
    """

    offers: frozenset[str] = frozenset()
    train_alpha = True

    def __init__(self, learner: "SDLoRA") -> None:
        self.learner, self.config = learner, learner.config
        self.gate = self.make_gate()

    @property
    def tau(self) -> float:
        """The temperature at which the gate decides; 1 for a gate that has none."""
        return 1.0

    def make_gate(self) -> Gate:
        """The gate of the bank."""
        raise AssertionError("every recipe has a gate of its own")

    @property
    def alpha_scope(self) -> str:
        """Of the bank: one magnitude per block and projection ("layer") or per adapter ("task")."""
        return "layer"

    def announce(self) -> None:
        """Logs what is particular to the gate, once at the start of a run."""

    def newcomer_logit(self) -> float:
        """The logit with which the task's adapter joins the gate; the bank is still without it."""
        return 0.0

    def begin(self) -> None:
        """Before the first step: how the newcomer enters."""

    def groups(self) -> list[dict]:
        """Parameter groups besides the newcomer's factors and the head rows."""
        return []

    def group(self, name: str, parameter: nn.Parameter, rate: float | None) -> dict:
        """A named parameter group with its learning rate, the task's where that is None, and no weight decay."""
        base = learning_rate(self.config, self.learner.task)
        return {"name": name, "params": [parameter], "lr": base if rate is None else rate, "weight_decay": 0.0}

    def step(self, step: int) -> Tensor | None:
        """Merges the network of optimizer step `step`; returns the term that the gate adds to the loss."""
        self.learner.bank.train_step()
        return None

    def weights(self) -> Tensor | None:
        """The gate weights of the current step, to watch over, if they are trained."""
        return None

    def decide(self) -> Decision:
        """The growth decision over the task, whose adapter may have been trained or not."""
        return self.learner.conditional_growth_decision(self.gate().detach())

    def settle(self, decision: Decision) -> None:
        """Takes the dropped adapters out of the bank, and stores the newcomer if it stays."""
        self.prune(decision.keep)
        if self.learner.bank.current is not None:
            self.learner.bank.commit()

    def prune(self, keep: list[int]) -> None:
        """Takes all adapters but those of the tasks `keep` out of the bank."""
        self.learner.bank.keep_only(keep)

    def wants_step(self, step: int) -> bool:
        """Whether the task is trained by optimizer step `step`."""
        return True

    # ---- the network in force

    def in_force(self) -> Tensor:
        """The gate weights `[n]` of the current task's network."""
        return self.gate()

    def merge(self) -> None:
        """Merges the current task's network."""
        self.learner.bank.merge()

    def represent(self, images: Tensor) -> Tensor:
        """Features `[b, d]` that `predict` reads."""
        return self.learner.embed(images)

    def predict(self, images: Tensor) -> Tensor:
        """Logits `[b, classes seen]`."""
        return self.learner.head(self.represent(images))

    # ---- log

    def figures(self) -> dict[str, float]:
        """Figures for the progress display and the log."""
        return {}

    def advice(self) -> str:
        """What else to change when the loss is no longer finite."""
        return ""

    def loss_parts(self, means: dict[str, float]) -> str:
        """What the loss of an epoch's log line is made of."""
        return ""

    # ---- what is stored

    def numbers(self) -> dict[str, float]:
        """What the decision rests on besides what the growth rule compares, by name, for the record of the run."""
        return {}

    def save(self, folder: Path) -> list[Path]:
        """Writes what the gate has to keep besides the gate file of the task; returns the paths."""
        return []

    def record(self) -> dict[str, Any]:
        """What else goes into the gate file of the task."""
        return {}

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        """The network of a finished run; see `BaseLearner.rebuild`."""
        backbone = saved.backbone()
        bank, beta = saved.adapters(backbone)
        return SavedNetwork(backbone, bank, saved.head(backbone.width), beta)

    def stored_tensors(self) -> list[Tensor]:
        """Tensors kept for the stream, bank and head excluded."""
        return []

    def state(self) -> dict[str, Any]:
        """What is to be known of the gate besides the bank, as tensors and plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The recipe as it was at `state`."""
