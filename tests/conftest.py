"""What holds for all tests: in how many processes they run, on what (which is said first), and without pictures, which are
drawn only within `helpers.pictures`.

Every process has one thread, those that tests start too: the networks are too small for more, and with more the bits of two
runs need not be the same.
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded, which reads it

import torch

import trainer
from studies.job import cores
from tests.helpers import ROOT

MOST = 4  # processes: each takes up to a gigabyte, and with more of them the longest tests decide when all is over


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Without pytest-xdist (`-p no:xdist`) its options in pyproject.toml mean one process."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="of pytest-xdist, which is not loaded")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many processes share the tests where `-n` does not say it: one per core, and none besides this one for a single
    core, nor for a single file or test, which is sooner ended here and can be stopped in a debugger."""
    named = config.option.file_or_dir
    single = len(named) == 1 and not Path(named[0]).is_dir()
    return 0 if single or cores() == 1 else min(cores(), MOST)


@pytest.hookimpl(trylast=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Prints the versions of Python and of all packages in requirements.txt, so that a log of CI says what was tested.

    Pytest's own hook for a header is silent under `-q`, which the README's command has.
    """
    names = [line.partition(">")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()]
    installed = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(f"python {platform.python_version()}, {installed}; {torch.get_num_threads()} threads")


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """They take a third of the time of a small run; tests/utils/results/test_plots.py is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", lambda result, folder: [])
        yield


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests that are marked slow start processes, but for what every run asks of its machine: git for the commit, and
    `platform`, once in a process, uname."""
    if request.node.get_closest_marker("slow"):
        return
    start = subprocess.Popen.__init__

    def checked(process: subprocess.Popen, args: object, *rest: object, **options: object) -> None:
        asked = isinstance(args, list) and args[0] in ("git", "uname")
        assert asked, f"a test that starts a process ({args}) is to be marked slow"
        start(process, args, *rest, **options)

    def refused() -> int:
        raise AssertionError("a test that starts a process is to be marked slow")

    monkeypatch.setattr(subprocess.Popen, "__init__", checked)
    monkeypatch.setattr(os, "fork", refused, raising=False)
