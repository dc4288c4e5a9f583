"""The upper bound: one adapter and one head trained on the images of all tasks at once."""

from models.base import TaskReport
from models.controls import GATE_KEYS, GROWTH_KEYS
from models.sdlora import SDLoRA
from utils.config import Config
from utils.data_manager import DataManager, JoinedStream


class Joint(SDLoRA):
    """SD-LoRA on a stream whose single task has all classes: `init_epoch` epochs at `init_lr`, the gate open.

    Its run has one record, whose counts cover every task of the real stream.
    """

    inactive = GATE_KEYS | GROWTH_KEYS | frozenset({"epochs", "lrate", "rank_schedule"})

    def __init__(self, config: Config, *args, **kwargs) -> None:
        super().__init__(config.model_copy(update={"gate": "none", "growth_rule": "none"}), *args, **kwargs)

    def end_task(self) -> TaskReport:
        return TaskReport(active_adapters=super().end_task().active_adapters)  # there was no gate and nothing to decide

    @classmethod
    def stream(cls, data: DataManager) -> DataManager:
        return JoinedStream(data)
