"""The data sets that need no files: `glyphs` (rendered) and `digits` (scikit-learn's)."""

import hashlib

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as read_digits
from torch.nn import functional

from utils.data import digits, glyphs
from utils.errors import UserError


@pytest.fixture(scope="module")
def glyph_set():
    return glyphs.load_glyphs()


@pytest.fixture(scope="module")
def digit_set():
    return digits.load_digits()


def sha256(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()


def test_glyphs_has_a_hundred_classes_of_equal_size(glyph_set):
    train, train_labels, test, test_labels, names = glyph_set
    assert len(names) == len(set(names)) == 100
    assert train.shape == (4800, 3, 32, 32) and test.shape == (2000, 3, 32, 32)
    assert train.dtype == test.dtype == torch.uint8
    assert train_labels.dtype == test_labels.dtype == np.int64
    assert np.array_equal(np.bincount(train_labels), np.full(100, 48))
    assert np.array_equal(np.bincount(test_labels), np.full(100, 20))


def test_glyphs_is_the_same_at_every_call_and_draws_nothing_from_the_global_streams(glyph_set):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = glyphs.load_glyphs()
    assert sha256(again[0]) == sha256(glyph_set[0]) and sha256(again[2]) == sha256(glyph_set[2])
    assert np.array_equal(again[1], glyph_set[1]) and again[4] == glyph_set[4]
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_an_image_does_not_depend_on_what_else_is_drawn(glyph_set):
    train, train_labels, *_, names = glyph_set
    label = names.index("Ж")
    alone, _ = glyphs.render(["Ж"], glyphs.TRAIN_FACES[3:5], glyphs.TRAIN_PER_FACE, glyphs.SEED)
    first = 3 * glyphs.TRAIN_PER_FACE
    assert torch.equal(alone, train[torch.from_numpy(train_labels == label)][first : first + len(alone)])


def test_the_seed_draws_other_images_of_the_same_characters():
    images = [glyphs.render("Ag", glyphs.TRAIN_FACES[:1], 2, seed)[0] for seed in (0, 1)]
    assert not torch.equal(images[0], images[1])


def test_images_of_one_character_in_one_face_differ():
    images, labels = glyphs.render("Q", glyphs.TRAIN_FACES[:1], 6, 0)
    assert len({sha256(image) for image in images}) == 6 and set(labels) == {0}


def test_without_jitter_print_is_clean():
    images, _ = glyphs.render("Q", glyphs.TRAIN_FACES[:1], 3, 0, strength=0.0)
    assert len({sha256(image) for image in images}) == 1
    assert images.min() == 0 and images.max() == 255 and images[0, 0, 0].max() == 0


def test_no_two_images_are_the_same(glyph_set):
    images = torch.cat([glyph_set[0], glyph_set[2]])
    assert len({image.numpy().tobytes() for image in images}) == len(images)


def test_test_faces_are_not_trained_on_and_share_family_and_style_with_faces_that_are():
    assert not set(glyphs.TRAIN_FACES) & set(glyphs.TEST_FACES)
    families = {face.split("-")[0].split("General")[0] for face in glyphs.TRAIN_FACES}
    assert {face.split("-")[0].split("General")[0] for face in glyphs.TEST_FACES} <= families


def test_every_face_draws_every_class_whole_and_unlike_the_others():
    for face in glyphs.FACES:
        assert all(glyphs.has(face, character) for character in glyphs.CHARACTERS), face
        drawings = np.stack([glyphs.drawing(character, face) for character in glyphs.CHARACTERS]).astype(np.float64)
        edges = [drawings[:, 0], drawings[:, -1], drawings[:, :, 0], drawings[:, :, -1]]
        assert not any(edge.any() for edge in edges), f"{face}: ink at the edge, a character may be cut off"
        flat = drawings.reshape(len(drawings), -1)
        flat /= np.linalg.norm(flat, axis=1, keepdims=True)
        assert np.triu(flat @ flat.T, 1).max() < 0.975, face


def test_glyphs_has_no_digits(glyph_set, digit_set):
    assert not set(glyph_set[4]) & set(digit_set[4])


def test_a_face_does_not_claim_characters_that_it_lacks():
    assert glyphs.has("DejaVuSans", "Ա") and not glyphs.has("STIXGeneral", "Ա")
    images, labels = glyphs.render(["Ա", "A"], ["DejaVuSans", "STIXGeneral"], 2, 0)
    assert labels.tolist() == [0, 0, 1, 1, 1, 1] and len(images) == 6


def test_a_comma_is_lower_than_an_apostrophe():
    heights = [np.nonzero(glyphs.drawing(character, "DejaVuSans"))[0].mean() for character in ",'"]
    assert heights[0] > heights[1] + 20


def test_an_unknown_face_is_named():
    with pytest.raises(UserError, match="DejaVuSan.*Did you mean 'DejaVuSans'"):
        glyphs.render("A", ["DejaVuSan"], 1, 0)


def test_digits_holds_every_image_once_and_a_fifth_of_each_class_is_for_testing(digit_set):
    train, train_labels, test, test_labels, names = digit_set
    everything = np.bincount(read_digits().target)
    assert names == list("0123456789")
    assert np.array_equal(np.bincount(train_labels) + np.bincount(test_labels), everything)
    assert np.abs(np.bincount(test_labels) - 0.2 * everything).max() <= 0.5
    assert train.shape[1:] == test.shape[1:] == (3, 32, 32) and train.dtype == torch.uint8
    assert len(train) == len(train_labels) and len(test) == len(test_labels)


def test_digits_are_scikit_learns_images_enlarged(digit_set):
    train, train_labels, test, _, _ = digit_set
    shrunk = functional.avg_pool2d(torch.cat([train, test])[:, 0].double(), 4).flatten(1) / 255
    original = torch.from_numpy(read_digits().images.reshape(-1, 64) / 16)
    nearest = torch.cdist(shrunk, original).min(dim=1)
    assert len(set(nearest.indices.tolist())) > 1790  # every image is there, none twice (a few are close to one another)
    target = read_digits().target
    assert np.array_equal(target[nearest.indices[: len(train)].numpy()], train_labels)


def test_the_split_of_digits_is_fixed(digit_set):
    again = digits.load_digits()
    assert torch.equal(again[0], digit_set[0]) and torch.equal(again[2], digit_set[2])
