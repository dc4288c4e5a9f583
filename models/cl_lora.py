"""CL-LoRA: in the first blocks a LoRA that all tasks share, in the others one for each task (He, Duan & Zhu, CVPR 2025, arXiv
2505.24816).

Every block adds `mu A B x` to its q and to its v. Shared blocks: B is drawn once with orthonormal rows and never trained; A,
from 0, is trained on by every task; mu is 1. The others: every task has its own A (from 0), B (from orthonormal rows) and
block weights mu, one for each block and projection (from U(0.5, 1.5)), all trained, and fixed after the task. The task's
classes are told apart by proxy rows (backbone/heads/proxy.py). Inference: class c of task i has the logit `cos(f_i, P_c)`,
f_i being the features with the adapters of task i, and P_c the mean of f_i over the class when i was learned.

A step of a later task is two steps of one optimizer. The first is early-exit distillation, `lambda H(p', p)`: H cross-entropy,
p and p' the softmax at temperature T of the proxy rows' logits for what the shared blocks give, with A as it is and as the
last task left it; the gradient of every row of A is multiplied by that row's norm in the last task's A, over the mean of the
norms (gradient reassignment). The second is of cross-entropy + `lambda_o mean_i |cos(mu, mu_i)|` over the earlier tasks i.

As in the official code, JiangpengHe/CL-LoRA at df4e74e; docs/BASELINES.md says where the text and the code differ, and what of
the code is not done. The shared blocks are computed once for all tasks' features.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.dual_lora import FACTORS, DualBank, orthonormal
from backbone.heads.linear import Features, Pause
from backbone.heads.proxy import TaskMeansHead, class_means, class_sums
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import TaskReport
from models.optimisation import LaterTaskKeys, OptimisationKeys
from models.training import GradientLearner
from utils.config import Config, key
from utils.errors import UserError
from utils.rng import generator
from utils.runs import distributed
from utils.runs.files import write_safetensors


class DiagonalHead(TaskMeansHead):
    """Cosines of every task's classes, of the features with its own adapters; those come side by side, `[b, tasks d]`. While a
    task is trained its classes answer with the cosines of their proxy rows, of the newest features."""

    kind = "cl_lora"

    def collect(self, features: Features, classes: int) -> list[Tensor]:
        """Sums `[c, d]` and numbers `[c]` of the images of each class, of features with their own adapters."""
        return class_sums(features, classes, self.weight)

    @torch.no_grad()
    def absorb(self, sums: list[Tensor], task: int, pause: Pause) -> None:
        self.know([*self.known, class_means(sums).to(self.weight)])

    def forward(self, features: Tensor) -> Tensor:
        rows = [*self.known, self.new_weight] if self.training_rows else list(self.known)
        parts = features.unflatten(1, (-1, self.width)).unbind(1)
        return torch.cat([F.linear(F.normalize(part), F.normalize(of_task).to(part.dtype))
                          for part, of_task in zip(parts, rows, strict=True)], 1)


class TaskNetworks(nn.Module):
    """Images `[b, 3, S, S]` to the features with the adapters of every task, side by side, `[b, tasks d]`."""

    def __init__(self, backbone: FrozenViT, bank: DualBank) -> None:
        super().__init__()
        self.backbone, self.bank, self.image_size = backbone, bank, backbone.image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.bank.side_by_side(images, lambda images, network=self.backbone: network(images))

    def as_timm(self) -> nn.Module:
        """Refuses: see `SavedNetwork.as_timm`."""
        raise UserError("model_name: this run's network has adapters for every task, each of which sees every image, which no "
                        "network of timm has; export it as torchscript or onnx.")


class CLLoRA(GradientLearner):
    """A LoRA that all tasks share in the first blocks, held by distillation, and one for each task in the others; then the
    nearest class mean by cosine."""

    head: DiagonalHead

    class Keys(OptimisationKeys, LaterTaskKeys):
        """Dual adapters of CL-LoRA"""

        rank: int = key(8, "Rank of every adapter, at most the backbone's width.", ge=1)
        shared_share: float = key(
            0.5, "Share of the blocks, from the first, in which all tasks share an adapter; at least one block does and one "
                 "does not.", gt=0, lt=1)
        kd_weight: float = key(5.0, "Weight of the distillation that holds the shared adapter; 0 leaves it out.", ge=0)
        kd_temperature: float = key(2.0, "Temperature of the distillation.", gt=0)
        mu_orthogonality: float = key(
            1e-4, "Weight of the loss that holds a task's block weights apart from those of earlier tasks.", ge=0)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bank = bank_on(self.backbone, self.config)
        shared_A = self.bank.shared_A
        self.bank.share(shared_A, orthonormal(len(shared_A), *shared_A.shape[2:], generator(self.seed, "adapter")))
        self.bank.to(self.device)
        distributed.copy_from_main([self.bank.shared_B])  # processors of different kinds may differ in the last bit
        self._early = torch.compile(self.bank.early) if self.config.compile else self.bank.early

    def make_head(self) -> DiagonalHead:
        return DiagonalHead(self.backbone.width, self.config, self.seed)

    def make_room(self, task: int) -> None:
        super().make_room(task)
        self.bank.add(generator(self.seed, "adapter", task))

    def groups(self) -> list[dict]:
        """Two, of which the distillation moves the first alone."""
        bank = self.bank
        return [{"params": [bank.shared_A, *self.head.trainable()], "name": "shared adapter and rows"},
                {"params": [bank.new_A, bank.new_B, bank.new_mu], "name": "adapter"}]

    # ---- a step

    def before_step(self, step: int) -> Tensor | None:
        """The loss that holds block weights apart."""
        if self.task == 0:
            return None
        cosines = F.normalize(self.bank.mu.flatten(1), dim=1) @ F.normalize(self.bank.new_mu.flatten(), dim=0)
        return self.config.mu_orthogonality * cosines.abs().mean()

    def backward(self, images: Tensor, labels: Tensor, extra: Tensor | None, total: int) -> tuple[Tensor, Tensor, Tensor]:
        if self.task > 0 and self.config.kd_weight > 0:
            self._distil(images, total)
        return super().backward(images, labels, extra, total)

    def _distil(self, images: Tensor, total: int) -> None:
        """An optimizer step of the distillation alone; arguments as of `backward`."""
        loss = torch.zeros((), device=self.device)
        for part in images.chunk(max(1, min(self.config.grad_accum, len(images)))) if len(images) else ():
            share = self.distillation(part) / total
            share.backward()
            loss += share.detach()
        if self._process != (0, 1):
            distributed.add_up_gradients([self.bank.shared_A, *self.head.trainable()], loss)
        self.bank.reassign()
        self.take_step(loss)

    def distillation(self, images: Tensor) -> Tensor:
        """The distillation loss, summed over images; its gradient reaches the proxy rows from both sides."""
        with torch.no_grad(), self.bank.as_before():
            before = self.embed(images, self._early)
        old, new = (self.head.current_logits(features) / self.config.kd_temperature
                    for features in (before, self.embed(images, self._early)))
        return -self.config.kd_weight * (old.softmax(1) * new.log_softmax(1)).sum()

    # ---- what the head reads

    def features(self, images: Tensor) -> Tensor:
        return self.bank.side_by_side(images, self.embed)

    def settle(self) -> None:
        self.bank.commit()

    @torch.no_grad()
    def _task_features(self) -> Features:
        """As for others, of the newest adapters' features alone: class means are taken of no others."""
        for images, labels, places in self.task_images("class statistics of the head"):
            yield self.embed(images), labels, places

    def end_task(self) -> TaskReport:
        super().end_task()
        return TaskReport(active_adapters=len(self.bank))

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, the task's own adapter `adapter_task_<task>.safetensors`, and `shared_task_<task>.safetensors`."""
        tensors = {"adapter": {field: getattr(self.bank, field)[-1].float() for field in FACTORS},
                   "shared": {name: getattr(self.bank, name).detach().float() for name in ("shared_A", "shared_B")}}
        written = [save_head(folder, self.head, self.task)]
        for name, parts in tensors.items():
            written.append(folder / f"{name}_task_{self.task}.safetensors")
            write_safetensors(written[-1], parts, {"task": str(self.task), "backbone": self.backbone.identity.name})
        return written

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        bank = bank_on(backbone, saved.config)
        bank.share(**saved.tensors(f"shared_task_{saved.task}.safetensors"))
        for task in range(saved.task + 1):
            bank.store(**saved.tensors(f"adapter_task_{task}.safetensors"))
        head = DiagonalHead(backbone.width, saved.config, saved.seed)
        head.from_file(saved.tensors(f"head_task_{saved.task}.safetensors"))
        return SavedNetwork(TaskNetworks(backbone, bank), None, head)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "bank": self.bank.snapshot()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.bank.restore(state["bank"])


def bank_on(backbone: FrozenViT, config: Config) -> DualBank:
    """An empty bank on the network, as the config has it; raises UserError for what the network has no room for."""
    depth, width, name = len(backbone.vit.blocks), backbone.vit.blocks[0].attn.qkv.in_features, config.backbone_type
    shared = int(config.shared_share * depth + 0.5)
    if not 0 < shared < depth:
        raise UserError(f"shared_share: {config.shared_share} of the {depth} blocks of '{name}' is {shared}; the blocks that "
                        "share an adapter and those that do not have to be at least one each: choose another share, or a "
                        "deeper network.")
    if config.rank > width:
        raise UserError(f"rank: {config.rank} is above the width {width} of '{name}'; choose a rank between 1 and {width}.")
    return DualBank(backbone.vit, name, shared, config.rank)
