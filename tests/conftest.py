"""What holds for all tests: on what they run is said first, and pictures are drawn only within `helpers.pictures`."""

import importlib.metadata
import platform
from collections.abc import Iterator

import pytest
import torch

import trainer
from tests.helpers import ROOT


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
