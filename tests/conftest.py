"""What holds for all tests: a run in this process draws its pictures only for those that ask for them."""

from collections.abc import Iterator

import pytest

import trainer

_DRAW = trainer.write_pictures


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """They take a third of the time of a small run; tests/utils/results/test_plots.py is about them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", lambda result, folder: None)
        yield


@pytest.fixture(scope="module")
def pictures(no_pictures: None) -> Iterator[None]:
    """From here to the end of the module, runs in this process have their pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_pictures", _DRAW)
        yield
