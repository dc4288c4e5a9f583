"""LiteLoRA (Dieudonné, Lanzillotta, Simsar, Barinka & Hofmann, ICML 2026 workshop, arXiv 2606.28117): train the newcomer, then
learn from its loss whether it was worth it. Symbols and numbers are those of the code, tanguy8001/LiteLoRA at 0fcb287.

`Delta W = sum_i beta_i alpha_i B_i A_i / (||B_i|| ||A_i||)` over the adapters that were kept, the current task's as it is,
without the division. One scalar `alpha_i` per task starts at `init_alpha` and goes on from task to task.

- Task 0: `A_0`, `B_0` and its head rows, for `init_epoch` epochs; `alpha_0` stays as it is, and the adapter is kept.
- Phase 1 of a later task: `A_t`, `B_t`, every alpha and the new head rows, cross-entropy, every gate open (`beta_i = 1`); the
  learning rates are cut at 60 % and 80 % of the epochs.
- Phase 2: the logit `l_t` alone, from `init_logit`, by AdamW on cross-entropy + `lambda_sparsity` * `|beta_t|`. In the network
  `beta_t = [l_t + G > 0]`, one `G ~ Gumbel(0, 1)` per step; its gradient is that of `sigmoid(l_t + G)` (straight-through). The
  slope of `|beta_t|` at 0 is 0: where the draw has closed the gate, the cross-entropy alone moves the logit.
- Decision: the adapter stays if `sigmoid(l_t) >= growth_threshold`, 0.5 as published, and from then on weighs `alpha_t`; else
  it leaves, and head rows stay as they are (`row_fit` "with_adapter"). Older gates are never trained again.

Files: those of SD-LoRA. `beta_values` are `sigmoid(l_i)`, which the decision reads and which need not sum to 1; `beta_after`
are the weights in force, 1 or 0.

Not as in that code: there every block and projection draws a `G` of its own, here one draw is shared, as METHOD.md wants it; a
newcomer is open in phase 1 whatever its `init_logit`, there only if that is above 0; phase 2 ignores `milestones`, which its
one epoch never reaches.
"""

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from backbone.gates import Gate
from models.artifacts import SavedNetwork, SavedRun
from models.growth import Decision, Grounds, Rule, Threshold
from models.optimisation import learning_rate, optimizer_of, too_many_parts
from models.recipes.base import AlphaKeys, Recipe
from models.rows import RowFit
from models.sdlora import AdapterKeys, SDLoRA
from models.training import GradientLearner, Phase
from utils.config import Config, KeyGroup, key
from utils.config.rules import Epochs
from utils.gumbel_utils import sample_gumbel
from utils.rng import generator
from utils.runs.progress import LOGGER

CUTS = (0.6, 0.8)  # of phase 1's epochs


class LiteLoRAKeys(KeyGroup):
    """LiteLoRA"""

    init_alpha: float = key(1.0, "Magnitude that a new adapter starts with.", gt=0)
    init_logit: float = key(0.5, "Logit of the newcomer's gate before phase 2.")
    alpha_epochs: int | None = key(
        None, "Epochs of phase 1 in every later task; the first task has no other phase, and takes `init_epoch`.",
        unset="`epochs`", derive=lambda config: config.epochs, ge=1)
    alpha_optimizer: Literal["sgd", "adam", "adamw"] = key(
        "sgd", "Optimizer of phase 1 and of the first task; SGD as published.")
    beta_epochs: int = key(1, "Epochs of phase 2, the newcomer's selection.", ge=1)
    beta_lr: float = key(0.05, "Learning rate of the newcomer's logit in phase 2; 0 freezes it.", ge=0)
    batch_size_p2: int = key(128, "Images per optimizer step of phase 2; fewer make more steps.", ge=1)
    lambda_sparsity: float = key(
        0.035, "Weight of the newcomer's gate in the loss of phase 2; published per data set, CIFAR-100 with 0.035.", ge=0)
    growth_threshold: float = key(
        0.5, "Gate weight `sigmoid(logit)` that a newcomer has to reach; high prunes more.", ge=0, le=1)
    binary_beta: Literal[True] = key(
        True, 'Each adapter is in or out by a gate of its own; a gate over all of them is `model_name` `"sdlora"`.')
    weight_decay: float = key(
        2e-4, "Weight decay of the magnitudes in phase 1 and of the logit in phase 2; all else has none.", ge=0)
    lrate_decay: float = key(0.0, "Factor on the learning rates at 60 % and at 80 % of phase 1's epochs; 0 stands for 0.5.",
                             ge=0, le=1)
    init_milestones: Epochs = key(
        [], "Epochs of the first task after which its learning rate is multiplied by `init_lr_decay`.",
        allowed="a list of ascending integers of at least 1")
    init_lr_decay: float = key(0.1, "Factor at each of the `init_milestones`.", ge=0, le=1)


class UnreadKeys(KeyGroup):
    """Keys of LiteLoRA's files that its code does not read"""

    optimizer: Literal["sgd", "adam", "adamw"] = key("sgd", "Not read; `alpha_optimizer` is.")
    scheduler: Literal["cosine", "steplr", "constant"] = key("cosine", "Not read: the learning rates step.")
    min_lr: float = key(0.0, "Not read.", ge=0)
    tuned_epoch: int | None = key(None, "Not read.", unset="nothing", ge=1)
    milestones: Epochs = key(
        [], "Not read: phase 2 ends before they come.", allowed="a list of ascending integers of at least 1")
    init_weight_decay: float | None = key(None, "Not read: the first task has no weight decay.", unset="nothing", ge=0)


class BinaryGate(Gate):
    """Every adapter is in, but for a newcomer while its logit is trained (`newest`): that one is in or out.

    newest: the last of `logits` as a parameter of its own, in the same memory, so that nothing else is trained.
    """

    def __init__(self) -> None:
        super().__init__()
        self.newest: nn.Parameter | None = None

    def replace(self, logits: Tensor) -> None:
        super().replace(logits)
        self.newest = None

    def open_newest(self) -> nn.Parameter:
        """Has the newcomer's logit decide over it from here on; returns the logit, `[1]`."""
        self.newest = nn.Parameter(self.logits.detach()[-1:])
        return self.newest

    def forward(self, noise: Tensor | None = None) -> Tensor:
        """Gate weights `[n]`, each 0 or 1; `noise` `[1]` is added to the newcomer's logit."""
        beta = torch.ones_like(self.logits)
        if self.newest is None:
            return beta
        soft = torch.sigmoid(self.newest if noise is None else self.newest + noise)
        return torch.cat([beta[:-1], (soft > 0.5).to(soft) + soft - soft.detach()])


class Recruiting(Threshold):
    """The gate weight of the newcomer reaches `growth_threshold`."""

    @classmethod
    def decide(cls, config: Config, grounds: Grounds) -> Decision:
        beta, bank = grounds.beta[-1], grounds.bank
        kept = bool(beta >= torch.tensor(config.growth_threshold).to(beta))
        bound, first = f"{config.growth_threshold:.4f}", bank.current == 0
        reason = "task 0 is always kept" if first else f"beta={beta.item():.4f} {'>=' if kept else '<'} {bound}"
        keep = [task for task in bank.tasks if kept or first or task != bank.current]
        return Decision(keep, f"threshold: {bound}", {bank.current: reason}, beta.item())


class Selection(Recipe):
    """What the binary gate does in the course of a task."""

    gate: BinaryGate
    alpha_scope = "task"

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self._frozen: list[nn.Parameter] = []
        self._beta: Tensor | None = None
        self._drawn: tuple[int, int, Tensor] | None = None  # task, first step, noise [steps, 1] of what is left of phase 2

    def make_gate(self) -> BinaryGate:
        return BinaryGate()

    def announce(self) -> None:
        config = self.config
        LOGGER.info(f"[LiteLoRA] init_logit={config.init_logit}, beta_lr={config.beta_lr}, beta_epochs={config.beta_epochs}, "
                    f"lambda_sparsity={config.lambda_sparsity}, growth_threshold={config.growth_threshold}")

    def newcomer_logit(self) -> float:
        return self.config.init_logit

    def begin(self) -> None:
        """The newest stored adapter, evaluated with its own norm, is divided by `||A|| ||B||` like those before it."""
        self.learner.bank.scale.copy_(self.learner.bank.product_ratio)

    def groups(self) -> list[dict]:
        if self.learner.task == 0:
            return []
        group = self.group("magnitudes", self.learner.bank.alpha, self.config.alpha_lr)
        return [{**group, "weight_decay": self.config.weight_decay}]

    def select(self) -> torch.optim.Optimizer:
        """The optimizer of phase 2; freezes all else."""
        learner, config = self.learner, self.config
        self._frozen = [learner.bank.new_A, learner.bank.new_B, learner.bank.alpha, *learner.head.trainable()]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        group = {"name": "gate", "params": [self.gate.open_newest()]}
        return optimizer_of("adamw", [group], config.beta_lr, 0.0, config.weight_decay)

    def selection_step(self, step: int) -> Tensor:
        """One draw of noise and one merge, shared by all blocks and projections."""
        self._beta = self.learner.bank.train_step(self.noise(step))
        return self.config.lambda_sparsity * self._beta[-1].abs()

    def noise(self, step: int) -> Tensor:
        """Gumbel noise `[1]` of optimizer step `step`, keyed by (seed, task, step): the same in every process. All of a phase
        goes to the device at once, so that no step waits for it."""
        learner = self.learner
        if self._drawn is None or self._drawn[0] != learner.task or step < self._drawn[1]:
            rows = [sample_gumbel((1,), generator(learner.seed, "gate", learner.task, number))
                    for number in range(step, learner.steps_in(learner.task))]
            self._drawn = learner.task, step, torch.stack(rows).to(self.gate.logits)
        return self._drawn[2][step - self._drawn[1]]

    def weights(self) -> Tensor | None:
        return None if self.gate.newest is None else self._beta

    def decide(self) -> Decision:
        return self.learner.conditional_growth_decision(self.gate.logits.detach().sigmoid())

    def settle(self, decision: Decision) -> None:
        """The newcomer's norm stays a fixed factor of it until the next task: it is evaluated as it was trained."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self.gate.newest = [], None
        self.prune(decision.keep)
        if self.learner.bank.current is not None:
            self.learner.bank.commit(keep_norm=True)

    def figures(self) -> dict[str, float]:
        return {"beta": self.gate.logits[-1].sigmoid().item()}

    def advice(self) -> str:
        return ", or beta_lr"

    def loss_parts(self, means: dict[str, float]) -> str:
        return f" (clf={means['clf']:.3f}, sparse={means['sparse']:.3f})"


class LiteLoRA(SDLoRA):
    """SD-LoRA that asks of every newcomer, once it is trained, whether it pays: a binary gate, trained alone."""

    scenarios = ("class", "domain")

    class Keys(LiteLoRAKeys, UnreadKeys, AdapterKeys, AlphaKeys, GradientLearner.Keys):
        """LiteLoRA's training"""

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        return too_many_parts(config)  # it reads no `min_lr`

    @classmethod
    def warnings(cls, config: Config) -> list[str]:
        """A file with every key is a resolved config that a run has saved, and gets no warning."""
        given = config.model_fields_set
        unread = [name for name in UnreadKeys.model_fields if name in given]
        if given >= set(type(config).model_fields) or not unread:
            return []
        return [f"LiteLoRA's code reads none of these keys of the config, and nor does this method: {', '.join(unread)}. It "
                "trains with SGD, cuts the learning rates at 60 % and 80 % of phase 1, and selects with AdamW."]

    @classmethod
    def rule(cls, config: Config) -> type[Rule]:
        return Recruiting

    def make_recipe(self) -> Selection:
        return Selection(self)

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        return Selection.rebuild(saved)

    def make_room(self, task: int) -> None:
        self.bank.train_alpha = task > 0
        super().make_room(task)

    def trainable_parameters(self) -> int:
        return super().trainable_parameters() + (self.task > 0)  # the logit

    def phases(self, task: int) -> list[Phase]:
        config = self.config
        if task == 0:
            rate = partial(stepped, config.init_milestones, config.init_lr_decay)
            return [Phase(config.init_epoch, config.batch_size, self.optimizer, self.before_step, rate)]
        cuts = [int(share * config.alpha_epochs) for share in CUTS]
        rate = partial(stepped, cuts, config.lrate_decay or 0.5)
        recipe = self.recipe
        return [Phase(config.alpha_epochs, config.batch_size, self.optimizer, self.before_step, rate),
                Phase(config.beta_epochs, config.batch_size_p2, recipe.select, recipe.selection_step, lambda epoch: 1.0)]

    def optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return optimizer_of(config.alpha_optimizer, self.groups(), learning_rate(config, self.task), config.momentum, 0.0)

    def row_optimizer(self) -> torch.optim.Optimizer:
        config, given = self.config, self.config.refit_lr is not None
        kind, rate = ("sgd", config.refit_lr) if given else (config.alpha_optimizer, learning_rate(config, self.task))
        return optimizer_of(kind, [{"params": self.head.trainable()}], rate, config.momentum, 0.0)

    def row_fit(self, seen: list[Tensor]) -> RowFit | None:
        """With `row_fit` "with_adapter" rows stay as trained, also once the adapter has left that they were trained with."""
        return GradientLearner.row_fit(self, seen)

    def load_state(self, state: dict) -> None:
        self.bank.train_alpha = state["task"] > 0
        super().load_state(state)


def stepped(milestones: list[int], factor: float, epoch: float) -> float:
    """Learning rate of `epoch` over the initial one: `factor` for every milestone that it has reached."""
    return factor ** sum(epoch >= milestone for milestone in milestones)
