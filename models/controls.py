"""Controls on the frozen backbone: a head trained on it, and the nearest class mean."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.heads.cosine import CosineHead
from models.artifacts import save_head
from models.base import BaseLearner, Session, TaskReport
from models.training import GradientLearner, learning_rate
from utils.errors import UserError
from utils.runs import distributed

GATE_KEYS = frozenset({
    "gate_lr", "gate", "gate_compensation", "gate_noise", "gate_price", "gumbel_tau_init", "gumbel_tau_final",
    "gumbel_anneal_rate", "lambda_sparsity"})
GROWTH_KEYS = frozenset({
    "growth_rule", "growth_threshold", "growth_topk", "growth_margin", "val_fraction", "kd_residual", "refit_epochs",
    "refit_lr"})
ADAPTER_KEYS = GATE_KEYS | GROWTH_KEYS | {"rank", "rank_schedule", "alpha_scope", "init_alpha", "alpha_lr", "head_lr"}
HEAD_KEYS = frozenset({"head", "cosine_scale", "align_epochs", "align_samples", "align_lr", "ridge_dim", "ridge_lambda"})
TRAINING_KEYS = frozenset({
    "init_epoch", "epochs", "init_lr", "lrate", "optimizer", "momentum", "weight_decay", "init_weight_decay", "scheduler",
    "min_lr", "tuned_epoch", "milestones", "lrate_decay", "init_milestones", "init_lr_decay", "eval_every", "grad_accum",
    *HEAD_KEYS})


class FinetuneHead(GradientLearner):
    """The frozen backbone with the head alone, trained as SD-LoRA trains its head: what adapters must beat."""

    inactive = ADAPTER_KEYS

    def groups(self) -> list[dict]:
        return [{"params": self.head.trainable(), "lr": learning_rate(self.config, self.task)}]

    def save(self, folder: Path) -> list[Path]:
        return [save_head(folder, self.head, self.task)]


class SimpleCIL(BaseLearner):
    """Nearest class mean by cosine similarity on frozen features, nothing trained (SimpleCIL, Zhou et al., 2023)."""

    inactive = ADAPTER_KEYS | TRAINING_KEYS
    trains = False
    kind = CosineHead.kind  # its file is that of a cosine head

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.prototypes = nn.Module()
        self.prototypes.register_buffer("weight", torch.zeros(0, self.backbone.width, device=self.device))

    def begin_task(self, task: int) -> None:
        self.task = task

    @torch.no_grad()
    def train(self, session: Session) -> None:
        classes = self.data.task_classes(self.task)
        sums = torch.zeros(len(classes), self.backbone.width, device=self.device)
        counts = torch.zeros(len(classes), device=self.device)
        for images, labels in self.data.eval_batches("train", classes, self.config.batch_size, distributed.part()):
            if len(labels) == 0:
                continue
            members = F.one_hot(labels - classes.start, len(classes)).float()  # [b, c]: a product sums in a fixed order
            sums += members.T @ self.embed(images)
            counts += members.sum(0)
        distributed.add_up(sums, counts)
        means = F.normalize(sums / counts[:, None], dim=1)
        self.prototypes.weight = torch.cat([self.prototypes.weight, means])

    def end_task(self) -> TaskReport:
        if not torch.isfinite(self.prototypes.weight).all():
            raise UserError(f"A class mean of task {self.task} is not finite; check the images and 'backbone_weights'.")
        return TaskReport()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        return F.linear(F.normalize(self.embed(images), dim=1), self.prototypes.weight)

    def save(self, folder: Path) -> list[Path]:
        return [save_head(folder, self, self.task)]

    def to_file(self) -> dict[str, Tensor]:
        """The class means as a cosine head: weight `[classes, d]` and a bias of zeros."""
        return {"weight": self.prototypes.weight, "bias": self.prototypes.weight.new_zeros(len(self.prototypes.weight))}

    def modules(self) -> list[nn.Module]:
        return [self.prototypes]

    def state(self) -> dict[str, Any]:
        return {"task": self.task, "prototypes": self.prototypes.weight}

    def load_state(self, state: dict[str, Any]) -> None:
        self.task = state["task"]
        self.prototypes.weight = state["prototypes"].to(self.device)
