"""A control: the frozen backbone with a trained head."""

from pathlib import Path

from models.artifacts import SavedNetwork, SavedRun, save_head
from models.optimisation import learning_rate
from models.training import GradientLearner


class FinetuneHead(GradientLearner):
    """A control: the frozen backbone with the head alone, trained as SD-LoRA trains its head; what adapters must beat."""

    enters_blocks = False
    scenarios = ("class", "domain")

    def groups(self) -> list[dict]:
        return [{"params": self.head.trainable(), "lr": learning_rate(self.config, self.task), "name": "head"}]

    def save(self, folder: Path) -> list[Path]:
        return [save_head(folder, self.head, self.task)]

    @classmethod
    def rebuild(cls, saved: SavedRun) -> SavedNetwork:
        backbone = saved.backbone()
        return SavedNetwork(backbone, None, saved.head(backbone.width))
