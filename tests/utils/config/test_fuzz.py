"""Mutated configs through the command line's own entry function: a dry run, or one sentence that names what is wrong.

200 in this process, the same ones each time. `GCL_LONG_FAULTS=1 pytest tests/utils/config/test_fuzz.py` draws 2,000 new ones,
40 of them as processes.
"""

import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from main import main
from tests.helpers import LONG, ROOT
from tests.tiny_backbone import MAIN, TINY
from utils.config import known_keys
from utils.data import sets

CASES, PROCESSES = (2000, 40) if LONG else (200, 2)
AT_ONCE = 4 if LONG else 2
OFFLINE = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_OFFLINE": "1"}
NAME = "mutated_config.json"

_DIGITS = {"dataset": "digits", "init_cls": 2, "increment": 2, "nb_tasks": 3, "device": "cpu", **TINY}
BASES = [
    _DIGITS,
    json.loads((ROOT / "exps" / "quickstart.json").read_text()),
    {**_DIGITS, "rank": 4, "growth_threshold": 0.2, "gumbel_tau_init": 2.0, "lambda_sparsity": 0.1, "refit_epochs": 1},
    {**_DIGITS, "gate": "evidence", "gate_price": 2.0, "head": "ridge", "ridge_dim": 16},
    {**_DIGITS, "gate": "none", "growth_rule": "kd", "kd_residual": 0.1, "rank_schedule": [[0, 4], [1, 2]]},
    {**_DIGITS, "growth_rule": "topk", "growth_topk": 2, "optimizer": "adamw", "scheduler": "steplr", "milestones": [1, 2]},
    {**_DIGITS, "growth_rule": "val_loss", "val_fraction": 0.2, "growth_margin": 0.1, "min_lr": 0.001, "tuned_epoch": 3},
    {**_DIGITS, "model_name": "finetune_head", "epochs": 2},
    {**_DIGITS, "model_name": "simplecil"},
    {**_DIGITS, "model_name": "joint", "head": "aligned", "align_lr": 0.1},
]


class Case(NamedTuple):
    """A config file and the arguments that come with it."""

    content: bytes
    arguments: list[str]


# No name of a backbone or data set that would be downloaded.
_TEXTS = st.text(max_size=8) | st.sampled_from([
    "", " ", "none", "auto", "cpu", "0", "cuda:7", "1e3", "[1]", "NaN", "adam", "steplr", "topk", "kd", "sdlora", "simplecil",
    "finetune_head", "digits", "folder", "cub", "domainnet", "digit", "vit_glyph_tiny_patch8_3", "\0",
    "a\nb", "\u2028", "\ud800", "\udc80", "é", "日本", "😀", "/", "/dev/null", "/dev/null/x", "/proc/self/mem", "/root",
    "..", "~", "~nobody_of_that_name/x", "x" * 300, "/" + "y" * 5000, "a/" * 3000, "weights.pth", "/etc/passwd", "%s{}%d",
    "-1", "--"])
_NUMBERS = st.sampled_from([
    0, 1, -1, 2, 3, 5, 10, 11, 128, 129, 2**31, 2**32, 2**63, 2**64, 10**30, 0.0, -0.0, 0.1, 0.5, 1.0, 2.0, 5e-324, 1e-45,
    1e-10, 1e308, -1e-9]) | st.integers(-5, 200) | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.none() | st.booleans() | _NUMBERS | _TEXTS
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXTS, inner, max_size=2),
                       max_leaves=5)
_KEYS = st.sampled_from(sorted(known_keys()))
_PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)


@st.composite
def misspelt(draw: st.DrawFn) -> str:
    """A key with a letter gone, doubled or replaced."""
    key = draw(_KEYS)
    at = draw(st.integers(0, len(key) - 1))
    return key[:at] + draw(st.sampled_from(["", key[at] * 2, "x", "_", "É"])) + key[at + 1:]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A valid config with one to three changes of its values, keys, text or command line."""
    values, arguments, edits = dict(draw(st.sampled_from(BASES))), [], []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["value", "value", "value", "key", "drop", "text", "set", "set", "flag"]))
        if kind == "value":
            values[draw(_KEYS)] = draw(_VALUES)
        elif kind == "key":
            values[draw(misspelt() | _TEXTS)] = draw(_SCALARS)
        elif kind == "drop":
            values.pop(draw(st.sampled_from(sorted(values)) if values else st.just("")), None)
        elif kind == "text":
            edits.append((draw(st.integers(0, 2000)), draw(st.integers(0, 6)), draw(st.binary(max_size=3) | st.sampled_from([
                b'"', b"}", b"{", b"//", b",", b"\n", b"NaN", b"-Infinity", b"[" * 5000, b"9" * 5000, b"\xff", b"\xef\xbb\xbf",
                b"", b'"seed": 1,', b"\\ud800", b"\x00", b"true", b"1e999"]))))
        elif kind == "set":
            value = json.dumps(draw(_VALUES)) if draw(st.booleans()) else draw(_PLAIN)
            arguments.append(f"--set={draw(_KEYS | misspelt() | _PLAIN)}={value}")
        else:
            arguments.append(draw(st.integers(-3, 2**33).map(lambda n: f"--seed={n}") | _PLAIN.map(lambda t: f"--device={t}")))
    content = json.dumps(values, indent=draw(st.sampled_from([None, 1]))).encode()
    for at, cut, put in edits:
        at %= len(content) + 1
        content = content[:at] + put + content[at + cut:]
    return Case(content, arguments)


def in_this_process(case: Case, folder: Path) -> tuple[int, str, str]:
    """Status, stdout and stderr of `main`, with streams that encode as those of a process do."""
    (folder / NAME).write_bytes(case.content)
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        status = main(["--config", str(folder / NAME), "--dry-run", *case.arguments])
        out.flush()
        err.flush()
    finally:
        sys.stdout, sys.stderr = before
    return status, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()


# What is said of a whole file or argument, where there is no key to name.
_NO_KEY = re.compile(r"line \d+, column \d+: |byte \d+ is not UTF-8|the file is empty|the file holds "
                     r"|is not a key of the config|is given twice|is set twice|nested too deeply|write it as key=value")
_KEY = re.compile(rf"\b({'|'.join(known_keys())})\b")


def check(status: int, out: str, err: str) -> None:
    if status == 0:
        assert err == "" and json.loads(out)["config"]["dataset"], err
        return
    assert status == 2 and out == "", out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and err.endswith("\n") and len(err) < 6000, err
    sentence = err.replace(NAME, "")
    assert _KEY.search(sentence) or _NO_KEY.search(sentence), err


@pytest.fixture(scope="module", autouse=True)
def data_once(tmp_path_factory) -> object:
    """The data sets are read once, no weights are asked of the hub, and the working folder is one in which nothing lies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # what OFFLINE says to a process at its start
        patch.setattr(sets, "load_dataset", functools.cache(sets.load_dataset))
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


@settings(max_examples=CASES, deadline=None, derandomize=not LONG, database=None, print_blob=True,
          suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_mutated_configs_run_dry_or_are_refused(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(*in_this_process(case, Path(folder)))
        assert os.listdir(folder) == [NAME] and os.listdir() == []


@pytest.mark.slow
@settings(max_examples=PROCESSES // AT_ONCE, deadline=None, derandomize=not LONG, database=None, phases=[Phase.generate],
          suppress_health_check=list(HealthCheck))
@given(drawn=st.lists(cases(), min_size=AT_ONCE, max_size=AT_ONCE))
def test_mutated_configs_as_processes(drawn: list[Case]) -> None:
    """Some at once, since most of it is loading torch; what they say is what `main` says in this process."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for number, case in enumerate(drawn):
            path = Path(folder) / str(number)
            path.mkdir()
            (path / NAME).write_bytes(case.content)
            command = [sys.executable, "-c", MAIN, "--config", str(path / NAME), "--dry-run", *case.arguments]
            started.append((case, path, subprocess.Popen(command, env=OFFLINE, stdout=subprocess.PIPE,
                                                         stderr=subprocess.PIPE)))
        for case, path, process in started:
            out, err = (stream.decode() for stream in process.communicate(timeout=300))
            check(process.returncode, out, err)
            assert (process.returncode, out, err) == in_this_process(case, path)
