"""One file per class-incremental method; `LEARNERS` maps a config's `model_name` to its class."""

from models.artifacts import SavedNetwork, load_network
from models.base import BaseLearner, TaskReport
from models.controls import FinetuneHead, SimpleCIL
from models.joint import Joint
from models.sdlora import SDLoRA

LEARNERS: dict[str, type[BaseLearner]] = {
    "sdlora": SDLoRA,
    "finetune_head": FinetuneHead,
    "simplecil": SimpleCIL,
    "joint": Joint,
}

__all__ = ["LEARNERS", "BaseLearner", "SavedNetwork", "TaskReport", "load_network"]
