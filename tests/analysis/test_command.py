"""analysis/command.py: what the commands of the room take and write into."""

import argparse

import pytest

from analysis.command import make_output, positive
from utils.errors import UserError


def test_a_count_is_an_integer_of_at_least_1() -> None:
    assert positive("12") == 12
    for text in ("0", "-1", "1.5", "many"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not an integer of at least 1"):
            positive(text)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path) -> None:
    make_output(tmp_path / "deep" / "new")
    assert (tmp_path / "deep" / "new").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output: the folder .*file' cannot be made"):
        make_output(tmp_path / "file")
