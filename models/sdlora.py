"""The learner with one adapter per task, a gate over all of them, and growth on merit: Gumbel CL-LoRA with its trained gates,
SD-LoRA with gate "none" (METHOD.md, sections 2 to 4). What a gate does in the course of a task is in models/recipes/."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.lora import AdapterBank, inject
from models.artifacts import SavedNetwork, SavedRun, beta_record, save_adapter, save_head
from models.base import TaskReport
from models.growth import RULES, Decision, Grounds, Rule
from models.optimisation import learning_rate
from models.recipes.base import Recipe
from models.rows import RowFit
from models.training import GradientLearner
from utils.config import Config, KeyGroup, key
from utils.config.rules import Name, RankSteps, show
from utils.errors import UserError
from utils.results.report import growth_lines
from utils.rng import generator
from utils.runs import distributed
from utils.runs.files import write_torch
from utils.runs.progress import LOGGER


class AdapterKeys(KeyGroup):
    """Adapters"""

    rank: int | None = key(
        None, "Rank of every LoRA adapter, at most the backbone's width. Parameters per adapter grow in proportion.",
        unset="10, or the first rank of `rank_schedule`",
        derive=lambda config: config.rank_schedule[0][1] if getattr(config, "rank_schedule", None) else 10, ge=1)
    head_lr: float | None = key(
        None,
        "Learning rate of the head's new rows while an adapter is trained with them. A higher one than the adapter's lets the "
        "adapter learn from rows that mean something.", unset="the task's learning rate", gt=0)


class ManyAdaptersKeys(KeyGroup):
    """Adapters along the stream"""

    rank_schedule: RankSteps | None = key(
        None,
        "Ranks that change along the stream, as pairs [first task, rank]; SD-LoRA-RR is `[[0, 10], [4, 8], [8, 6]]`.",
        unset="`rank` in every task",
        allowed="a list of pairs [first task, rank], tasks ascending from 0 and ranks of at least 1")
    gate: Name = key("gumbel_sparsemax", "How the adapters are weighted.")


class SDLoRA(GradientLearner):
    """One adapter per task, weighted by a gate; `gate` decides between Gumbel CL-LoRA and SD-LoRA."""

    scenarios = ("class", "domain")

    class Keys(GradientLearner.Keys, AdapterKeys, ManyAdaptersKeys):
        """Adapters under a gate"""

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        yield from super().contradictions(config)
        schedule = getattr(config, "rank_schedule", None)
        if schedule and config.rank != schedule[0][1]:
            yield (f"'rank' is {show(config.rank)} but 'rank_schedule' starts with rank {show(schedule[0][1])}; leave out "
                   "'rank'")

    @classmethod
    def held_out(cls, config: Config) -> float:
        return cls.rule(config).held_out(config)

    @classmethod
    def rule(cls, config: Config) -> type[Rule]:
        """The growth rule that the config names."""
        return RULES[config.growth_rule]

    def make_recipe(self) -> Recipe:
        """The recipe of the gate that the config names."""
        return recipe_of(self.config)(self)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.recipe = self.make_recipe()
        self.gate = self.recipe.gate
        layers = inject(self.backbone.vit, config.backbone_type)
        self.bank = AdapterBank(layers, self.gate, self.recipe.alpha_scope, self.recipe.train_alpha).to(self.device)
        self.bank.skip_silent = not config.compile  # a compiled network wants the same shapes in every step
        schedule = getattr(config, "rank_schedule", None) or []
        largest = max([config.rank, *(rank for _, rank in schedule)])
        if largest > self.bank.width:
            name = "rank" if largest == config.rank else "rank_schedule"
            raise UserError(f"{name}: {largest} is above the width {self.bank.width} of '{config.backbone_type}'; choose a "
                            f"rank between 1 and {self.bank.width}.")
        self.pruned: set[int] = set()
        self.decision_beta = torch.zeros(0)
        self._decision: Decision | None = None  # of the current task, once it is settled
        self._dropped: list[int] = []  # the adapters that this took away

    def announce(self) -> None:
        self.recipe.announce()

    # ---- begin

    @torch.no_grad()
    def make_room(self, task: int) -> None:
        """The head grows, and the new adapter starts at `B = 0`."""
        super().make_room(task)
        self._decision, self._dropped = None, []
        logit = self.recipe.newcomer_logit()
        self.bank.add(task, rank_of(self.config, task), self.config.init_alpha, logit, generator(self.seed, "adapter", task))

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        self.recipe.begin()
        self.recipe.merge()

    # ---- train

    def groups(self) -> list[dict]:
        rate = learning_rate(self.config, self.task) if self.config.head_lr is None else self.config.head_lr
        return [{"name": "adapter", "params": [self.bank.new_A, self.bank.new_B]},
                {"name": "head", "params": self.head.trainable(), "lr": rate}, *self.recipe.groups()]

    def wants_step(self, step: int) -> bool:
        return super().wants_step(step) and self.recipe.wants_step(step)

    def before_step(self, step: int) -> Tensor | None:
        return self.recipe.step(step)

    def gate_weights(self) -> Tensor | None:
        return self.recipe.weights()

    def start_evaluation(self) -> None:
        self.recipe.merge()

    def represent(self, images: Tensor) -> Tensor:
        return self.recipe.represent(images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return self.recipe.predict(images)

    def figures(self) -> dict[str, float]:
        return self.recipe.figures()

    def advice(self) -> str:
        return f"lower init_lr, lrate or alpha_lr{self.recipe.advice()}"

    def tracked(self, means: dict[str, float]) -> dict[str, float]:
        return {**super().tracked(means), **{f"beta/adapter_{t}": beta for t, beta in enumerate(self.beta_after().tolist())}}

    def loss_parts(self, means: dict[str, float]) -> str:
        return self.recipe.loss_parts(means) if self.task > 0 else ""

    def _line_figures(self) -> list[str]:
        return super()._line_figures() if self.task > 0 else []

    # ---- decide, settle, commit

    @torch.no_grad()
    def settle(self) -> None:
        decision, active = self.recipe.decide(), list(self.bank.tasks)
        self.recipe.settle(decision)
        self.drop(decision)
        self._decision, self._dropped = decision, [task for task in active if task not in decision.keep]

    def row_fit(self, seen: list[Tensor]) -> RowFit | None:
        fit = super().row_fit(seen)
        if fit is not None or not self._dropped or not self._decision.refit or self.config.refit_epochs == 0:
            return fit
        return RowFit(self, self.config.refit_epochs, self.config.refit_epochs, state=seen)

    def end_task(self) -> TaskReport:
        super().end_task()
        decision, dropped = self._decision, self._dropped
        task, kept = self.task, self.task in decision.keep
        evicted = [other for other in dropped if other != task]
        for line in growth_lines(task, self.decision_beta.tolist(), kept=kept, evicted=evicted, criterion=decision.criterion,
                                 reasons=decision.reasons, active=len(self.bank.tasks), total=task + 1):
            LOGGER.info(line)
        numbers = self.recipe.numbers()
        if decision.value is not None:
            numbers[self.rule(self.config).name] = decision.value
        return TaskReport(kept=kept, beta=self.decision_beta[-1].item(), beta_values=self.decision_beta.tolist(),
                          beta_after=self.beta_after().tolist(), pruning_mask=self.pruning_mask().tolist(), evicted=evicted,
                          active_adapters=len(self.bank.tasks), numbers=numbers)

    def conditional_growth_decision(self, beta: Tensor) -> Decision:
        """What the growth rule decides on gate weights `[n]` at `tau_final` without noise; in a run of several processes the
        main one's word counts."""
        self.decision_beta = beta_record(beta, self.bank.tasks, self.task)
        decision = self._conditional_growth_decision(beta)
        decision = distributed.on_main(lambda: decision)
        if decision.absorbed is not None:
            self.bank.absorbed[:-1] += decision.absorbed.to(self.bank.absorbed)
        return decision

    def _conditional_growth_decision(self, beta: Tensor) -> Decision:
        grounds = Grounds(beta, self.bank, self._held_out_losses, self.seed, self.data.nb_tasks)
        return self.rule(self.config).decide(self.config, grounds)

    def drop(self, decision: Decision) -> None:
        """Notes which adapters have left for good."""
        self.pruned |= {task for task in range(self.task + 1) if task not in decision.keep}

    def _held_out_losses(self) -> tuple[float, float]:
        """Cross-entropy on the held-out images with and without the current adapter, the new head rows fitted both times."""
        bank, head, epochs = self.bank, self.head, self.config.refit_epochs
        saved, rows = bank.snapshot(), head.snapshot()
        losses = []
        for keep in (list(bank.tasks), bank.tasks[:-1]):
            self.recipe.prune(keep)
            RowFit(self, epochs, epochs).run()
            losses.append(self._held_out_loss())
            bank.restore(saved)
            head.restore(rows)
        return losses[0], losses[1]

    def _held_out_loss(self) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss and of images, read once
        for images, labels, _ in self.task_images("held-out loss", "val"):
            sums[0] += F.cross_entropy(self.head.current_logits(self.embed(images)), labels, reduction="sum")
            sums[1] += len(labels)
        distributed.add_up(sums)
        total, images = sums.tolist()
        return total / images

    # ---- what is stored

    def beta_after(self) -> Tensor:
        """Gate weights in force, `[t + 1]`, 0 for pruned adapters."""
        return beta_record(self.recipe.in_force().detach(), self.bank.tasks, self.task)

    def pruning_mask(self) -> Tensor:
        """int64 `[T]`: 1 kept or not yet seen, 0 pruned."""
        return torch.tensor([0 if task in self.pruned else 1 for task in range(self.data.nb_tasks)])

    def save(self, folder: Path) -> list[Path]:
        """Adapter, head and gate; in this order, so that the gate file's presence means that all it refers to is there."""
        task, bank = self.task, self.bank
        written = [save_adapter(folder, bank, task, self.backbone)] if task in bank.tasks else []
        written += self.recipe.save(folder)
        written += [save_head(folder, self.head, task), folder / f"beta_values_task_{task}.pt"]
        logits = beta_record(self.gate.logits, bank.tasks, task)
        logits[[t for t in range(task + 1) if t not in bank.tasks]] = float("-inf")
        write_torch(written[-1], {
            "beta_values": self.decision_beta.clone(),
            "pruning_mask": self.pruning_mask(),
            "beta_after": self.beta_after(),
            **self.recipe.record(),
            "alphas": beta_record(bank.magnitudes(), bank.tasks, task),
            "gate_logits": logits,
            "gate_scale": self.gate.scale,
            "task_id": task,
            "threshold": getattr(self.config, "growth_threshold", None),  # a method may have no growth to decide
            "tau": self.recipe.tau,
            "growth_rule": self.rule(self.config).name,
            "kept": task in bank.tasks,
        })
        return written

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        return recipe_of(saved.config).rebuild(saved)

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.head]

    def stored_tensors(self) -> list[Tensor]:
        return [*super().stored_tensors(), *self.recipe.stored_tensors()]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.snapshot(), "pruned": sorted(self.pruned),
                "decision_beta": self.decision_beta, "recipe": self.recipe.state(), "dropped": self._dropped,
                "decision": None if self._decision is None else vars(self._decision)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pruned, self.decision_beta = set(state["pruned"]), state["decision_beta"]
        self._dropped = state["dropped"]
        self._decision = None if state["decision"] is None else Decision(**state["decision"])
        self.bank.restore(state["bank"])
        self.recipe.load_state(state["recipe"])
        self.recipe.merge()


def recipe_of(config: Config) -> type[Recipe]:
    """The recipe that the config has chosen; the innermost choice counts."""
    return [part for part in config.components if issubclass(part, Recipe)][-1]


def rank_of(config: Config, task: int) -> int:
    """LoRA rank of the adapter of `task`: the last entry of `rank_schedule` that has begun, or `rank`."""
    schedule = getattr(config, "rank_schedule", None)
    return [rank for first, rank in schedule if task >= first][-1] if schedule else config.rank
