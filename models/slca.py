"""SLCA: slow learner with classifier alignment (Zhang, Wang, Kang, Chen & Wei, ICCV 2023, arXiv 2303.05118).

Slow learner: every task trains the whole network, at `backbone_lr_scale` of the head's rate, and its head rows, cross-entropy
over its classes. Classifier alignment: mean and covariance of each class's features are stored when it is learned; after each
task from the second on all rows are trained on samples of `N((0.9 + 0.1 (i + 1) / (t + 1)) mean, covariance)`, i being the
class's task and t the current one, through logits over the mean norm of the tasks' logits (equation 6). The next task goes on
with the rows as they were before that.

As in the official code, GengDavid/SLCA at 169d4e6, from which the factor on the means, the return of the rows and the 1e-4 I
on the covariances come. Not as there: it starts the network's last norm anew (weight 1, bias 0); here that is pretrained too.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone.heads.aligned import OfficialHead
from backbone.heads.linear import Pause
from models.artifacts import SavedNetwork, SavedRun, save_head
from models.optimisation import LaterTaskKeys, OptimisationKeys, learning_rate
from models.training import GradientLearner
from utils.config import Config, key
from utils.runs.files import write_safetensors


class ReturningHead(OfficialHead):
    """The aligned head as SLCA has it.

    weight, bias: rows as their tasks trained them; aligned_weight, aligned_bias: those that answer between tasks.
    """

    STATISTICS = (*OfficialHead.STATISTICS, "aligned_weight", "aligned_bias")

    def __init__(self, width: int, config: Config, seed: int) -> None:
        super().__init__(width, config, seed)
        self.register_buffer("aligned_weight", torch.zeros(0, width))
        self.register_buffer("aligned_bias", torch.zeros(0))

    def centres(self) -> Tensor:
        return self.shrunk()

    def align(self, task: int, pause: Pause) -> None:
        self.keep(self.weight, self.bias)
        super().align(task, pause)

    def keep(self, weight: Tensor, bias: Tensor) -> None:
        self.aligned_weight, self.aligned_bias = weight, bias

    def rows(self) -> tuple[Tensor, Tensor]:
        """While a task is learned, rows as they are trained."""
        if self.new_weight is None and len(self.aligned_weight) == len(self.weight):
            return self.aligned_weight, self.aligned_bias
        return super().rows()


class SLCA(GradientLearner):
    """The whole network trained at a hundredth of the head's rate; then the head on samples from Gaussians of all classes."""

    class Keys(OptimisationKeys, LaterTaskKeys):
        """Slow learner with classifier alignment"""

        backbone_lr_scale: float = key(
            0.01, "Learning rate of the network over that of the head rows; 0 keeps it as pretrained.", ge=0)
        align_epochs: int = key(5, "Epochs of training the whole head after each task but the first; 0 leaves it.", ge=0)
        align_samples: int = key(256, "Features drawn per class and epoch, and the size of a batch of them.", ge=1)
        align_lr: float = key(0.01, "Learning rate of this at the start; it falls along a cosine.", gt=0)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.slow = self.config.backbone_lr_scale > 0
        self.backbone.requires_grad_(self.slow)

    def make_head(self) -> ReturningHead:
        return ReturningHead(self.backbone.width, self.config, self.seed)

    def groups(self) -> list[dict]:
        rate = learning_rate(self.config, self.task) * self.config.backbone_lr_scale
        network = [{"params": list(self.backbone.parameters()), "lr": rate}] if self.slow else []
        return [*network, {"params": self.head.trainable()}]

    # ---- what is stored

    def modules(self) -> list[nn.Module]:
        return [self.backbone, self.head] if self.slow else [self.head]

    def save(self, folder: Path) -> list[Path]:
        """The head and the whole network, `backbone_task_<task>.safetensors`."""
        written = [save_head(folder, self.head, self.task)]
        if self.slow:
            path = folder / f"backbone_task_{self.task}.safetensors"
            write_safetensors(path, self.backbone.vit.state_dict(), {"task": str(self.task)})
            written.append(path)
        return written

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        if saved.config.backbone_lr_scale > 0:
            backbone.vit.load_state_dict(saved.tensors(f"backbone_task_{saved.task}.safetensors"))
        return SavedNetwork(backbone, None, saved.head(backbone.width))

    def state(self) -> dict[str, Any]:
        network = {name: tensor.clone() for name, tensor in self.backbone.vit.state_dict().items()} if self.slow else {}
        return {**super().state(), "network": network}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        if self.slow:
            self.backbone.vit.load_state_dict(state["network"])
