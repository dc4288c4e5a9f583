"""What the tests of studies share."""

import logging
from collections.abc import Iterator

import pytest

from utils.runs.progress import LOGGER


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What the program logs."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    LOGGER.addHandler(handler)
    LOGGER.setLevel("INFO")
    yield texts
    LOGGER.removeHandler(handler)
