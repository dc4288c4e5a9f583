"""A network a hundred times smaller than the embedded one, for tests in which no accuracy matters; importing adds it to timm.

It has no pretrained weights: what it makes of an image is random, follows the seed, and differs from image to image.
"""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

NAME = "vit_of_tests_patch8_16"
TINY = {"backbone_type": NAME, "pretrained": False}  # of a config
WIDTH, BLOCKS = 32, 2
MAIN = "import sys, tests.tiny_backbone; from main import main; sys.exit(main())"  # `python -c` of it is main.py with it

default_cfgs = generate_default_cfgs({NAME: {
    "input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bicubic", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0),
    "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"}})


@register_model
def vit_of_tests_patch8_16(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """ViT for 16 x 16 images: 4 patches of 8 x 8 and a class token, 2 blocks, width 32, 2 heads."""
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": BLOCKS, "num_heads": 2}
    return build_model_with_cfg(VisionTransformer, NAME, pretrained, **(shape | kwargs))
