"""The registry of data sets; what each reads is tested beside its reader."""

from pathlib import Path

import pytest

from utils.data import DATASETS, load_dataset
from utils.errors import UserError


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'cifar224'") as error:
        load_dataset("cifar244", tmp_path)
    assert all(name in str(error.value) for name in DATASETS)


def test_another_set_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    digits = load_dataset("digits", "nowhere")
    monkeypatch.setitem(DATASETS, "mine", lambda data_path, seed: asked.append((data_path, seed)) or digits)
    assert load_dataset("mine", "~/images", seed=3) is digits
    assert asked == [(Path.home() / "images", 3)]
