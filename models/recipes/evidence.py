"""Growth decided before a task is trained, from what its images look like to the frozen network (backbone/keys.py)."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.gates import EqualGate
from backbone.keys import Key, Keys, key_size, shift_numbers, token_statistics
from models.growth import Decision
from models.recipes.base import GrowthKeys, Recipe
from models.recipes.trained import TemperatureKeys
from utils.config import KeyGroup, key
from utils.gumbel_utils import gumbel_sparsemax
from utils.runs import distributed
from utils.runs.progress import LOGGER


class PriceKeys(KeyGroup):
    """Price of an adapter"""

    gate_price: float = key(
        3.0, "How far images must have moved (an F ratio, about 1 for none) for a new adapter to weigh as much as the nearest "
             "old one.", gt=0)


class EvidenceKeys(TemperatureKeys, PriceKeys, GrowthKeys):
    """Gate evidence"""

    alpha_scope: Literal["layer"] = key("layer", "The norm of every block and projection moves into its magnitude.")
    init_alpha: float = key(1.0, "Magnitude that a new adapter is trained with.", gt=0)
    row_fit: Literal["alike"] = key("alike", "Head rows are fitted alike in every task, with an adapter or without.")


class Evidence(Recipe):
    """Not trained: decides before a task is trained, from what its images look like; kept magnitudes stay fixed.

    The logit of an old adapter is minus the logarithm of how far the new images have moved from those that it was learned on,
    an F ratio; the newcomer's is minus the logarithm of `gate_price`. The decision reads the sparsemax of these logits at
    `gumbel_tau_final`. An adapter that has been kept enters with its full magnitude from then on.
    """

    Keys = EvidenceKeys
    train_alpha = False

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.keys = Keys()
        self._shifts: dict[int, float] = {}  # of the task's images, by key
        self._decision: Decision | None = None

    def make_gate(self) -> EqualGate:
        return EqualGate()

    @property
    def tau(self) -> float:
        return self.config.gumbel_tau_final

    def announce(self) -> None:
        LOGGER.info(f"[Gumbel CL-LoRA] gate={self.config.gate}, tau_final={self.config.gumbel_tau_final}, "
                    f"price={self.config.gate_price}")

    def begin(self) -> None:
        """Decides: a task that needs no adapter of its own has its head rows fitted and is not trained."""
        learner, bank = self.learner, self.learner.bank
        new = Key.of(self._class_statistics())
        # On the main process alone: processors of different kinds may differ in the last bit.
        shifts = self._shifts = distributed.on_main(self.keys.shifts, new)
        ratios = torch.tensor([*(shifts[task] for task in bank.tasks[:-1]), self.config.gate_price])
        self.gate.replace(-ratios.clamp_min(torch.finfo(ratios.dtype).tiny).log().to(self.gate.logits))
        beta = gumbel_sparsemax(self.gate.logits, self.config.gumbel_tau_final, training=False).detach()
        self._decision = learner.conditional_growth_decision(beta)
        learner.drop(self._decision)
        self.prune(self._decision.keep)
        self.keys.learn(learner.task, new, None if bank.current == learner.task else min(shifts, key=shifts.get))

    def _class_statistics(self) -> Tensor:
        """Mean statistics `[c, p]` of the current task's classes as the frozen network sees its training images."""
        learner = self.learner
        classes = len(learner.data.task_classes(learner.task))
        sums = torch.zeros(classes, key_size(learner.bank.width), dtype=torch.float64, device=learner.device)
        counts = torch.zeros(classes, dtype=torch.float64, device=learner.device)
        with learner.bank.silenced():
            for images, labels, _ in learner.task_images("how far its images have moved"):
                members = F.one_hot(labels, classes).to(sums)  # [b, c]: a product sums in a fixed order
                sums += members.T @ token_statistics(learner.backbone.early_tokens(images))
                counts += members.sum(0)
        distributed.add_up(sums, counts)
        return sums / counts[:, None]

    def wants_step(self, step: int) -> bool:
        return self.learner.bank.current is not None  # head rows alone are fitted at the end of the task

    def decide(self) -> Decision:
        return self._decision

    def numbers(self) -> dict[str, float]:
        return {"price": self.config.gate_price, **shift_numbers(self._shifts)}

    def stored_tensors(self) -> list[Tensor]:
        return self.keys.tensors()

    def state(self) -> dict[str, Any]:
        return {"keys": self.keys.state(), "shifts": dict(self._shifts),
                "decision": None if self._decision is None else vars(self._decision)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.keys.load(state["keys"], self.learner.device)
        self._shifts = state["shifts"]
        self._decision = None if state["decision"] is None else Decision(**state["decision"])
