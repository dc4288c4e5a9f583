"""The data set `digits`, which comes with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as read_digits
from torch.nn import functional

from utils.data import Dataset, load_dataset


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return load_dataset("digits", "nowhere")


def test_every_image_is_there_once_and_a_fifth_of_each_class_is_for_testing(dataset):
    train, test = dataset.train, dataset.test
    everything = np.bincount(read_digits().target)
    assert dataset.classes == list("0123456789")
    assert np.array_equal(np.bincount(train.labels) + np.bincount(test.labels), everything)
    assert np.abs(np.bincount(test.labels) - 0.2 * everything).max() <= 0.5
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 32, 32) and train.images.dtype == torch.uint8
    assert len(train.images) == len(train.labels) and len(test.images) == len(test.labels)
    assert not dataset.augmentation.flip


def test_they_are_scikit_learns_images_enlarged(dataset):
    train, test = dataset.train, dataset.test
    shrunk = functional.avg_pool2d(torch.cat([train.images, test.images])[:, 0].double(), 4).flatten(1) / 255
    original = torch.from_numpy(read_digits().images.reshape(-1, 64) / 16)
    nearest = torch.cdist(shrunk, original).min(dim=1).indices.numpy()
    assert len(set(nearest.tolist())) > 1790  # every image is there, none twice (a few are close to one another)
    assert np.array_equal(read_digits().target[nearest[: len(train.labels)]], train.labels)


def test_the_split_is_fixed(dataset):
    again = load_dataset("digits", "elsewhere", seed=5)
    assert torch.equal(again.train.images, dataset.train.images) and torch.equal(again.test.images, dataset.test.images)
