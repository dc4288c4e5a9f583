"""What the methods share that prompt a frozen network, and train prompts and head."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FrozenViT
from backbone.prompts import QueriedViT
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.training import GradientLearner
from utils.config import Config
from utils.runs.files import write_safetensors


class PromptLearner(GradientLearner):
    """A frozen network that is prompted for every image by what it makes of the image alone: two forwards, of which the first
    needs no gradient."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        network = self.network_of(self.config, self.backbone)
        self.pool = network.pool.to(self.device)
        self._look = torch.compile(network.look) if self.config.compile else network.look

    @classmethod
    @abstractmethod
    def network_of(cls, config: Config, backbone: FrozenViT) -> QueriedViT:
        """The network with a pool that has learned nothing."""

    def groups(self) -> list[dict]:
        return [{"params": [*self.pool.parameters(), *self.head.trainable()], "name": "prompts and head"}]

    def look(self, images: Tensor, **choice: Any) -> tuple[Tensor, Tensor]:
        """As `QueriedViT.look`, in the run's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            features, cosines = self._look(images, **choice)
        return features.to(cosines.dtype), cosines

    def embed(self, images: Tensor) -> Tensor:
        return self.look(images)[0]

    def pulled(self, images: Tensor, targets: Tensor, **choice: Any) -> tuple[Tensor, Tensor]:
        """As `loss`: cross-entropy less `pull_constraint_coeff` times the cosines of queries and chosen keys."""
        features, cosines = self.look(images, **choice)
        logits = self.head.current_logits(features)
        pull = self.config.pull_constraint_coeff * cosines.sum()
        return F.cross_entropy(logits, targets, reduction="sum") - pull, logits

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.pool, self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head, and in `prompts_task_<task>.safetensors` what the task has left in the pool."""
        path = folder / f"prompts_task_{self.task}.safetensors"
        tensors = {name: tensor.float() for name, tensor in self.pool.to_file(self.task).items()}
        write_safetensors(path, tensors, {"task": str(self.task), "backbone": self.backbone.identity.name})
        return [save_head(folder, self.head, self.task), path]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        network = cls.network_of(saved.config, backbone)
        network.pool.from_files([saved.tensors(f"prompts_task_{task}.safetensors")
                                 for task in network.pool.files_of(saved.task)])
        return SavedNetwork(network, None, saved.head(backbone.width))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "pool": self.pool.snapshot()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.pool.restore(state["pool"])
