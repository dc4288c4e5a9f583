"""What holds for all tests: a run in this process draws its pictures only within `helpers.pictures`."""

from collections.abc import Iterator

import pytest

import trainer


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """They take a third of the time of a small run; tests/utils/results/test_plots.py is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", lambda result, folder: None)
        yield
