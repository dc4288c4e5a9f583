"""utils/errors.py: how a command ends, and what it says."""

import errno
import io
import os
import sys

import pytest

from utils.errors import UserError, sentence_of, status_of


@pytest.mark.parametrize("raised, status, said", [
    (None, 0, ""), (UserError("RUN: is not there."), 2, "error: RUN: is not there.\n"), (KeyboardInterrupt(), 130, ""),
    (PermissionError(errno.EACCES, "Permission denied", "/theirs/run"), 2,
     "error: '/theirs/run': permission denied; check the path and who may use it.\n")])
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


def test_a_name_that_no_file_may_have_is_one_short_sentence(tmp_path) -> None:
    with pytest.raises(OSError) as raised:
        os.stat(tmp_path / ("x" * 300))
    said = sentence_of(raised.value)
    assert "file name too long" in said and len(said) < 250
    assert sentence_of(OSError(errno.EIO, "Input/output error")) is None, "what names no path is nobody's to mend"
