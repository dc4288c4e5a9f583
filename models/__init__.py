"""One file per class-incremental method; `LEARNERS` maps a config's `model_name` to its class."""

from pathlib import Path

from backbone.heads import HEADS
from models.aper import APER
from models.artifacts import SavedNetwork, SavedRun
from models.base import BaseLearner, TaskReport
from models.cl_lora import CLLoRA
from models.codaprompt import CODAPrompt
from models.dualprompt import DualPrompt
from models.ease import EASE
from models.finetune_head import FinetuneHead
from models.growth import RULES
from models.inflora import InfLoRA
from models.joint import Joint
from models.l2p import L2P
from models.litelora import LiteLoRA
from models.mos import MOS
from models.ranpac import RanPAC
from models.recipes import GATES, INFERENCE
from models.sdlora import SDLoRA
from models.sema import SEMA
from models.simplecil import SimpleCIL
from models.slca import SLCA
from models.tuna import TUNA
from utils import config

LEARNERS: dict[str, type[BaseLearner]] = {
    "sdlora": SDLoRA,
    "litelora": LiteLoRA,
    "finetune_head": FinetuneHead,
    "simplecil": SimpleCIL,
    "joint": Joint,
    "l2p": L2P,
    "dualprompt": DualPrompt,
    "codaprompt": CODAPrompt,
    "ranpac": RanPAC,
    "aper": APER,
    "slca": SLCA,
    "ease": EASE,
    "inflora": InfLoRA,
    "cl_lora": CLLoRA,
    "sema": SEMA,
    "mos": MOS,
    "tuna": TUNA,
}

config.register(model_name=LEARNERS, gate=GATES, inference=INFERENCE, head=HEADS, growth_rule=RULES)


def load_network(folder: str | Path, task: int | None = None) -> SavedNetwork:
    """The network that was evaluated after `task` (default: the newest), from the files of the run in `folder`; see
    `BaseLearner.load`."""
    saved = SavedRun(folder, task)
    return LEARNERS[saved.config.model_name].load(folder, saved.task)


__all__ = ["LEARNERS", "BaseLearner", "SavedNetwork", "TaskReport", "load_network"]
