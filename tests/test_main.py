"""main.py as people start it: processes, exit statuses, what goes to stdout and stderr, pipes."""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from main import main
from tests.helpers import ROOT
from utils.runs.progress import LOGGER, Progress
from utils.runs.runtime import log_to_console

QUICKSTART = str(ROOT / "exps" / "quickstart.json")
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(ROOT / "main.py"), *arguments], env=ENVIRONMENT, text=True, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def one_task(folder: Path) -> list[str]:
    """The quick start, cut to one task of one epoch, into `folder`."""
    changes = [f"filepath={folder}", "nb_tasks=1", "init_epoch=1"]
    return ["--config", QUICKSTART, "--device", "cpu", *(part for change in changes for part in ("--set", change))]


def test_help_names_every_option(capsys) -> None:
    options = re.findall(r'add_argument\("(--[a-z-]+)"', (ROOT / "main.py").read_text())
    assert {"--config", "--seed", "--device", "--set", "--overwrite", "--dry-run"} <= set(options)
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and all(f"{option} " in out for option in options)


@pytest.mark.slow
def test_help_and_wrong_options_are_answered_without_loading_torch() -> None:
    check = "import sys, main; main.parse(['--config', 'x']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
    status, out, err = ended(start("--config", QUICKSTART, "--epochs", "3"))
    assert status == 2 and out == "" and "--epochs" in err


@pytest.mark.parametrize("arguments, words", [
    ([], ["usage:", "--config"]),
    (["--config", QUICKSTART, "--seed", "one"], ["--seed", "one"]),
    (["--config", QUICKSTART, "--epochs", "3"], ["--epochs"]),
])
def test_a_wrong_command_line_ends_with_status_2(arguments: list[str], words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and all(word in err for word in words)


@pytest.mark.parametrize("name, words", [("comma.json", ["line 2, column 16"]), ("missing.json", ["no such file"]),
                                         ("key.json", ["'gumbel_tau_int'", "'gumbel_tau_init'"])])
def test_a_bad_config_is_one_line_with_status_2(name: str, words: list[str], tmp_path: Path, capsys) -> None:
    (tmp_path / "comma.json").write_text('{"dataset": "digits",\n "init_cls": 2,,\n "increment": 2}')
    (tmp_path / "key.json").write_text('{"dataset": "digits", "init_cls": 2, "gumbel_tau_int": 5.0}')
    assert main(["--config", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and all(word in err for word in [name, *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comma.json", "key.json"]


def test_a_dry_run_on_a_missing_cuda_device_is_json_with_one_warning(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--config", QUICKSTART, "--device", "0", "--dry-run", "--set", f"filepath={tmp_path / 'run'}"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert len(printed["warnings"]) == 1 and "running on the CPU" in printed["warnings"][0] and printed["device"] == "cpu"
    assert printed["split"]["task_sizes"] == [2, 2, 2, 2, 2] and err == "" and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_lines_arrive_one_by_one_where_output_is_a_pipe(tmp_path: Path) -> None:
    process = start(*one_task(tmp_path / "run"))
    first = process.stdout.readline()
    assert first.startswith("Run: digits, 1 tasks, sdlora")
    assert process.poll() is None and not (tmp_path / "run" / "results.json").exists()  # it has yet to train
    text, err = first + process.stdout.read(), process.stderr.read()
    assert process.wait(timeout=300) == 0 and err == "" and "\r" not in text and "\x1b" not in text and "it/s" not in text
    logged = (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
    assert text.count("Task 0, Epoch 1/1 => Loss ") == 1 and "[Conditional Growth] ✓ Keeping adapter for task 0" in text
    plain = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", logged)
    assert plain == text


@pytest.mark.slow
@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry-run"])
def test_a_reader_that_goes_away_does_no_harm(dry: bool, tmp_path: Path) -> None:
    """`python main.py ... | head -1`: no traceback, and a run goes on to its end."""
    process = start(*one_task(tmp_path / "run"), *(["--dry-run"] if dry else []))
    if not dry:
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) == 0 and err == ""
    if not dry:
        assert json.loads((tmp_path / "run" / "results.json").read_text())["finished"]


def test_a_terminal_of_another_encoding_stops_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    log_to_console()
    LOGGER.info("[Conditional Growth] ✓ Keeping adapter for task 0")
    assert b"Keeping adapter for task 0\n" in narrow.buffer.getvalue()


@pytest.mark.slow
def test_progress_lines_come_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Where output is no terminal, a line with step, loss, tau, accuracy and time left, every LINE_SECONDS."""
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0.02)
    started = time.monotonic()
    assert main(one_task(tmp_path / "run")) == 0
    lines = re.findall(r"^Task 0, Epoch 1/1: step \d+/9, loss [\d.e-]+, tau [\d.]+, accuracy [\d.e+]+, \d+:\d\d left$",
                       capsys.readouterr().out, re.MULTILINE)
    assert 1 <= len(lines) <= (time.monotonic() - started) / 0.02
