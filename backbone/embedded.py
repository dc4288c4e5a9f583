"""The embedded backbone: a small vision transformer whose weights are in this repository.

Importing this module adds it to timm's registry. After that it is an ordinary timm model,
`timm.create_model(EMBEDDED, pretrained=True, num_classes=0)`, that needs no network. `pretrain_embedded.py` makes the
weights; `weights/README.md` says what they are worth.
"""

from pathlib import Path

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

EMBEDDED = "vit_glyph_tiny_patch8_32"
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
_OF_THE_SAME_PARTS = "vit_tiny_patch16_224"  # timm's own; with `SHAPE` it is the same network
WEIGHTS = Path(__file__).parent / "weights" / f"{EMBEDDED}.safetensors"

default_cfgs = generate_default_cfgs(
    {
        EMBEDDED: {
            "file": str(WEIGHTS),
            "input_size": (3, 32, 32),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": (0.0, 0.0, 0.0),  # pretrained on images in 0..1 as they are
            "std": (1.0, 1.0, 1.0),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "description": "pretrained on rendered characters by tools/pretrain_embedded.py",
        }
    }
)


@register_model
def vit_glyph_tiny_patch8_32(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """ViT for 32 x 32 images in 0..1: 16 patches of 8 x 8 and a class token, 6 blocks, width 128, 4 heads."""
    return build_model_with_cfg(
        VisionTransformer, EMBEDDED, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(SHAPE | kwargs)
    )


def with_timm_alone(name: str) -> tuple[str, dict[str, int]]:
    """The model name and arguments with which timm, where nothing of this repository is, makes the network `name`."""
    return (_OF_THE_SAME_PARTS, dict(SHAPE)) if name == EMBEDDED else (name, {})
