"""The upper bound: one adapter and one head trained on the images of all tasks at once."""

from typing import Literal

from models.artifacts import SavedNetwork, SavedRun
from models.base import TaskReport
from models.growth import KeepAll, Rule
from models.optimisation import HeadKeys, OptimisationKeys
from models.recipes.base import AlphaKeys, Recipe
from models.recipes.open import Open
from models.rows import RowFitKeys
from models.sdlora import AdapterKeys, SDLoRA
from utils.config import Config, key
from utils.data_manager import DataManager, JoinedStream


class Joint(SDLoRA):
    """A control: one adapter and one head trained on all tasks at once, for `init_epoch` epochs at `init_lr`.

    SD-LoRA on a stream whose single task has all classes. Its run has one record, whose counts cover every task of the real
    stream.
    """

    scenarios = ("class", "domain")

    class Keys(OptimisationKeys, HeadKeys, RowFitKeys, AdapterKeys, AlphaKeys):
        """Joint training"""

        alpha_scope: Literal["layer"] = key("layer", "One magnitude per block and projection.")
        init_alpha: float = key(1.0, "Magnitude that the adapter starts with.", gt=0)

    @classmethod
    def rule(cls, config: Config) -> type[Rule]:
        return KeepAll

    @classmethod
    def stream(cls, data: DataManager) -> DataManager:
        return JoinedStream(data)

    def make_recipe(self) -> Recipe:
        return Open(self)

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        return Open.rebuild(saved)

    def end_task(self) -> TaskReport:
        return TaskReport(active_adapters=super().end_task().active_adapters)  # there was no gate and nothing to decide
