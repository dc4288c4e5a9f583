"""The frozen ViT and what is put into it."""

from torch import Tensor, nn

from backbone.class_token import read_all_tokens, read_class_token_alone
from backbone.lora import merged_copy
from backbone.pixels import PIXELS, load_pixels
from backbone.vit import Identity, data_config, load_vit
from utils.config import Config
from utils.errors import UserError


class FrozenViT(nn.Module):
    """A frozen timm ViT: images `[b, 3, S, S]` in, features `[b, d]` out."""

    def __init__(self, vit: nn.Module, identity: Identity, block: int | None = None, image_size: int | None = None) -> None:
        """block: after which the features are read, through the last norm, counted from 1; None is the last.

        image_size: S, where `vit` was built for another than it was pretrained with.
        """
        super().__init__()
        self.vit = vit
        self.identity = identity
        self.width: int = vit.num_features
        pretrained_size, self.mean_std = data_config(vit)
        self.image_size = image_size or pretrained_size
        self.early_block = max(1, len(vit.blocks) // 6)
        if block is not None:
            if block > len(vit.blocks):
                raise UserError(f"backbone_block: {block} is more than the {len(vit.blocks)} blocks of '{identity.name}'; "
                                f"choose at most {len(vit.blocks)}.")
            vit.blocks = vit.blocks[:block]  # nothing after it is computed, trained or stored
            self.early_block = min(self.early_block, block)

    def read_class_token_alone(self) -> None:
        """From here on nothing but the features is read: the last block leaves out what they do not need."""
        read_class_token_alone(self.vit)

    def train(self, mode: bool = True) -> "FrozenViT":
        """Stays in evaluation mode: the backbone is frozen, its dropout and drop-path too."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images)

    def need_blocks(self, instead: str) -> None:
        """Raises UserError, which says what to do `instead`, for a backbone that has none."""
        if not len(self.vit.blocks):
            raise UserError(f"backbone_type: '{self.identity.name}' has no blocks; {instead}.")

    def as_timm(self) -> nn.Module:
        """timm's own network with the same features, adapters merged; raises UserError where timm has none."""
        self.need_blocks("timm does not know it, so export the run as torchscript or onnx")
        vit = merged_copy(self.vit)
        read_all_tokens(vit)
        return vit

    def early_tokens(self, images: Tensor) -> Tensor:
        """Patch tokens `[b, n, d]` after the first sixth of the blocks: what an image looks like rather than what it shows."""
        return self.vit.forward_intermediates(
            images, indices=[self.early_block - 1], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True)[0]


def create_backbone(config: Config, seed: int | None = None) -> FrozenViT:
    """The frozen ViT that `config` names, or the images' own pixels in the place of one; `seed` (default: the config's first)
    makes random weights reproducible."""
    if config.backbone_type == PIXELS:
        return FrozenViT(*load_pixels(config))
    return FrozenViT(*load_vit(config.backbone_type, pretrained=config.pretrained, weights=config.backbone_weights,
                               seed=config.seed[0] if seed is None else seed, image_size=config.image_size),
                     block=config.backbone_block, image_size=config.image_size)
