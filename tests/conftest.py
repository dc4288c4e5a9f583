"""What every session of tests begins with: on what it runs."""

import importlib.metadata
import platform

import pytest
import torch

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
