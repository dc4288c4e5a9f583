"""Keys `backbone_block` and `image_size`: which block's class token is read, and at how many pixels."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from backbone import FrozenViT, create_backbone
from tests.helpers import learn, learner_of, logits, resumed, same, tiny_config
from tests.tiny_backbone import BLOCKS, NAME, WIDTH
from utils.errors import UserError

EMBEDDED = "vit_glyph_tiny_patch8_32"


def embedded(**changes: object) -> FrozenViT:
    return create_backbone(tiny_config(backbone_type=EMBEDDED, pretrained=True, **changes))


def images(size: int) -> torch.Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shortened", [False, True])
@pytest.mark.parametrize("block", [1, 2, 5, 6])
@torch.no_grad()
def test_features_are_the_normed_class_token_after_the_block(block: int, shortened: bool) -> None:
    whole = embedded().vit
    (_, prefix), = whole.forward_intermediates(images(32), indices=[block - 1], norm=True, return_prefix_tokens=True,
                                               intermediates_only=True)
    backbone = embedded(backbone_block=block)
    if shortened:
        backbone.read_class_token_alone()
    torch.testing.assert_close(backbone(images(32)), prefix[:, 0])


@torch.no_grad()
def test_the_last_is_the_default() -> None:
    assert torch.equal(embedded()(images(32)), embedded(backbone_block=6)(images(32)))


@torch.no_grad()
def test_what_an_image_looks_like_does_not_depend_on_it() -> None:
    torch.testing.assert_close(embedded(backbone_block=3).early_tokens(images(32)), embedded().early_tokens(images(32)))


def test_adapters_sit_in_the_blocks_that_are_read() -> None:
    learner, whole = learner_of(tiny_config(backbone_block=1, nb_tasks=2)), learner_of(tiny_config(nb_tasks=2))
    for each in (learner, whole):
        each.begin_task(0)
    assert learner.bank.new_B.numel() * BLOCKS == whole.bank.new_B.numel()
    learner.train()
    learner.end_task()
    assert same(learner, resumed(learner)) and torch.isfinite(logits(learner)).all()


def test_a_block_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=f"backbone_block: {BLOCKS + 1} is more than the {BLOCKS} blocks of '{NAME}'"):
        create_backbone(tiny_config(backbone_block=BLOCKS + 1))


@torch.no_grad()
def test_another_image_size_resizes_the_positions_of_a_file(tmp_path: Path) -> None:
    state = timm.create_model(EMBEDDED, pretrained=True, num_classes=0).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    small = embedded(image_size=16, backbone_weights=str(tmp_path / "weights.safetensors"))
    assert small.image_size == 16 and small.vit.pos_embed.shape[1] == 1 + 4
    assert torch.equal(small.vit.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(small.vit.pos_embed, embedded(image_size=16).vit.pos_embed)
    assert small(images(16)).shape == (3, small.width)
    assert embedded().image_size == 32


def test_the_stream_gives_images_of_that_size() -> None:
    learner = learner_of(tiny_config(image_size=24))
    assert next(learner.data.train_batches(0, 0, 4))[0].shape == (4, 3, 24, 24)
    learn(learner, range(1))
    assert logits(learner).shape == (32, 2) and learner.backbone.width == WIDTH


@pytest.mark.parametrize("name, size, message", [
    (NAME, 20, "image_size: 20 is not a multiple of 8, .* choose 16 or 24"), (NAME, 5, r"not a multiple of 8, .* choose 8\.$"),
    ("vit_relpos_small_patch16_224", 50, "not a multiple of 16"),
])
def test_a_size_that_cannot_be_is_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_backbone(tiny_config(backbone_type=name, image_size=size))
