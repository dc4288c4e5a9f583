"""`HEADS` maps a config's `head` to its class; every head works with every gate."""

from backbone.heads.aligned import AlignedHead
from backbone.heads.cosine import CosineHead
from backbone.heads.linear import GrowingHead
from backbone.heads.ridge import RidgeHead

HEADS: dict[str, type[GrowingHead]] = {kind.kind: kind for kind in (GrowingHead, CosineHead, AlignedHead, RidgeHead)}
