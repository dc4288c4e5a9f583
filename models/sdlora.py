"""Gumbel CL-LoRA, and SD-LoRA as gate "none": one adapter per task, a gate over all of them, growth on merit."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.gates import GATES
from backbone.keys import Key, Keys, key_size, token_statistics
from backbone.lora import AdapterBank, inject
from models.artifacts import beta_record, save_task
from models.base import Session, TaskReport
from models.growth import RULES, Decision, Evidence
from models.training import GradientLearner, epochs_of, learning_rate, make_row_optimizer
from utils.config import Config
from utils.errors import UserError
from utils.gumbel_utils import TemperatureScheduler, sample_gumbel, sparsity_loss
from utils.results.report import growth_lines
from utils.rng import generator
from utils.runs import distributed
from utils.runs.progress import LOGGER


class SDLoRA(GradientLearner):
    """The learner of METHOD.md, sections 2 to 4."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        layers = inject(self.backbone.vit, config.backbone_type)
        self.gate = GATES[config.gate]()
        self.bank = AdapterBank(layers, self.gate, config.alpha_scope).to(self.device)
        self.bank.skip_silent = not config.compile  # a compiled network wants the same shapes in every step
        largest = max([config.rank, *(rank for _, rank in config.rank_schedule or [])])
        if largest > self.bank.width:
            key = "rank" if largest == config.rank else "rank_schedule"
            raise UserError(f"{key}: {largest} is above the width {self.bank.width} of '{config.backbone_type}'; choose a "
                            f"rank between 1 and {self.bank.width}.")
        self.pruned: set[int] = set()
        self.decision_beta = torch.zeros(0)
        self.keys = Keys()
        self._decision: Decision | None = None  # that of the current task, if it has been taken already
        self._beta: Tensor | None = None

    def announce(self) -> None:
        config = self.config
        if self.gate.learned:
            LOGGER.info(f"[Gumbel CL-LoRA] tau_init={config.gumbel_tau_init}, tau_final={config.gumbel_tau_final}, "
                        f"anneal_rate={config.gumbel_anneal_rate}, lambda_sparsity={config.lambda_sparsity}")
        elif self.gate.early:
            LOGGER.info(f"[Gumbel CL-LoRA] gate=evidence, tau_final={config.gumbel_tau_final}, price={config.gate_price}")

    # ---- begin

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        """The head grows, the new adapter starts at `B = 0`, and with `gate_compensation` old magnitudes answer the new gate
        so that no output changes."""
        super().begin_task(task)
        config = self.config
        first = task == 0
        self._decision = None
        before = None if first else self.gate(tau=config.gumbel_tau_final)
        logit = 0.0 if first else self.gate.newcomer_logit(config.gumbel_tau_final)
        if not self.gate.gated:
            self.bank.reset_magnitudes(config.init_alpha)
        self.bank.add(task, rank_of(config, task), config.init_alpha, logit, generator(self.seed, "adapter", task))
        self.gate.set_temperature(config.gumbel_tau_init)
        if self.gate.early:
            self._decide_on_evidence()
        elif self.gate.gated and config.gate_compensation and not first:
            after = self.gate()
            self.bank.rescale(torch.cat([before, after[-1:]]), after)
        self.bank.merge()

    def _decide_on_evidence(self) -> None:
        """Takes the growth decision before training: a task that needs no adapter of its own trains its head rows alone."""
        new = Key.of(self._class_statistics())
        shifts = self.keys.shifts(new)
        self.gate.weigh([shifts[task] for task in self.bank.tasks[:-1]], self.config.gate_price)
        self._decision, beta = self._conditional_growth_decision()
        self._settle(self._decision, beta)
        self.keys.learn(self.task, new, None if self.bank.current == self.task else min(shifts, key=shifts.get))
        if self.bank.current is None:
            self.head.clear()  # rows are fitted to a network that stays as it is: they start alike in every task

    def _class_statistics(self) -> Tensor:
        """Mean statistics `[c, p]` of the current task's classes as the frozen network sees its training images."""
        classes = self.data.task_classes(self.task)
        self.bank.unmerge()
        sums = torch.zeros(len(classes), key_size(self.bank.width), dtype=torch.float64, device=self.device)
        counts = torch.zeros(len(classes), dtype=torch.float64, device=self.device)
        for images, labels in self.data.eval_batches("train", classes, self.config.batch_size, distributed.part()):
            if len(labels) == 0:
                continue
            members = F.one_hot(labels - classes.start, len(classes)).to(sums)  # [b, c]: a product sums in a fixed order
            sums += members.T @ token_statistics(self.backbone.early_tokens(images))
            counts += members.sum(0)
        distributed.add_up(sums, counts)
        return sums / counts[:, None]

    # ---- train

    def groups(self) -> list[dict]:
        config, bank, base = self.config, self.bank, learning_rate(self.config, self.task)
        groups = [{"params": [bank.new_A, bank.new_B]}, {"params": self.head.trainable(), "lr": _or(config.head_lr, base)}]
        if bank.alpha.requires_grad:
            groups.append({"params": [bank.alpha], "lr": _or(config.alpha_lr, base), "weight_decay": 0.0})
        if self.gate.learned:
            groups.append({"params": [self.gate.logits], "lr": _or(config.gate_lr, base), "weight_decay": 0.0})
        return groups

    def optimizer(self) -> torch.optim.Optimizer:
        if self.bank.current is None:
            return make_row_optimizer(self.config, self.head.trainable(), self.task)
        return super().optimizer()

    def train(self, session: Session) -> None:
        config = self.config
        steps = epochs_of(config, self.task) * self.data.steps_per_epoch(self.task, config.batch_size)
        self.schedule = TemperatureScheduler(config.gumbel_tau_init, config.gumbel_tau_final, config.gumbel_anneal_rate, steps)
        self.schedule.reset(self._place.step)
        if self.gate.learned and (warning := self.schedule.warning()):
            LOGGER.warning(warning)
        super().train(session)

    def before_step(self, step: int) -> Tensor | None:
        """One temperature, one draw of noise and one merge per optimizer step, shared by all blocks and projections."""
        if self.bank.current is None:  # the network stays as begin_task merged it
            return None
        if not self.gate.learned:
            self.bank.train_step()
            return None
        self.schedule.reset(step)
        self.gate.set_temperature(self.schedule.get_temperature())
        self._beta = self.bank.train_step(self._noise(step))
        return self.config.lambda_sparsity * sparsity_loss(self._beta)

    def _noise(self, step: int) -> Tensor | None:
        """Keyed by (seed, task, step): the same in every process, and whatever else draws random numbers."""
        if not self.gate.noisy or self.config.gate_noise == 0:
            return None
        stream = generator(self.seed, "gate", self.task, step)
        return self.config.gate_noise * sample_gumbel((len(self.bank.tasks),), stream)

    def gate_weights(self) -> Tensor | None:
        return self._beta

    def start_evaluation(self) -> None:
        self.bank.merge()

    def describe(self) -> dict[str, float]:
        return {"tau": self.gate.tau.item()} if self.gate.learned else {}

    def advice(self) -> str:
        gate = ", or raise gumbel_tau_final" if self.gate.learned else ""
        return f"lower init_lr, lrate or alpha_lr{gate}"

    def _loss_parts(self, means: dict[str, float]) -> str:
        if not self.gate.learned or self.task == 0:
            return ""
        return f" (clf={means['clf']:.3f}, sparse={means['sparse']:.3f})"

    def _line_figures(self) -> list[str]:
        return super()._line_figures() if self.task > 0 else []

    # ---- decide, settle, commit

    @torch.no_grad()
    def end_task(self) -> TaskReport:
        config, bank, task = self.config, self.bank, self.task
        decision, evicted = self._decision, []
        if decision is None:
            decision, beta = self._conditional_growth_decision()
            evicted = [t for t in bank.tasks if t not in decision.keep and t != task]
            self._settle(decision, beta)
        kept = task in decision.keep
        if kept:
            bank.commit()
        if kept and self.gate.early:
            self._refit_rows()
        super().end_task()
        for line in growth_lines(task, self.decision_beta.tolist(), rule=config.growth_rule, kept=kept, evicted=evicted,
                                 active=len(bank.tasks), total=task + 1, limit=decision.limit, value=decision.value):
            LOGGER.info(line)
        return TaskReport(kept=kept, beta=self.decision_beta[-1].item(), beta_values=self.decision_beta.tolist(),
                          beta_after=self.beta_after().tolist(), pruning_mask=self.pruning_mask().tolist(), evicted=evicted,
                          active_adapters=len(bank.tasks),
                          numbers={} if decision.value is None else {config.growth_rule: decision.value})

    def _refit_rows(self) -> None:
        """Fits the new head rows anew, from 0, to the network that the trained adapter has left: rows that have grown with an
        adapter outshout those of tasks that trained rows alone."""
        self.head.clear()
        with torch.enable_grad():
            self.refit_head(epochs_of(self.config, self.task), scheduled=True)

    def _conditional_growth_decision(self) -> tuple[Decision, Tensor]:
        """What the growth rule decides, and the gate weights `[n]` at `tau_final` without noise that it read."""
        self.gate.set_temperature(self.config.gumbel_tau_final)
        beta = self.gate.decide()
        self.decision_beta = beta_record(beta, self.bank.tasks, self.task)
        evidence = Evidence(beta, self.bank, self._held_out_losses, self.seed, self.data.nb_tasks)
        return RULES[self.config.growth_rule](self.config, evidence), beta

    def _settle(self, decision: Decision, beta: Tensor) -> None:
        """Without the dropped adapters: gate weights renormalise, products `beta_i alpha_i` stay, new head rows are refit."""
        dropped = set(self.bank.tasks) - set(decision.keep)
        if not dropped:
            return
        before = beta[[i for i, t in enumerate(self.bank.tasks) if t in decision.keep]]
        self.bank.keep_only(decision.keep)
        self.pruned |= dropped
        if self._decision is not None:  # taken before training: there is nothing to preserve yet
            return
        if self.gate.gated:
            self.bank.rescale(before, self.gate())
        if decision.refit:
            with torch.enable_grad():
                self.refit_head(self.config.refit_epochs)

    def _held_out_losses(self) -> tuple[float, float]:
        """Cross-entropy on the held-out images with and without the current adapter, the new head rows fitted both times."""
        bank, head = self.bank, self.head
        saved, rows = bank.snapshot(), head.snapshot()
        losses = []
        for keep in (list(bank.tasks), bank.tasks[:-1]):
            beta = self.gate()
            bank.keep_only(keep)
            if self.gate.gated:
                bank.rescale(beta[:len(keep)], self.gate())
            with torch.enable_grad():
                self.refit_head(self.config.refit_epochs)
            losses.append(self._held_out_loss())
            bank.restore(saved)
            head.restore(rows)
        return losses[0], losses[1]

    def _held_out_loss(self) -> float:
        classes = self.data.task_classes(self.task)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of the loss and of images, read once
        for batch, labels in self.data.eval_batches("val", classes, self.config.batch_size, distributed.part()):
            if len(labels) == 0:
                continue
            logits = self.head.current_logits(self.embed(batch))
            sums[0] += F.cross_entropy(logits, labels - classes.start, reduction="sum")
            sums[1] += len(labels)
        distributed.add_up(sums)
        total, images = sums.tolist()
        return total / images

    # ---- what is stored

    def beta_after(self) -> Tensor:
        """Gate weights in force, `[t + 1]`, 0 for pruned adapters."""
        return beta_record(self.gate().detach(), self.bank.tasks, self.task)

    def pruning_mask(self) -> Tensor:
        """int64 `[T]`: 1 kept or not yet seen, 0 pruned."""
        return torch.tensor([0 if task in self.pruned else 1 for task in range(self.data.nb_tasks)])

    def save(self, folder: Path) -> list[Path]:
        return save_task(folder, self)

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.head]

    def stored_tensors(self) -> list[Tensor]:
        return [*super().stored_tensors(), *self.keys.tensors()]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.snapshot(), "pruned": sorted(self.pruned),
                "decision_beta": self.decision_beta, "tau": self.gate.tau.item(), "keys": self.keys.state(),
                "decision": None if self._decision is None else asdict(self._decision)}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pruned, self.decision_beta = set(state["pruned"]), state["decision_beta"]
        self.bank.restore(state["bank"])
        self.keys.load(state["keys"], self.device)
        self._decision = None if state["decision"] is None else Decision(**state["decision"])
        self.gate.set_temperature(state["tau"])
        self.bank.merge()


def rank_of(config: Config, task: int) -> int:
    """LoRA rank of the adapter of `task`: the last entry of `rank_schedule` that has begun, or `rank`."""
    return [rank for first, rank in config.rank_schedule if task >= first][-1] if config.rank_schedule else config.rank


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
