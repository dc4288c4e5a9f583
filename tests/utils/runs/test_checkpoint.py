"""utils/runs/checkpoint.py: what comes back is what was saved, to the bit, or it is named and not taken."""

import hashlib
import io
import os
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from tests.helpers import ROOT
from utils.errors import UserError
from utils.runs import files
from utils.runs.checkpoint import Checkpoints

HEADER = 48  # bytes: magic, size, SHA-256

# In one process, since importing torch takes seconds: a child saves as fast as it can and is killed within a save; whatever
# it said was saved must be there, whole.
KILLED_IN_SAVES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from utils.runs.checkpoint import Checkpoints
from utils.runs.files import remove_leftovers
torch.set_num_threads(1)
folder, chance, step, torn = Path(sys.argv[1]), random.Random(0), 0, 0
for kill in range(int(sys.argv[2])):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        saver = Checkpoints(folder)
        while True:
            step += 1
            saver.save({"step": step, "tensor": torch.full((50_000,), float(step))})
            os.write(write, step.to_bytes(8, "little"))
    os.close(write)
    os.read(read, 8)
    time.sleep(chance.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = b""
    while part := os.read(read, 1 << 20):
        said += part
    os.close(read)
    last = int.from_bytes(said[-8:], "little") if said else step + 1
    torn += any(folder.glob(".*"))
    remove_leftovers(folder)
    state, damaged = Checkpoints(folder).load()
    assert damaged == [], damaged
    assert state["step"] in (last, last + 1), (state["step"], last)
    assert torch.equal(state["tensor"], torch.full((50_000,), float(state["step"])))
    step = state["step"]
print(torn, step)
"""

# Limits on the size of files stand for a disk that fills up at any point of a save.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from utils.runs.checkpoint import Checkpoints
from utils.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, full = Path(sys.argv[1]), resource.RLIM_INFINITY
saver = Checkpoints(folder)
for step in (1, 2):
    size = saver.save({"step": step, "tensor": torch.full((1000,), step)}).stat().st_size
before = {path.name: path.read_bytes() for path in folder.iterdir()}
for limit in [0, 1, 47, 48, 49, *range(100, size, size // 15), size - 1]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, full))
    try:
        saver.save({"step": 3, "tensor": torch.full((1000,), 3)})
    except UserError as error:
        assert "free some space" in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit(f"written within {limit} bytes")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, limit
    assert saver.load()[0]["step"] == 2
resource.setrlimit(resource.RLIMIT_FSIZE, (full, full))
saver.save({"step": 3, "tensor": torch.full((1000,), 3)})
state, damaged = saver.load()
assert state["step"] == 3 and not damaged
"""


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def state_of(step: int) -> dict[str, Any]:
    stream = torch.Generator().manual_seed(step)
    return {"step": step, "weight": torch.rand(7, 5, generator=stream), "half": torch.rand(3, generator=stream).bfloat16(),
            "none": None, "nested": {"list": [1, 2.5, "text", True], 3: (torch.arange(4), float("-inf"))}}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def sealed(name: str, payload: bytes) -> bytes:
    """A checkpoint file by the description of its format: `payload` under a header that is right."""
    digest = hashlib.sha256(name.encode() + b"\n" + payload).digest()
    return struct.pack("<8sQ32s", b"GCLCKPT1", len(payload), digest) + payload


def pickled(value: Any, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- what is promised


def test_what_is_saved_comes_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() == (None, []) and Checkpoints(tmp_path / "missing").load() == (None, [])
    path = checkpoints.save(state_of(1))
    assert path == tmp_path / "checkpoint_1.ckpt"
    state, damaged = Checkpoints(tmp_path).load()
    assert same(state, state_of(1)) and damaged == []


def test_random_states_come_back_and_do_not_move(tmp_path: Path) -> None:
    """What an exact resume needs: the streams of Python, numpy and torch, as plain values."""
    python, numpy, generator = random.getstate(), np.random.default_rng(3), torch.Generator().manual_seed(4)
    torch_state = torch.get_rng_state()
    kind, keys, *rest = np.random.get_state()
    state = {"python": python, "numpy": numpy.bit_generator.state, "global": [kind, keys.tolist(), *rest],
             "torch": torch_state, "own": generator.get_state()}
    Checkpoints(tmp_path).save(state)
    loaded, _ = Checkpoints(tmp_path).load()
    assert same(loaded, state)
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], keys)


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 0.1}])
    weight.grad = torch.arange(3.0)
    optimizer.step()
    Checkpoints(tmp_path).save({"weight": weight, "optimizer": optimizer.state_dict()})
    state, _ = Checkpoints(tmp_path).load()
    again = torch.nn.Parameter(state["weight"].detach())
    resumed = torch.optim.AdamW([{"params": [again], "lr": 0.5}])
    resumed.load_state_dict(state["optimizer"])
    again.grad = weight.grad.clone()
    optimizer.step()
    resumed.step()
    assert torch.equal(again, weight)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept_in_the_order_of_their_numbers(tmp_path: Path, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(1, 13):
        checkpoints.save(state_of(step))
    assert names(tmp_path) == sorted(f"checkpoint_{number}.ckpt" for number in range(13 - keep, 13))
    assert Checkpoints(tmp_path).load()[0]["step"] == 12


def test_numbers_go_on_in_a_new_process(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        Checkpoints(tmp_path).save(state_of(step))
    assert names(tmp_path) == ["checkpoint_2.ckpt", "checkpoint_3.ckpt"]


def test_all_can_be_removed_and_nothing_else_is(tmp_path: Path) -> None:
    others = ["checkpoint_.ckpt", "checkpoint_01.ckpt", "checkpoint_1.ckpt.bak", "results.json", ".checkpoint_1.ckpt.0.part"]
    for name in others:
        (tmp_path / name).write_text("mine")
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(state_of(step))
    checkpoints.remove_all()
    assert names(tmp_path) == sorted(others) and checkpoints.load() == (None, [])


def test_the_older_ones_go_only_after_the_new_one_is_there(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_of(step))
    unlink, seen = Path.unlink, []

    def watch(path: Path, missing_ok: bool = False) -> None:
        seen.append((path.name, (tmp_path / "checkpoint_3.ckpt").exists()))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watch)
    checkpoints.save(state_of(3))
    assert seen == [("checkpoint_1.ckpt", True)]


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), Path("x"), object, slice(1)])
def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path: Path, value: Any) -> None:
    Checkpoints(tmp_path).save(state_of(1))
    with pytest.raises(TypeError, match="plain Python values"):
        Checkpoints(tmp_path).save({"value": value})
    assert names(tmp_path) == ["checkpoint_1.ckpt"]


# ---- what goes wrong


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_of(1))

    def refuse(*arguments) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, name, refuse)
            with pytest.raises(UserError, match="free some space"):
                checkpoints.save(state_of(2))
        assert names(tmp_path) == ["checkpoint_1.ckpt"]
        assert same(checkpoints.load()[0], state_of(1))


@pytest.mark.slow
def test_a_full_disk_at_every_point_of_a_save(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, check=True, timeout=120)


@pytest.mark.slow
def test_a_process_killed_within_saves_loses_nothing_it_saved(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED_IN_SAVES, str(tmp_path), "60"], cwd=ROOT, check=True, timeout=300,
                         stdout=subprocess.PIPE, text=True)
    torn, step = map(int, run.stdout.split())
    assert torn > 0, "no kill came within a save: the test shows nothing"
    assert step > 60


def test_damaged_ones_are_not_among_those_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(state_of(step))
    (tmp_path / "checkpoint_2.ckpt").write_bytes(b"")
    resumed = Checkpoints(tmp_path)
    state, damaged = resumed.load()
    assert state["step"] == 1 and damaged == [f"{tmp_path / 'checkpoint_2.ckpt'}: empty"]
    resumed.save(state_of(2))
    assert names(tmp_path) == ["checkpoint_1.ckpt", "checkpoint_3.ckpt"]
    assert Checkpoints(tmp_path).load()[1] == []


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, bytes]:
    """Three whole checkpoints, by name, of which `state_of` tells the content."""
    folder = tmp_path_factory.mktemp("originals")
    checkpoints = Checkpoints(folder, keep=3)
    return {path.name: path.read_bytes() for path in [checkpoints.save(state_of(step)) for step in (1, 2, 3)]}


def damages(originals: dict[str, bytes], marker: Path) -> dict[str, tuple[bytes, str]]:
    """Contents that are no whole checkpoint for the newest name, and a word of what is said about each."""
    name, chance = "checkpoint_3.ckpt", random.Random(1)
    whole = originals[name]
    payload = whole[HEADER:]
    cases = {"empty": (b"", "empty")}
    for length in {1, 7, 8, 9, HEADER - 1, HEADER, len(whole) - 1, *chance.sample(range(1, len(whole)), 120)}:
        cases[f"first {length} bytes"] = whole[:length], "cut short" if length >= 8 else "not a checkpoint"
    header_bits, payload_bits = range(8 * HEADER), range(8 * HEADER, 8 * len(whole))
    for bit in [*header_bits, *chance.sample(payload_bits, 300)]:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        cases[f"bit {bit}"] = bytes(changed), "not a checkpoint" if bit < 64 else ""
    for start in chance.sample(range(HEADER, len(whole) - 512), 40):
        cases[f"zeros from {start}"] = whole[:start] + bytes(512) + whole[start + 512:], "wrong checksum"
        cases[f"cut at {start}"] = whole[:start] + whole[start + 512:], "cut short"
        cases[f"doubled at {start}"] = whole[:start] + whole[start - HEADER:], "wrong checksum"
    for other in ("checkpoint_1.ckpt", "checkpoint_2.ckpt"):
        cases[f"swapped with {other}"] = originals[other], "another name"
        cases[f"payload of {other}"] = whole[:HEADER] + originals[other][HEADER:], ""
    cases["more after the end"] = whole + b"\0", "wrong checksum"
    cases["without header"] = payload, "not a checkpoint"
    cases["random bytes"] = chance.randbytes(5000), "not a checkpoint"
    cases["text"] = b'{"step": 3}\n', "not a checkpoint"
    cases["foreign torch file"] = pickled(state_of(9)), "not a checkpoint"
    evil = {"pickle": pickle.dumps(Evil(marker), protocol=2), "torch": pickled({"step": Evil(marker)}),
            "old torch": pickled({"step": Evil(marker)}, _use_new_zipfile_serialization=False)}
    for kind, content in evil.items():
        cases[f"foreign {kind}"] = content, "not a checkpoint"
        cases[f"sealed {kind}"] = sealed(name, content), "unreadable"
    odd = {"list": pickled([1]), "nothing": b"", "noise": chance.randbytes(900), "archive": b"PK\3\4" * 99}
    for kind, content in odd.items():
        cases[f"sealed {kind}"] = sealed(name, content), "unreadable"
    return cases


def test_damaged_files_are_named_and_never_taken(originals: dict[str, bytes], tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "run"
    folder.mkdir()
    cases = damages(originals, marker)
    assert len(cases) > 800
    for case, (content, word) in cases.items():
        for name, whole in originals.items():
            (folder / name).write_bytes(whole)
        newest = folder / "checkpoint_3.ckpt"
        newest.write_bytes(content)
        state, damaged = Checkpoints(folder).load()
        assert same(state, state_of(2)), case
        assert len(damaged) == 1 and damaged[0].startswith(f"{newest}: ") and word in damaged[0], (case, damaged)
        assert "\n" not in damaged[0]
        assert not marker.exists(), case
        for name in originals:  # alone, without one to step back to
            (folder / name).unlink(missing_ok=name != newest.name)
        newest.write_bytes(content)
        with pytest.raises(UserError, match="--overwrite") as caught:
            Checkpoints(folder).load()
        assert str(newest) in str(caught.value) and not marker.exists(), case


def test_the_fuzzer_itself_would_see_a_file_executed(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def test_a_sealed_file_by_the_description_is_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_9.ckpt").write_bytes(sealed("checkpoint_9.ckpt", pickled(state_of(9))))
    assert same(Checkpoints(tmp_path).load()[0], state_of(9))


def test_two_swapped_files_are_both_named(originals: dict[str, bytes], tmp_path: Path) -> None:
    for name, other in (("1", "1"), ("2", "3"), ("3", "2")):
        (tmp_path / f"checkpoint_{name}.ckpt").write_bytes(originals[f"checkpoint_{other}.ckpt"])
    state, damaged = Checkpoints(tmp_path).load()
    assert same(state, state_of(1))
    assert [line.split(":")[0] for line in damaged] == [str(tmp_path / f"checkpoint_{n}.ckpt") for n in (3, 2)]


def test_names_that_are_no_regular_files(originals: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "checkpoint_1.ckpt").write_bytes(originals["checkpoint_1.ckpt"])
    (tmp_path / "checkpoint_2.ckpt").mkdir()
    os.mkfifo(tmp_path / "checkpoint_3.ckpt")
    (tmp_path / "checkpoint_4.ckpt").symlink_to(tmp_path / "gone")
    (tmp_path / f"checkpoint_{'9' * 40}.ckpt").write_bytes(b"x")
    checkpoints = Checkpoints(tmp_path)
    state, damaged = checkpoints.load()
    assert same(state, state_of(1)) and len(damaged) == 4
    checkpoints.save(state_of(2))
    assert same(Checkpoints(tmp_path).load()[0], state_of(2))


def test_a_file_that_may_not_be_read(originals: dict[str, bytes], tmp_path: Path, monkeypatch) -> None:
    for name, whole in originals.items():
        (tmp_path / name).write_bytes(whole)

    def refuse(path: Path, *arguments) -> BinaryIO:
        if path.name == "checkpoint_3.ckpt":
            raise PermissionError(13, "Permission denied")
        return open(path, *arguments)

    monkeypatch.setattr("utils.runs.checkpoint.open", refuse, raising=False)
    state, damaged = Checkpoints(tmp_path).load()
    assert same(state, state_of(2))
    assert damaged == [f"{tmp_path / 'checkpoint_3.ckpt'}: unreadable (Permission denied)"]


def test_a_folder_that_cannot_be_listed_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be listed"):
        Checkpoints(tmp_path / "file").load()
