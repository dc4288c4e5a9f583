"""backbone/pixels.py: the images themselves in the place of a network, for methods that only train a head."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from backbone import create_backbone
from backbone.pixels import PIXELS
from models import LEARNERS, load_network
from tests.helpers import learner_of, method_values, test_images
from trainer import Run
from utils.config import Config, config_from_dict
from utils.errors import UserError

OF_HEADS_ALONE = ["finetune_head", "simplecil"]
WIDTH = 3 * 16**2


def config_of(name: str, folder: Path | str = "./unused/", **changes) -> Config:
    values = {"backbone_type": PIXELS, "pretrained": True, "image_size": 16, "batch_size": 64, **changes}
    return config_from_dict({**method_values(name), **values, "filepath": str(folder)})


def test_features_are_the_pixels_at_the_asked_for_size() -> None:
    images = torch.rand(2, 3, 16, 16)
    backbone = create_backbone(config_of("simplecil"))
    assert torch.equal(backbone(images), images.reshape(2, WIDTH)) and backbone.width == WIDTH
    assert (backbone.identity.name, backbone.identity.source, backbone.identity.parameters) == (PIXELS, "none", 0)
    usual = create_backbone(config_of("simplecil", image_size=None, normalize="backbone"))
    assert (usual.image_size, usual.width, usual.mean_std) == (32, 3 * 32**2, ((0.0,) * 3, (1.0,) * 3))


@pytest.mark.parametrize("name, changes", [
    ("simplecil", {}), ("simplecil", {"forward_transfer": True, "precision": "bf16"}),
    ("finetune_head", {"head": "ridge", "ridge_dim": 50}), ("finetune_head", {"head": "cosine"})])
def test_methods_that_only_train_a_head_run_on_them(name: str, changes: dict, tmp_path: Path) -> None:
    run = Run(config_of(name, tmp_path, **changes), 1993, tmp_path, torch.device("cpu"))
    result = run.finish()
    last = result["tasks"][-1]
    assert result["backbone"]["parameters"] == 0 and last["active_adapters"] == 0
    assert last["stored_parameters"] == sum(tensor.numel() for tensor in run.learner.stored_tensors()) >= 4 * 50
    network, images = load_network(tmp_path), test_images(run.learner)
    run.learner.start_evaluation()
    assert torch.equal(network(images), run.learner.predict(images)) and last["seen_classes"] == 4
    with pytest.raises(UserError, match="^backbone_type: 'pixels' has no blocks; .* torchscript or onnx"):
        network.as_timm()


def test_the_class_means_are_those_of_the_pixels(tmp_path: Path) -> None:
    run = Run(config_of("simplecil", tmp_path), 1993, tmp_path, torch.device("cpu"))
    run.finish()
    data, cells = run.data, range(4)
    (images, labels), = data.eval_batches("train", cells, 10_000)
    means = torch.stack([F.normalize(images[labels == label].flatten(1).mean(0), dim=0) for label in cells])
    (tested, truth), = data.eval_batches("test", cells, 10_000)
    answers = (F.normalize(tested.flatten(1), dim=1) @ means.T).argmax(1)
    assert sum(run.records[-1]["counts"]["top1"]) == (answers == truth).sum() > 0.8 * len(truth)
    assert run.records[-1]["stored_parameters"] == 4 * WIDTH


@pytest.mark.parametrize("name", LEARNERS)
def test_methods_that_go_into_the_network_refuse_them(name: str) -> None:
    if name in OF_HEADS_ALONE:
        assert learner_of(config_of(name)).backbone.width == WIDTH
        return
    message = f"^backbone_type: 'pixels' has no blocks; model_name \"{name}\" works within them, so choose a vision"
    with pytest.raises(UserError, match=message) as error:
        learner_of(config_of(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [("pretrained", False), ("backbone_weights", "w.pth"), ("backbone_block", 1)])
def test_keys_about_weights_and_blocks_are_refused(key: str, value: object) -> None:
    with pytest.raises(UserError, match=f"^{key}: backbone_type 'pixels' has neither weights nor blocks; leave the key out"):
        create_backbone(config_of("simplecil", **{key: value}))
