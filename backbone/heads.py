"""`HEADS` maps a config's `head` to its class; every head works with every gate."""

from backbone.aligned_head import AlignedHead
from backbone.cosine_head import CosineHead
from backbone.head import GrowingHead
from backbone.ridge_head import RidgeHead

HEADS: dict[str, type[GrowingHead]] = {kind.kind: kind for kind in (GrowingHead, CosineHead, AlignedHead, RidgeHead)}
