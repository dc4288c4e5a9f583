"""InfLoRA: low-rank adaptation that does not interfere (Liang & Li, CVPR 2024, arXiv 2404.00228).

Every task t adds `B_t A_t` to the k and the v projection of every block. A_t `[r, d]`, the same for both, is given before
training: with `H = sum x x^T` over the layer's inputs in the network as it is, its rows are the r leading left singular
vectors of `(I - M M^T) H`, over sqrt(3); M spans the inputs of earlier tasks, so that no step of task t changes what they
give. B_t alone is trained, from 0, with its head rows: cross-entropy over the task's classes. Then the product is merged.

M follows by dual gradient projection memory (DualGPM): with the inputs of the finished task, M takes the directions that it
needs for a share `e_t` of their energy, `e_t` rising from `memory_energy` to `memory_energy_end` along the stream. Beyond
d / 2 directions the complement is kept instead, and shrinks. Energies are squared singular values of H.

As in the official code, liangyanshuo/InfLoRA at e08b00e, from which sqrt(3), H in place of the inputs themselves and augmented
images for it come, and the learning rate's quarter of a cosine, `cos(0.495 pi e / (E - 1))`. Not as there: where less than r
directions are left, A has rows of 0; a first task that fills more than d / 2 directions keeps the complement at once.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from backbone.kv_lora import KVBank
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.base import TaskReport
from models.optimisation import QuarterKeys
from models.training import GradientLearner
from utils.config import Config, key
from utils.config.rules import above
from utils.errors import UserError
from utils.rng import generator
from utils.runs import distributed
from utils.runs.files import write_safetensors


class Memory(nn.Module):
    """One basis `[d, k]` per layer: of the inputs of finished tasks or, where `kept` says so, of what they leave free."""

    def __init__(self) -> None:
        super().__init__()
        self.bases = nn.ParameterList()
        self.kept: list[bool] = []

    def free(self, layer: int, moments: Tensor) -> Tensor:
        """The part of `moments` `[d, d]` float64 that earlier tasks leave free in a layer."""
        if not self.kept:
            return moments
        basis = self.bases[layer].double()
        inside = basis @ (basis.T @ moments)
        return inside if self.kept[layer] else moments - inside

    def put(self, bases: list[Tensor], kept: list[bool]) -> None:
        """Replaces the bases."""
        self.bases = nn.ParameterList(nn.Parameter(basis.detach(), requires_grad=False) for basis in bases)
        self.kept = list(kept)


def directions(free: Tensor, rank: int, scale: Tensor) -> Tensor:
    """Rows `[rank, d]` of A: leading left singular vectors of `free` `[d, d]` over sqrt(3), 0 where there is nothing left but
    rounding on the `scale` of what it is a part of."""
    U, S, _ = torch.linalg.svd(free)
    alive = S[:rank] > len(S) * torch.finfo(S.dtype).eps * scale
    return (U[:, :rank] * alive).T / math.sqrt(3)


def grown(basis: Tensor | None, kept: bool, moments: Tensor, share: float) -> tuple[Tensor, bool]:
    """A layer's basis and whether it is a complement, after a task with `moments` `[d, d]`: DualGPM at energy `share`."""
    width = len(moments)
    total = torch.linalg.svdvals(moments).square().sum()
    inside = 0 * moments if basis is None else basis @ (basis.T @ moments)
    U, S, _ = torch.linalg.svd(inside if kept else moments - inside)
    energy = S.square() / total
    before = energy.cumsum(0) - energy  # of the directions that come first
    if kept:
        count = int((energy.sum() - before >= 1 - share).sum())
        rest = basis - U[:, :count] @ (U[:, :count].T @ basis)
        basis = basis if count == 0 else torch.linalg.svd(rest)[0][:, :max(basis.shape[1] - count, 0)]
    elif basis is None:
        basis = U[:, :max(1, int((energy.cumsum(0) < share).sum()))]
    else:
        count = int((1 - energy.sum() + before < share).sum())
        basis = torch.cat([basis, U[:, :count]], 1)[:, :width]
    if not kept and basis.shape[1] > width / 2:
        return torch.linalg.svd(basis)[0][:, basis.shape[1]:], True
    return basis, kept


class InfLoRA(GradientLearner):
    """LoRA on keys and values whose directions are chosen before training, so that what earlier tasks give does not change."""

    class Keys(QuarterKeys, GradientLearner.Keys):
        """LoRA without interference"""

        rank: int = key(10, "Rank of every adapter, at most the backbone's width.", ge=1)
        memory_energy: float = key(
            0.95, "Share of the inputs' energy that the memory of old directions covers after the first task; published: 0.95 "
                  "on CIFAR-100, 0.98 on ImageNet-R.", gt=0, le=1)
        memory_energy_end: float = key(1.0, "The share to which it rises along the stream.", gt=0, le=1)
        optimizer: Literal["sgd", "adam", "adamw"] = key("adam", "The optimizer; Adam as published.")
        init_lr: float = key(5e-4, "Learning rate in the first task.", gt=0)
        lrate: float = key(5e-4, "Learning rate in every later task.", gt=0)

    @classmethod
    def contradictions(cls, config: Config) -> Iterator[str]:
        yield from super().contradictions(config)
        if config.memory_energy > config.memory_energy_end:
            yield above(config, "memory_energy", "memory_energy_end", "the share rises along the stream")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.bank = KVBank(self.backbone.vit, self.config.backbone_type).to(self.device)
        self.memory = Memory()
        if self.config.rank > self.bank.width:
            raise UserError(f"rank: {self.config.rank} is above the width {self.bank.width} of '{self.config.backbone_type}'; "
                            f"choose a rank between 1 and {self.bank.width}.")

    # ---- the task

    def grow_head(self, task: int) -> None:
        super().grow_head(task)
        self.head.spread(generator(self.seed, "head", task))

    def make_room(self, task: int) -> None:
        super().make_room(task)
        self.bank.add(self.config.rank)

    @torch.no_grad()
    def begin_task(self, task: int) -> None:
        super().begin_task(task)
        rows = []
        for layer, moments in enumerate(self._moments("inputs of the task", self.epochs())):
            self.work("directions to learn in", layer, len(self.bank.layers))
            rows.append(directions(self.memory.free(layer, moments), self.config.rank, moments.norm()))
        self.bank.aim(torch.stack(rows).to(self.bank.new_A))
        distributed.copy_from_main([self.bank.new_A])

    def groups(self) -> list[dict]:
        return [{"params": [*self.bank.new_B, *self.head.trainable()]}]

    def settle(self) -> None:
        self.bank.commit()

    def end_task(self) -> TaskReport:
        super().end_task()
        self._remember()
        return TaskReport(active_adapters=self.task + 1)

    @torch.no_grad()
    def _remember(self) -> None:
        """Takes the inputs of the finished task into the memory."""
        config, tasks = self.config, self.data.nb_tasks
        share = config.memory_energy + (config.memory_energy_end - config.memory_energy) * self.task / tasks
        bases, kept = [], []
        for layer, moments in enumerate(self._moments("inputs of the finished task", self.epochs() + 1)):
            self.work("memory of directions", layer, len(self.bank.layers))
            old = self.memory.bases[layer].double() if self.memory.kept else None
            basis, complement = grown(old, bool(self.memory.kept) and self.memory.kept[layer], moments, share)
            bases.append(basis.to(self.bank.A))
            kept.append(complement)
        distributed.copy_from_main(bases)
        self.memory.put(bases, kept)

    def _moments(self, title: str, view: int) -> Tensor:
        """`sum x x^T` `[L, d, d]` float64 of the inputs of every layer over one augmented view of the task's images."""
        layers, data, size = self.bank.layers, self.data, self.config.batch_size
        sums = torch.zeros(len(layers), self.bank.width, self.bank.width, dtype=torch.float64, device=self.device)
        steps = data.steps_per_epoch(self.task, size)
        for layer, second in zip(layers, sums, strict=True):
            layer.second = second
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                for batch, (images, labels) in enumerate(data.train_batches(self.task, view, size, part=distributed.part())):
                    self.work(title, batch, steps)
                    if len(labels):
                        self.backbone(images.to(self.bank.A.dtype))
        finally:
            for layer in layers:
                layer.second = None
        distributed.add_up(sums)
        return sums

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.bank, self.memory, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, and the newest adapter: `adapter_task_<task>.safetensors`, A `[L, r, d]` and B `[L, 2d, r]`."""
        path, rank = folder / f"adapter_task_{self.task}.safetensors", self.config.rank
        tensors = {"A": self.bank.A[:, -rank:].float(), "B": self.bank.B[:, :, -rank:].float()}
        write_safetensors(path, tensors, {"task": str(self.task), "backbone": self.backbone.identity.name})
        return [save_head(folder, self.head, self.task), path]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        bank = KVBank(backbone.vit, saved.config.backbone_type)
        for task in range(saved.task + 1):
            bank.store(**saved.tensors(f"adapter_task_{task}.safetensors"))
        bank.merge()
        return SavedNetwork(backbone, None, saved.head(backbone.width))

    def state(self) -> dict[str, Any]:
        memory = {"bases": [basis.detach() for basis in self.memory.bases], "kept": self.memory.kept}
        return {**super().state(), "bank": self.bank.snapshot(), "memory": memory}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.bank.restore(state["bank"])
        self.memory.put([basis.to(self.bank.A) for basis in state["memory"]["bases"]], state["memory"]["kept"])
