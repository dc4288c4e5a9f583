"""What every class-incremental method offers to the trainer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from backbone import FrozenViT
from models.artifacts import SavedNetwork, SavedRun
from utils.config import Component, Config
from utils.config.rules import show
from utils.data_manager import DataManager
from utils.rng import generator
from utils.runs.progress import Progress


class Session(Protocol):
    """What a learner may ask of the trainer while it learns."""

    progress: Progress

    def evaluate(self) -> float:
        """Accuracy in percent on the test images of every class seen so far."""

    def after_step(self) -> None:
        """To be called between optimizer steps, when `state` is one to go on from: may write a checkpoint, and raises
        utils.runs.signals.Stopped when the run is to stop."""

    def track(self, figures: dict[str, float]) -> None:
        """Takes figures by name, for the trackers of the run if it has any; to be called where figures are read anyway, since
        reading waits for the device."""

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        """To be called between the `total` parts of any other work that may take more than a second: shows it, and raises
        Stopped when the run is to stop. `whole`: the state is one to go on from, and is saved then; otherwise the run goes on
        from the last checkpoint, and does the work again."""


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


class BaseLearner(Component, ABC):
    """One method on one stream. The trainer calls, for every task in turn: begin_task, train, end_task, then `predict`
    on the test images, then save.

    config, seed: the run. data: the stream. backbone: the frozen ViT, which the learner may inject into. session: the run, to
    report to. All three steps of a task may be broken off by `session`: from the state of the last checkpoint they end with
    the same tensors.
    """

    reads_class_token_alone = True  # of the backbone's last block, which is then shortened
    enters_blocks: ClassVar[bool] = True  # changes the network or trains it; False for what reads its features alone
    scenarios: ClassVar[tuple[str, ...]] = ("class",)  # in which it is known to work; not inherited: every method says its own

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.scenarios = vars(cls).get("scenarios", BaseLearner.scenarios)  # what a method takes, one built on it may not

    @classmethod
    def objections(cls, config: Config) -> Iterator[str]:
        if config.scenario not in cls.scenarios:
            yield (f"'scenario' is {show(config.scenario)} but 'model_name' is {show(config.model_name)}, which is made for "
                   f"{' and '.join(map(show, cls.scenarios))} alone; choose a method that docs/METHODS.md lists for it")

    def __init__(self, config: Config, data: DataManager, backbone: FrozenViT, seed: int, session: Session) -> None:
        self.config, self.data, self.seed, self.session = config, data, seed, session
        if self.enters_blocks:
            backbone.need_blocks(f"model_name {show(config.model_name)} works within them, so choose a vision transformer, or "
                                 "a method that only trains a head")
        self.device = data.device
        self.task = -1
        if self.reads_class_token_alone:
            backbone.read_class_token_alone()
        self.backbone = backbone.to(self.device)
        self._features = torch.compile(self.backbone.vit) if config.compile else self.backbone.vit

    @classmethod
    def stream(cls, data: DataManager) -> DataManager:
        """The stream as the method meets it."""
        return data

    @classmethod
    def held_out(cls, config: Config) -> float:
        """Share of every class's training images that the method wants held out as the split `val`."""
        return 0.0

    def announce(self) -> None:
        """Logs what is particular to the method, once at the start of a run."""

    @abstractmethod
    def make_room(self, task: int) -> None:
        """The first part of `begin_task`: room for the classes of `task`, and all that it trains. Looks at no image."""

    def begin_task(self, task: int) -> None:
        """Gets ready to learn `task`."""
        self.make_room(task)

    @abstractmethod
    def train(self) -> None:
        """Learns the current task, from where `load_state` left it: returns at once if that was its end."""

    def steps_in(self, task: int) -> int:
        """Optimizer steps that `task` is trained for, which the progress display counts."""
        return 0

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

    def represent(self, images: Tensor) -> Tensor:
        """Features `[b, k]` that `predict` reads, after `start_evaluation`: by the network that is evaluated, whatever it
        chooses for an image."""
        return self.embed(images)

    @abstractmethod
    def modules(self) -> list[nn.Module]:
        """What is stored for the method besides the frozen backbone."""

    # ---- what is left behind

    @abstractmethod
    def save(self, folder: Path) -> list[Path]:
        """Writes the artifacts of the current task into `folder` (METHOD.md, section 5); returns their paths."""

    @classmethod
    @abstractmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        """The network that was evaluated after a task, from what `save` wrote: all files of that task have to be read."""

    @classmethod
    def load(cls, folder: str | Path, task: int) -> SavedNetwork:
        """`rebuild` from the run in `folder`, which has finished `task`, in float32.

        Raises UserError if a file is missing or not, to the bit, what the run wrote, if the backbone's weights are not those
        of the run, or if what comes out is another network than the one that the run evaluated.
        """
        saved = SavedRun(folder, task, cls.reads_class_token_alone)
        network = cls.rebuild(saved)
        saved.check(network)
        return network

    def probe(self) -> list[list[float]]:
        """Logits of two images of noise: kept with the run, so that `load` can tell whether it has all of the network."""
        size = self.backbone.image_size
        images = torch.rand(2, 3, size, size, generator=generator(0, "probe")).to(self.device)
        self.start_evaluation()
        return self.predict(images).float().tolist()

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Everything learned so far, as tensors and plain Python values; between tasks or optimizer steps."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """The learner as it was at `state`. Called on a new one, without `begin_task`; within a task `train` and `end_task`
        follow."""

    # ---- shared by all

    def embed(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """Features `[b, d]` in the images' precision; the backbone runs under autocast with `precision` bf16.

        network: what takes the place of the whole backbone."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            features = (network or self._features)(images)
        return features.to(images.dtype)

    def trainable_parameters(self) -> int:
        """Number of scalars that the current task trains."""
        return sum(p.numel() for module in self.modules() for p in module.parameters() if p.requires_grad)

    def stored_tensors(self) -> list[Tensor]:
        """Tensors kept for the stream, the frozen backbone excluded."""
        return [t for module in self.modules() for t in [*module.parameters(), *module.buffers()]]
