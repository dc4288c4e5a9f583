"""Runs of two processes on the CPU: the same learning as in one, one writer, one stop for all, however they are started."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backbone.heads.linear import Pause
from backbone.heads.ridge import RidgeHead
from main import main
from models import LEARNERS
from tests.helpers import ROOT, SMALL, method_values
from tests.tiny_backbone import MAIN
from utils.runs import distributed

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ENVIRONMENT = {**{name: value for name, value in os.environ.items() if name not in PLACES},
               "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
BIN = Path(sys.executable).parent
PORT = str(20000 + os.getpid() % 20000)  # where processes meet; the launchers' own is one for all tests that run side by side
# 215 and 216 training images: batches of 43 never divide evenly, and one image is left for the second task's last batch.
# The second adapter is dropped by the held-out loss, so the head is fitted again, three times.
TWO_TASKS = {**SMALL, "nb_tasks": 2, "epochs": 2, "batch_size": 43, "growth_rule": "val_loss", "val_fraction": 0.25,
             "growth_margin": 10, "refit_epochs": 1, "lambda_sparsity": 0.05, "forward_transfer": True}
# Every method on new classes, a head that chooses its penalty, and a domain-incremental stream.
LEARNED = {**{name: method_values(name, batch_size=43) for name in LEARNERS},
           "ridge": method_values("finetune_head", batch_size=43, head="ridge", ridge_dim=48),
           "domains": method_values("sdlora", batch_size=43, inference="routed", scenario="domain",
                                    task_domains=["negative", "plain"])}
PENALTY = re.compile(r"Task \d: ridge_lambda \S+")
LOSSES = re.compile(r"(Task \d, Epoch \d/\d) => Loss ([\d.]+)(?: \(clf=([\d.]+), sparse=([\d.]+)\))?")

# main.py in which process 1, at its third step, does what its environment says.
FAULTY = """
import os, signal, sys
import trainer
from main import main
from utils.errors import UserError

original = trainer.Run.after_step

def after_step(self):
    if os.environ["RANK"] == "1" and self.steps == 2:
        match os.environ["FAULT"]:
            case "mistake":
                raise UserError("a mistake that only one process can see")
            case "defect":
                raise ZeroDivisionError("a defect")
            case "signal":
                signal.raise_signal(signal.SIGUSR1)
    original(self)

trainer.Run.after_step = after_step
sys.exit(main())
"""


def write_config(folder: Path, **changes) -> Path:
    path = folder / "config_file.json"
    path.write_text(json.dumps({**TWO_TASKS, "filepath": str(folder / "run"), **changes}))
    return path


def command(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, words)), cwd=ROOT, env={**ENVIRONMENT, **variables}, text=True, capture_output=True,
                          timeout=240)


def result_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def epochs_of(folder: Path) -> dict[str, list[float]]:
    """The losses that the log has for each epoch."""
    found = LOSSES.findall((folder / "train.log").read_text())
    return {title: [float(value) for value in values if value] for title, *values in found}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = {f"{path.name}:{name}": tensor
             for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return saved | {f"{path.name}:{name}": value for path in folder.glob("*.pt") for name, value in torch.load(path).items()
                    if isinstance(value, torch.Tensor)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    assert main(["--config", str(write_config(folder))]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """Two processes that the plain command has started."""
    folder = tmp_path_factory.mktemp("together")
    ended = command(sys.executable, "main.py", "--config", write_config(folder), "--device", "cpu", "cpu")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("Task 1, Epoch 2/2 =>") == 1
    return folder / "run"


@pytest.mark.slow
def test_two_processes_learn_what_one_does(alone: Path, together: Path) -> None:
    one, two = epochs_of(alone), epochs_of(together)
    assert one.keys() == two.keys() and len(one) == 3
    assert len(one["Task 1, Epoch 2/2"]) == 3 and min(one["Task 1, Epoch 2/2"]) > 0
    for title, losses in one.items():
        assert two[title] == pytest.approx(losses, abs=1.1e-3), title  # the log has three decimals
    one, two = tensors_of(alone), tensors_of(together)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_two_processes_decide_as_one_does(alone: Path, together: Path) -> None:
    one, two = result_of(alone), result_of(together)
    assert [task["kept"] for task in one["tasks"]] == [task["kept"] for task in two["tasks"]] == [True, False]
    assert two["tasks"][1]["numbers"]["val_loss"] == pytest.approx(one["tasks"][1]["numbers"]["val_loss"], abs=1e-4)


@pytest.mark.slow
def test_every_test_image_is_counted_once(alone: Path, together: Path) -> None:
    for one, two in zip(result_of(alone)["tasks"], result_of(together)["tasks"], strict=True):
        assert two["counts"]["images"] == one["counts"]["images"]
        for name, hits in one["counts"].items():  # an image on the border of two classes may fall to either side
            assert two["counts"][name] == pytest.approx(hits, abs=1), name
        assert sum(two["calibration"]["images"]) == sum(one["counts"]["images"])
        assert sum(two["calibration"]["confidence"]) == pytest.approx(sum(one["calibration"]["confidence"]), abs=0.01)
        assert sum(two["calibration"]["right"]) == sum(two["counts"]["top1"])
    one, two = (result_of(folder)["tasks"][0]["zero_shot"] for folder in (alone, together))
    assert two["images"] == one["images"] > 0 and two["learned"] == pytest.approx(one["learned"], abs=1)
    assert two["frozen"] == one["frozen"]


@pytest.mark.slow
def test_one_process_writes(alone: Path, together: Path) -> None:
    pictures = {"accuracy.png", "gates.png", "growth.png"}  # which a run in this process does not draw
    assert {path.name for path in alone.iterdir()} | pictures == {path.name for path in together.iterdir()}
    log = (together / "train.log").read_text()
    assert all(log.count(line) == 1 for line in ("Run: ", "Task 0, Epoch 1/1 =>", "Pruning adapter for task 1", "Results: "))
    assert not list(together.glob("*.ckpt"))


@pytest.mark.slow
def test_the_record_names_the_processes(alone: Path, together: Path) -> None:
    one, two = result_of(alone)["hardware"], result_of(together)["hardware"]
    assert (one["processes"], one["devices"], one["machines"]) == (1, ["cpu"], 1)
    assert (two["processes"], two["devices"], two["machines"]) == (2, ["cpu", "cpu"], 1)


def test_a_batch_of_fewer_images_than_processes_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    for name, value in zip(PLACES, (0, 44, 0, 44), strict=True):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("utils.runs.distributed.join", lambda device: None)
    assert main(["--config", str(write_config(tmp_path)), "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "batch_size: 43" in message and "44 processes" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_torchrun_goes_on(together: Path, tmp_path: Path) -> None:
    """To the same bits; the other configs of that command are a method without training and one that is refused."""
    config = write_config(tmp_path)
    ended = faulty(tmp_path, config, "signal")
    assert ended.returncode == 75 and ended.stdout.count("Stopped by SIGUSR1") == 1, ended.stderr
    assert len(list((tmp_path / "run").glob("*.ckpt"))) == 1
    other = tmp_path / "simplecil.json"
    settings = {key: SMALL[key] for key in ("dataset", "init_cls", "increment", "backbone_type", "device")}
    other.write_text(json.dumps({**settings, "model_name": "simplecil", "nb_tasks": 2, "batch_size": 41,
                                 "filepath": str(tmp_path / "simplecil")}))
    refused = tmp_path / "refused.json"
    refused.write_text(json.dumps({**TWO_TASKS, "rank": 3, "filepath": str(together)}))
    ended = command(BIN / "torchrun", "--nproc_per_node=2", "--master_port", PORT, "main.py",
                    "--config", config, other, refused)
    assert ended.returncode == 1 and ended.stderr.count("rank (there 4, now 3)") == 1, ended.stderr
    assert (tmp_path / "run" / "train.log").read_text().count("Continuing within task 0") == 1
    for path in sorted([*together.glob("*.pt"), *together.glob("*.safetensors")]):
        assert path.read_bytes() == (tmp_path / "run" / path.name).read_bytes(), path.name
    assert main(["--config", str(other), "--set", f"filepath={tmp_path / 'alone'}"]) == 0
    means, expected = (load_file(tmp_path / name / "head_task_1.safetensors")["weight"] for name in ("simplecil", "alone"))
    torch.testing.assert_close(means, expected)


def faulty(folder: Path, config: Path, fault: str) -> subprocess.CompletedProcess:
    """The plain command with two processes, of which process 1 has the fault."""
    (folder / "faulty.py").write_text(FAULTY)
    script = "import sys; from utils.runs.processes import start; sys.exit(start(2, [sys.executable, *sys.argv[1:]]))"
    return command(sys.executable, "-c", script, folder / "faulty.py", "--config", config, "--device", "cpu", "cpu",
                   FAULT=fault, PYTHONPATH=str(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("fault, status, words", [
    ("mistake", 2, "only one process can see"),
    ("defect", 1, "ZeroDivisionError: a"),
])
def test_a_process_that_fails_alone_says_so_and_ends_the_run(fault: str, status: int, words: str, tmp_path: Path) -> None:
    started = time.monotonic()
    ended = faulty(tmp_path, write_config(tmp_path), fault)
    assert ended.returncode == status
    assert ended.stderr.count(words) == 1 and "connection" not in ended.stderr
    assert ended.stderr.count("\n") == 1 or fault == "defect" and ended.stderr.count("Traceback") == 1
    assert time.monotonic() - started < 120


def leaving_sums(absorb: Callable) -> Callable:
    """`absorb` of a head, that leaves what it is given among the run's files, where `tensors_of` finds it."""
    def absorbing(head: RidgeHead, sums: list[torch.Tensor], task: int, pause: Pause) -> None:
        absorb(head, sums, task, pause)
        if distributed.is_main():
            names = ("fit_gram", "fit_cross", "held_gram", "held_cross")
            torch.save(dict(zip(names, sums, strict=True)), Path(head.config.filepath) / f"sums_task_{task}.pt")
    return absorbing


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory) -> Path:
    """A folder per method, in which `accelerate launch` has had two processes learn, all methods in one start."""
    folder, paths = tmp_path_factory.mktemp("accelerated"), []
    for name, values in LEARNED.items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps({**values, "filepath": str(folder / name)}))
    (folder / "tiny.py").write_text(f"""
import trainer
from backbone.heads.ridge import RidgeHead
from tests.utils.runs.test_distributed import leaving_sums

trainer.write_pictures, RidgeHead.absorb = lambda *_: None, leaving_sums(RidgeHead.absorb)
{MAIN}
""")
    ended = command(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                    "--main_process_port", PORT, "--mixed_precision", "no", "--dynamo_backend", "no",
                    folder / "tiny.py", "--config", *paths, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_every_method_learns_in_two_processes_what_it_does_in_one(name: str, accelerated: Path, tmp_path: Path, monkeypatch
                                                                  ) -> None:
    monkeypatch.setattr(RidgeHead, "absorb", leaving_sums(RidgeHead.absorb))
    path = accelerated / f"{name}.json"
    assert main(["--config", str(path), "--set", f"filepath={tmp_path / 'run'}"]) == 0
    assert result_of(accelerated / name)["hardware"]["processes"] == 2
    chosen = [PENALTY.findall((folder / "train.log").read_text()) for folder in (tmp_path / "run", accelerated / name)]
    assert chosen[0] == chosen[1] and len(chosen[0]) == (2 if name in ("ridge", "ranpac") else 0)
    one, two = tensors_of(tmp_path / "run"), tensors_of(accelerated / name)
    assert one.keys() == two.keys() and any("held_gram" in name for name in one) == bool(chosen[0])
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# What docs/slurm.sh asks of Slurm, with two machines of one process each; the second machine gets the warning.
SRUN = """#!/usr/bin/env bash
[ "$1" = --wait=60 ] && shift
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 "$@" & processes[rank]=$!
done
if [ -n "${WARN:-}" ]; then
  until grep -q "Task 0, Epoch 1" "$WARN" 2>/dev/null; do sleep 0.05; done
  kill -USR1 "${processes[1]}"
fi
highest=0
for process in "${processes[@]}"; do
  status=0; wait "$process" || status=$?
  if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> "$(dirname "$0")/asked"; fi
"""


@pytest.mark.slow
def test_the_slurm_script_starts_a_process_per_task_and_requeues(tmp_path: Path) -> None:
    config = write_config(tmp_path, nb_tasks=1, init_epoch=4)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_ID": str(os.getpid()),
           "WARN": str(tmp_path / "run" / "train.log")}
    ended = command("bash", "docs/slurm.sh", f"--config={config}", **job)
    assert ended.returncode == 75, ended.stderr
    assert (tmp_path / "asked").read_text() == f"requeue {os.getpid()}\n"
    (tmp_path / "python").write_text("#!/bin/sh\nexit 0\n")
    assert command("bash", "docs/slurm.sh", f"--config={config}", **{**job, "WARN": ""}).returncode == 0
    assert (tmp_path / "asked").read_text().count("\n") == 1, "what has ended well is not queued again"
    assert main(["--config", str(config)]) == 0  # also in one process
    assert (tmp_path / "run" / "train.log").read_text().count("Continuing") == 1 and result_of(tmp_path / "run")["finished"]
