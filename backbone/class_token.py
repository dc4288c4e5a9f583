"""The last block of a ViT that is read at its class token alone.

Shapes: b images, N tokens, d width. A network pooled by its class token throws the last block's other N - 1 outputs away, and
within a block only attention mixes tokens. So the last block's MLP, two thirds of the block's multiplications, need not see
them: same features, about a twentieth less work for a ViT-B/16 in training and in evaluation.
"""

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class ClassTokenBlock(Block):
    """A timm block, with that block's own layers under their own names, that gives out its class token: `[b, 1, d]`. Made by
    `read_class_token_alone`."""

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))))[:, :1]  # (16, 197, 768) -> (16, 1, 768)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def read_class_token_alone(vit: nn.Module) -> None:
    """Puts a `ClassTokenBlock` in place of the last block, if that changes no feature; any other network stays as it is.

    Only for what is known to the letter: timm's own VisionTransformer of its own blocks, pooled by the class token.
    """
    known = type(vit) is VisionTransformer and vit.global_pool == "token" and getattr(vit, "attn_pool", None) is None
    if known and vit.cls_token is not None and len(vit.blocks) > 1 and type(vit.blocks[-1]) is Block:
        vit.blocks[-1] = _as(ClassTokenBlock, vit.blocks[-1])


def read_all_tokens(vit: nn.Module) -> None:
    """Takes back what `read_class_token_alone` has done, if it has."""
    if isinstance(getattr(vit, "blocks", [None])[-1], ClassTokenBlock):
        vit.blocks[-1] = _as(Block, vit.blocks[-1])


def _as(kind: type[Block], block: Block) -> Block:
    """A block of this kind with the layers of another."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    for name, layer in block.named_children():
        made.add_module(name, layer)
    return made.train(block.training)
