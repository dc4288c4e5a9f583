"""analysis/command.py: how the commands of the room end, and what they write into."""

import argparse
import io
import sys

import pytest

from analysis.command import make_output, positive, status_of
from utils.errors import UserError


@pytest.mark.parametrize("raised, status, said", [
    (None, 0, ""), (UserError("RUN: is not there."), 2, "error: RUN: is not there.\n"), (KeyboardInterrupt(), 130, "")])
def test_a_command_ends_with_its_status_and_one_line(raised: BaseException | None, status: int, said: str, capsys) -> None:
    def work() -> None:
        if raised is not None:
            raise raised

    assert status_of(work) == status and capsys.readouterr() == ("", said)


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert status_of(lambda: print("1 ± 2", flush=True)) == 0
    assert out.buffer.getvalue() == b"1 ? 2\n"


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
