"""SD-LoRA (Wu et al., ICLR 2025) as its official code computes it (METHOD.md, section 4)."""

from typing import Literal

from backbone.gates import OpenGate
from models.growth import FREE_MAGNITUDES, TRAINED_NEWCOMER, Decision
from models.recipes.base import AlphaKeys, GrowthKeys, Recipe
from models.rows import RefitKeys
from utils.config import KeyGroup, key
from utils.config.rules import Name


class OpenKeys(KeyGroup):
    """SD-LoRA's magnitudes"""

    alpha_scope: Literal["task"] = key("task", "SD-LoRA has one magnitude per adapter.")
    init_alpha: float = key(0.8, "Magnitude that every adapter starts with in every task.", gt=0)


class Open(Recipe):
    """SD-LoRA: every adapter active, all magnitudes set back and trained again in every task."""

    class Keys(OpenKeys, AlphaKeys, GrowthKeys, RefitKeys):
        """SD-LoRA"""

        growth_rule: Name = key("none", "Which adapters stay after a task; SD-LoRA keeps all.")

    offers = frozenset({TRAINED_NEWCOMER, FREE_MAGNITUDES})

    def make_gate(self) -> OpenGate:
        return OpenGate()

    @property
    def alpha_scope(self) -> str:
        return self.config.alpha_scope

    def begin(self) -> None:
        self.learner.bank.reset_magnitudes(self.config.init_alpha)

    def groups(self) -> list[dict]:
        return [self.group("magnitudes", self.learner.bank.alpha, self.config.alpha_lr)]

    def settle(self, decision: Decision) -> None:
        """The newcomer's norm stays a fixed factor of it: SD-LoRA evaluates the current adapter as it was trained."""
        self.prune(decision.keep)
        if self.learner.bank.current is not None:
            self.learner.bank.commit(keep_norm=True)
