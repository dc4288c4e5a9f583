"""Fixtures of the tests of data."""

import pytest

from tests.data_files import write_class_folders
from utils.data import Dataset, load_dataset


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = write_class_folders(tmp_path_factory.mktemp("folders"), train_per_class=5, test_per_class=2)
    return load_dataset("folder", root)
