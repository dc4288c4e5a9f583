"""utils/rng.py: streams keyed by their purpose, and the state of the shared ones."""

import random

import numpy as np
import torch

from utils.rng import generator, global_state, restore_global_state, uniforms
from utils.runs.checkpoint import Checkpoints


def test_rows_depend_on_their_own_index_alone() -> None:
    everything = uniforms(1993, "augment", 3, index=np.arange(50), count=6)
    some = np.array([40, 7, 7, 0])
    assert np.array_equal(uniforms(1993, "augment", 3, index=some, count=6), everything[some])
    assert everything.min() >= 0 and everything.max() < 1
    assert not np.array_equal(everything, uniforms(1993, "augment", 4, index=np.arange(50), count=6))


def test_rows_are_uniform_and_unrelated() -> None:
    draws = uniforms(0, "test", index=np.arange(20_000), count=3)
    assert np.abs(draws.mean(0) - 0.5).max() < 0.01 and np.abs(draws.var(0) * 12 - 1).max() < 0.03
    assert np.abs(np.corrcoef(np.hstack([draws[:-1], draws[1:]]).T) - np.eye(6)).max() < 0.03


def test_generators_of_one_key_are_equal_and_of_others_not() -> None:
    first, again, other = (torch.rand(3, generator=generator(*key)) for key in ((1, "a", 2), (1, "a", 2), (1, "a", 3)))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_shared_streams_come_back_from_a_checkpoint(tmp_path) -> None:
    def draws() -> tuple:
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    Checkpoints(tmp_path).save({"random": global_state()})
    before = draws()
    assert draws() != before
    restore_global_state(Checkpoints(tmp_path).load()[0]["random"])
    assert draws() == before
