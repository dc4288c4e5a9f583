"""The data set `glyphs`, drawn from matplotlib's fonts."""

import numpy as np
import pytest
import torch

from utils.data import Dataset, glyphs, load_dataset
from utils.errors import UserError


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Drawing it takes two seconds."""
    return load_dataset("glyphs", "nowhere")


def images_of(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_a_hundred_classes_of_equal_size_without_digits(dataset):
    train, test = dataset.train, dataset.test
    assert len(set(dataset.classes)) == 100 and not set(dataset.classes) & set("0123456789")
    assert train.images.shape == (4800, 3, 32, 32) and test.images.shape == (2000, 3, 32, 32)
    assert train.images.dtype == test.images.dtype == torch.uint8
    assert train.labels.dtype == test.labels.dtype == np.int64
    assert np.bincount(train.labels).tolist() == [48] * 100 and np.bincount(test.labels).tolist() == [20] * 100
    assert not dataset.augmentation.flip


def test_an_image_is_the_same_at_every_call_whatever_else_is_drawn(dataset):
    """And nothing is drawn from the streams that others use."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    label = dataset.classes.index("Ж")
    alone, _ = glyphs.render(["Ж"], glyphs.TRAIN_FACES[3:5], glyphs.TRAIN_PER_FACE, glyphs.SEED)
    first = 3 * glyphs.TRAIN_PER_FACE
    assert torch.equal(alone, dataset.train.images[dataset.train.labels == label][first : first + len(alone)])
    assert torch.equal(torch.get_rng_state(), torch_state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_the_seed_of_a_run_draws_the_images(dataset, monkeypatch):
    monkeypatch.setattr(glyphs, "CHARACTERS", "Ag")
    first = np.isin(dataset.train.labels, [dataset.classes.index(character) for character in "Ag"])
    assert torch.equal(load_dataset("glyphs", "nowhere").train.images, dataset.train.images[first])
    assert not images_of(load_dataset("glyphs", "nowhere", seed=1).train.images) & images_of(dataset.train.images)


def test_images_of_one_character_in_one_face_differ():
    images, labels = glyphs.render("Q", glyphs.TRAIN_FACES[:1], 6, 0)
    assert len(images_of(images)) == 6 and set(labels) == {0}


def test_without_jitter_print_is_clean():
    images, _ = glyphs.render("Q", glyphs.TRAIN_FACES[:1], 3, 0, strength=0.0)
    assert len(images_of(images)) == 1
    assert images.min() == 0 and images.max() == 255 and images[0, 0, 0].max() == 0


def test_no_two_images_are_the_same(dataset):
    assert len(images_of(torch.cat([dataset.train.images, dataset.test.images]))) == 6800


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
