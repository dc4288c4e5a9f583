"""The floor under every backbone: no network, an image's feature is its own pixels.

Shapes: b images, S x S pixels.
"""

from torch import Tensor, nn

from backbone.vit import Identity, weights_sha256
from utils.config import Config
from utils.errors import UserError

PIXELS = "pixels"
_SIZE = 32  # pixels of the square input where the config does not say
_WITHOUT = {"pretrained": True, "backbone_weights": None, "backbone_block": None}  # keys that mean nothing here


class Pixels(nn.Module):
    """Images `[b, 3, S, S]` to features `[b, 3 S^2]`, where a timm network would be; without weights and without blocks."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features, self.blocks = 3 * size**2, nn.Sequential()
        self.pretrained_cfg = {"input_size": (3, size, size), "mean": (0.0,) * 3, "std": (1.0,) * 3}

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def load_pixels(config: Config) -> tuple[Pixels, Identity]:
    """As `load_vit`; raises UserError for a key about weights or blocks."""
    for key, usual in _WITHOUT.items():
        if getattr(config, key) != usual:
            raise UserError(f"{key}: backbone_type '{PIXELS}' has neither weights nor blocks; leave the key out.")
    pixels = Pixels(config.image_size or _SIZE)
    return pixels, Identity(PIXELS, "", "none", weights_sha256(pixels.state_dict()), 0)
