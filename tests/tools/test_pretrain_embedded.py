"""tools/pretrain_embedded.py: what it trains on, that it learns and repeats itself, and what it refuses."""

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from backbone.embedded import EMBEDDED, WEIGHTS
from tools import pretrain_embedded as pretraining
from utils.data.digits import load_digits
from utils.data.glyphs import CHARACTERS, SEED, TEST_FACES, TRAIN_FACES, render
from utils.errors import UserError


@pytest.mark.slow
def test_frozen_features_are_good_but_leave_room():
    shipped = timm.create_model(EMBEDDED, pretrained=True, num_classes=0).eval()
    glyphs = render(CHARACTERS, TRAIN_FACES, 1, SEED) + render(CHARACTERS, TEST_FACES, 2, SEED)  # part of the data set
    assert 40 < pretraining.nearest_class_mean(shipped, *glyphs) < 80
    train, train_labels, test, test_labels, _ = load_digits()
    assert pretraining.nearest_class_mean(shipped, train[::3], train_labels[::3], test, test_labels) > 70


def test_the_shipped_file_was_not_trained_on_classes_of_the_data_sets():
    with safetensors.safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
    assert not set(metadata["characters"]) & set(CHARACTERS + pretraining.DIGITS)


@pytest.mark.slow
def test_pretraining_leaves_out_the_classes_and_what_looks_like_them():
    characters = pretraining.pretraining_characters()
    assert len(characters) == len(set(characters)) >= 200
    same_as_classes = "АВЕКМНОРСТХ" "ΑΒΕΖΗΙΚΜΝΟΡΤΧ" "ocsvwxzO" "l|І" "ÀÉñçÅ" "½²③" "З"
    assert not set(characters) & set(CHARACTERS + pretraining.DIGITS + same_as_classes)


def test_alike_is_what_the_eye_says_in_some_face():
    alike = pretraining._alike(["A", "А", "Ж", "c", "C", "\u2000"])
    assert alike[0, 1] and alike[3, 4] and alike[5, 5]
    assert not alike[0, [0, 2, 3, 4]].any() and not alike[2, 3:].any()


def test_training_learns_and_repeats_itself():
    drawn = render("Ж.", TRAIN_FACES[:6], 3, 0)
    models = [pretraining.fresh_model(2, seed=3) for _ in range(2)]
    for model in models:
        pretraining.train(model, lambda _: drawn, epochs=5, batch_size=9, lr=1e-3, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
    assert pretraining.accuracy(models[0], *drawn) > 90


def test_the_seed_draws_the_first_weights_and_not_the_global_stream():
    first, again, other = (pretraining.fresh_model(2, seed).pos_embed for seed in (3, 3, 4))
    state = torch.get_rng_state()
    pretraining.fresh_model(2, 3)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


class Pixels(nn.Module):
    """Stands for a backbone: the first two pixels are the feature."""

    def forward_features(self, images):
        return images[:, 0, 0, :2]

    def forward_head(self, features, pre_logits):
        return features


def test_nearest_class_mean_by_hand():
    train = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    train[[0, 1], 0, 0, 0], train[[2, 3], 0, 0, 1] = 200, 100
    test = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    test[:, 0, 0, :2] = torch.tensor([[10, 9], [9, 10], [255, 0], [200, 150]])
    labels = np.array([0, 0, 0, 1])  # the second and the fourth are on the other side of the diagonal
    assert pretraining.nearest_class_mean(Pixels(), train, np.array([0, 0, 1, 1]), test, labels) == 50.0


def test_save_leaves_out_the_head_and_can_be_loaded(tmp_path):
    model, path = pretraining.fresh_model(3, seed=0), tmp_path / "new" / "small.safetensors"
    pretraining.save(model, path, {"seed": "0"})
    loaded = timm.create_model(EMBEDDED, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(path)})
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert [entry.name for entry in path.parent.iterdir()] == ["small.safetensors"]


def test_save_says_that_a_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: .*file/x.safetensors cannot be written"):
        pretraining.save(pretraining.fresh_model(2, 0), tmp_path / "file" / "x.safetensors", {})


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "--epochs must be above 0, not 0"),
        (["--per-face", "-1"], "--per-face must be above 0, not -1"),
        (["--jitter", "2"], "--jitter must be between 0 and 1, not 2.0"),
        (["--lr", "nan"], "--lr must be above 0, not nan"),
        (["--out", "weights.pth"], "--out must name a .safetensors file, not 'weights.pth'"),
        (["--finetune"], "--finetune only measures a file: give --evaluate with it"),
        (["--evaluate", "--out", "missing.safetensors"], "missing.safetensors is not a readable safetensors file"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert pretraining.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_network_is_not_measured(capsys, tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"cls_token": torch.zeros(1, 1, 8)}, path)
    assert pretraining.main(["--evaluate", "--out", str(path)]) == 2
    assert f"other.safetensors holds other weights than those of {EMBEDDED}" in capsys.readouterr().err
