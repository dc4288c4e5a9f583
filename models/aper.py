"""APER with adapter: one adapter, then class means (Zhou, Cai, Ye, Zhan & Liu, IJCV 2024, arXiv 2303.07338; earlier ADAM).

Adapt, first task alone: an adapter and proxy rows, cross-entropy. Merge, every task: the class means of `[f(x); f_0(x)]`, the
features of the network as it was pretrained and with the adapter, side by side; an image goes to the mean with the largest
cosine (equations 5 and 6). As in the official code, zhoudw-zdw/RevisitingCIL at a2e6b71. Every image needs two forwards.
"""

from torch import Tensor

from backbone.heads.proxy import PrototypeHead
from models.adapted import FirstTaskLearner


class APER(FirstTaskLearner):
    """An adapter trained on the first task, then the nearest class mean by cosine on pretrained and adapted features."""

    scenarios = ("class", "domain")

    class Keys(FirstTaskLearner.Keys):
        """APER"""

    def make_head(self) -> PrototypeHead:
        return PrototypeHead(self.backbone.width, self.config, self.seed, networks=2)

    @classmethod
    def networks(cls, adapters: int) -> list[int | None]:
        return [None, 0]  # as pretrained, and with the adapter

    def features(self, images: Tensor) -> Tensor:
        return self.embed(images) if self.head.training_rows else super().features(images)
