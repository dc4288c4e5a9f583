"""Random streams that depend on what they are for, and on nothing else.

Draws are keyed by the seed and by their purpose (task, epoch, step, image), never taken from a generator that something else
advances. Turning one feature on or off, evaluating more often, resuming, or spreading a batch over workers and processes
therefore cannot move the numbers that another feature sees (METHOD.md, invariants I8, I9 and I10).
"""

import hashlib
import random
from typing import Any

import numpy as np
import torch

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def stream_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for the stream named by `keys` under `seed`."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator of its own for the stream named by `keys`."""
    return torch.Generator().manual_seed(stream_seed(seed, *keys))


def global_state() -> dict[str, Any]:
    """State of the streams that Python, numpy and torch share, as a checkpoint can hold it.

    Nothing here draws from them; a method that somebody adds might.
    """
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_global_state(state: dict[str, Any]) -> None:
    """The shared streams as they were at `global_state`; those of CUDA only where there are as many devices as then."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def uniforms(seed: int, *keys: int | str, index: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 `[n, count]`; row `i` depends on (seed, keys, index[i]) alone.

    SplitMix64 (Steele, Lea & Flood, 2014) used as a counter-based generator: the state of column `c` of image `index`
    is hashed, not advanced, so any subset of the rows can be drawn in any order.
    """
    with np.errstate(over="ignore"):
        base = np.uint64(stream_seed(seed, *keys))
        rows = _mix(base + np.asarray(index, dtype=np.uint64)[:, None] * _INCREMENT)
        bits = _mix(rows + np.arange(1, count + 1, dtype=np.uint64)[None, :] * _INCREMENT)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
