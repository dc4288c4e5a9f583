"""The trained gates of METHOD.md, sections 2 and 3: logits and magnitudes learn with the adapter, the temperature falls, and
growth is decided by what the gate has come to."""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from backbone.gates import GumbelGate, GumbelSoftmaxGate
from models.growth import RANKED, TRAINED_NEWCOMER, Decision
from models.optimisation import epochs_of
from models.recipes.base import AlphaKeys, GrowthKeys, Recipe
from models.rows import RefitKeys
from utils.config import Component, Config, KeyGroup, key
from utils.config.rules import Name, above
from utils.gumbel_utils import TemperatureScheduler, sample_gumbel, sparsity_loss
from utils.rng import generator
from utils.runs.progress import LOGGER


class TemperatureKeys(KeyGroup):
    """Final temperature"""

    gumbel_tau_final: float = key(
        0.5, "Temperature that growth is decided at, and that a trained gate anneals to, at most `gumbel_tau_init`; low is "
             "sparse.", gt=0)


class TrainedKeys(TemperatureKeys):
    """Trained logits"""

    gate_lr: float | None = key(
        None, "Learning rate of the gate's logits; 0 freezes them.", unset="the task's learning rate", ge=0)
    gumbel_tau_init: float = key(5.0, "Temperature in the first step of a task; high is close to uniform.", gt=0)
    gumbel_anneal_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = key(
        "auto",
        'Factor per optimizer step on the distance to `gumbel_tau_final`; `"auto"` takes the one that is '
        "within 1 % of it in the last step.", allowed='a number above 0 and at most 1, or "auto"')
    lambda_sparsity: float = key(
        0.01, "Weight of the sparsity loss (the entropy of the gate). Lower it when too many adapters are pruned.",
        idle=0, ge=0)


class OneNetworkKeys(KeyGroup):
    """One gate for all images"""

    alpha_scope: Literal["layer", "task"] = key(
        "layer", 'One magnitude per block and projection (`"layer"`) or one per adapter (`"task"`, as SD-LoRA has it).')
    init_alpha: float = key(1.0, "Magnitude that a new adapter starts with.", gt=0)
    gate_compensation: bool = key(
        True, "Rescale the old magnitudes when a task begins, so that the newcomer's share of the gate moves no output.")


class NoiseKeys(KeyGroup):
    """Gumbel noise"""

    gate_noise: float = key(1.0, "Factor on the Gumbel noise in training; 0 trains without noise.", ge=0)


class TrainedGate(Recipe):
    """A gate whose logits are trained without noise."""

    class Keys(TrainedKeys, OneNetworkKeys, AlphaKeys, GrowthKeys, RefitKeys):
        """A trained gate"""

    offers = frozenset({RANKED, TRAINED_NEWCOMER})
    gate: GumbelGate

    @classmethod
    def contradictions(cls, config: Config) -> list[str]:
        if config.gumbel_tau_final > config.gumbel_tau_init:
            return [above(config, "gumbel_tau_final", "gumbel_tau_init", "the temperature can only fall")]
        return []

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._beta: Tensor | None = None
        self._schedule: tuple[int, TemperatureScheduler] | None = None

    def make_gate(self) -> GumbelGate:
        return GumbelGate()

    @property
    def tau(self) -> float:
        return self.config.gumbel_tau_final

    @property
    def alpha_scope(self) -> str:
        return self.config.alpha_scope

    def announce(self) -> None:
        config = self.config
        LOGGER.info(f"[Gumbel CL-LoRA] tau_init={config.gumbel_tau_init}, tau_final={config.gumbel_tau_final}, "
                    f"anneal_rate={config.gumbel_anneal_rate}, lambda_sparsity={config.lambda_sparsity}")

    def newcomer_logit(self) -> float:
        return self.gate.smallest_in_support(self.config.gumbel_tau_final) if self.learner.task > 0 else 0.0

    def begin(self) -> None:
        """With `gate_compensation` old magnitudes answer the newcomer, so that no output changes."""
        config, bank = self.config, self.learner.bank
        self.gate.set_temperature(config.gumbel_tau_init)
        if config.gate_compensation and self.learner.task > 0:
            after = self.gate()
            before = self.gate(logits=self.gate.logits[:-1], tau=config.gumbel_tau_final)
            bank.rescale(torch.cat([before, after[-1:]]), after)

    def groups(self) -> list[dict]:
        return [self.group("magnitudes", self.learner.bank.alpha, self.config.alpha_lr),
                self.group("gate", self.gate.logits, self.config.gate_lr)]

    def step(self, step: int) -> Tensor | None:
        """One temperature, one draw of noise and one merge, shared by all blocks and projections."""
        self.gate.set_temperature(self.schedule().at(step))
        self._beta = self.learner.bank.train_step(self.noise(step))
        return self.config.lambda_sparsity * sparsity_loss(self._beta)

    def schedule(self) -> TemperatureScheduler:
        """The temperatures of the current task; one that will not arrive is said at its first step."""
        learner, config = self.learner, self.config
        if self._schedule is None or self._schedule[0] != learner.task:
            made = TemperatureScheduler(config.gumbel_tau_init, config.gumbel_tau_final, config.gumbel_anneal_rate,
                                        self.annealed_steps())
            self._schedule = learner.task, made
            if warning := made.warning():
                LOGGER.warning(warning)
        return self._schedule[1]

    def annealed_steps(self) -> int:
        """Optimizer steps in which the temperature falls."""
        return self.task_steps()

    def task_steps(self) -> int:
        """Optimizer steps of the current task."""
        learner, config = self.learner, self.config
        return epochs_of(config, learner.task) * learner.data.steps_per_epoch(learner.task, config.batch_size)

    def wants_step(self, step: int) -> bool:
        return self.learner.bank.current is not None

    def noise(self, step: int) -> Tensor | None:
        """Gumbel noise `[n]` of optimizer step `step`, on the device; None draws none."""
        return None

    def weights(self) -> Tensor | None:
        return self._beta

    def decide(self) -> Decision:
        self.gate.set_temperature(self.config.gumbel_tau_final)
        return super().decide()

    def prune(self, keep: list[int]) -> None:
        """The gate weights that are left renormalise, products `beta_i alpha_i` stay."""
        bank = self.learner.bank
        if len(keep) < len(bank.tasks):
            before = self.gate()[[i for i, task in enumerate(bank.tasks) if task in keep]]
            bank.keep_only(keep)
            bank.rescale(before, self.gate())

    def figures(self) -> dict[str, float]:
        return {"tau": self.gate.tau.item()}

    def advice(self) -> str:
        return ", or raise gumbel_tau_final"

    def loss_parts(self, means: dict[str, float]) -> str:
        return f" (clf={means['clf']:.3f}, sparse={means['sparse']:.3f})"

    def state(self) -> dict[str, Any]:
        return {"tau": self.gate.tau.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.gate.set_temperature(state["tau"])


class GumbelKeys(NoiseKeys):
    """Inference"""

    inference: Name = key("global", "Which network an image of the test set meets.")


class GumbelSparsemax(TrainedGate):
    """The named method: sparsemax of noisy logits, with exact zeros."""

    class Keys(TrainedGate.Keys, GumbelKeys):
        """Gumbel-Sparsemax"""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._drawn: tuple[int, int, Tensor] | None = None  # task, first step, noise [steps, n] of an epoch

    def noise(self, step: int) -> Tensor | None:
        """Keyed by (seed, task, step): the same in every process, and whatever else draws random numbers. An epoch's noise
        goes to the device at once, so that no step waits for it."""
        learner = self.learner
        if self.config.gate_noise == 0:
            return None
        if self._drawn is None or self._drawn[0] != learner.task or not 0 <= step - self._drawn[1] < len(self._drawn[2]):
            count, per_epoch = len(learner.bank.tasks), learner.data.steps_per_epoch(learner.task, self.config.batch_size)
            end = (step // per_epoch + 1) * per_epoch
            rows = [sample_gumbel((count,), generator(learner.seed, "gate", learner.task, number))
                    for number in range(step, end)]
            self._drawn = learner.task, step, (self.config.gate_noise * torch.stack(rows)).to(self.gate.logits)
        return self._drawn[2][step - self._drawn[1]]


class Global(Component):
    """One network for all images, with all adapters that weigh anything."""


class GumbelSoftmax(GumbelSparsemax):
    """Softmax in place of sparsemax: no exact zeros."""

    class Keys(TrainedGate.Keys, NoiseKeys):
        """Gumbel-Softmax"""

    def make_gate(self) -> GumbelGate:
        return GumbelSoftmaxGate()
