"""What every class-incremental method offers to the trainer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backbone import FrozenViT
from utils.config import Config, refuse_inactive
from utils.data_manager import DataManager
from utils.runs.progress import Progress


class Session(Protocol):
    """What a learner may ask of the trainer while it learns a task."""

    def evaluate(self) -> float:
        """Accuracy in percent on the test images of every class seen so far."""

    def after_step(self) -> None:
        """To be called between optimizer steps, when `state` is one to go on from: may write a checkpoint, and raises
        utils.runs.signals.Stopped when the run is to stop."""


@dataclass(frozen=True)
class TaskReport:
    """What a method did with a task, for the log, the table and `results.json`; None where it has no gate or adapters."""

    kept: bool | None = None
    beta: float | None = None
    beta_values: list[float] | None = None
    beta_after: list[float] | None = None
    pruning_mask: list[int] | None = None
    evicted: list[int] = field(default_factory=list)
    active_adapters: int = 0
    numbers: dict[str, float] = field(default_factory=dict)  # what else the growth rule looked at


class BaseLearner(ABC):
    """One method on one stream. The trainer calls, for every task in turn: begin_task, train, end_task, then `predict`
    on the test images, then save.

    config, seed: the run. data: the stream. backbone: the frozen ViT, which the learner may inject into. progress: where
    training reports to. `inactive` names the config keys that have no effect for the method; setting one to anything but
    its default is refused.
    """

    inactive: frozenset[str] = frozenset()
    trains = True  # by gradient steps, which the progress display counts

    def __init__(self, config: Config, data: DataManager, backbone: FrozenViT, seed: int, progress: Progress) -> None:
        self.config, self.data, self.seed, self.progress = config, data, seed, progress
        self.device = data.device
        self.task = -1
        self.backbone = backbone.to(self.device)
        self._features = torch.compile(self.backbone) if config.compile else self.backbone

    @classmethod
    def stream(cls, data: DataManager) -> DataManager:
        """The stream as the method meets it."""
        return data

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises UserError for a config key that does nothing for this method."""
        refuse_inactive(config, config.model_name, cls.inactive)

    def announce(self) -> None:
        """Logs what is particular to the method, once at the start of a run."""

    @abstractmethod
    def begin_task(self, task: int) -> None:
        """Makes room for the classes of `task`."""

    @abstractmethod
    def train(self, session: Session) -> None:
        """Learns the current task, from where `load_state` left it."""

    def steps_done(self) -> int:
        """Optimizer steps of the current task so far."""
        return 0

    @abstractmethod
    def end_task(self) -> TaskReport:
        """Settles the current task; from here on the network is the one that is evaluated and saved."""

    def start_evaluation(self) -> None:
        """Called once before a series of `predict`."""

    @abstractmethod
    def predict(self, images: Tensor) -> Tensor:
        """Logits `[b, classes seen]` for images `[b, 3, S, S]`."""

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Writes the artifacts of the current task into `folder` (METHOD.md, section 5); returns their paths."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything learned so far, as tensors and plain Python values; between tasks or optimizer steps."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The learner as it was at `state`."""

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What is stored for the method besides the frozen backbone."""

    def embed(self, images: Tensor) -> Tensor:
        """Features `[b, d]` in the backbone's precision; it runs under autocast with `precision` bf16."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            features = self._features(images)
        return features.to(next(self.backbone.parameters()).dtype)

    def trainable_parameters(self) -> int:
        """Number of scalars that the current task trains."""
        return sum(p.numel() for module in self.modules() for p in module.parameters() if p.requires_grad)

    def stored_tensors(self) -> list[Tensor]:
        """Tensors kept for the stream, the frozen backbone excluded."""
        return [t for module in self.modules() for t in [*module.parameters(), *module.buffers()]]
