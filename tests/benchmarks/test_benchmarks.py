"""benchmarks/: the commands end to end on the embedded backbone, and the references they compare with."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backbone.embedded import EMBEDDED
from benchmarks import case, methods, run, step, stream
from benchmarks.references import loop_layers, stacked_layers
from models import LEARNERS
from tests.helpers import OF_METHOD, in_float64
from tests.tiny_backbone import NAME
from trainer import Quiet
from utils.rng import generator

SMALL = {"precision": "fp32", "backbone": EMBEDDED, "batch": 2, "rank": 2, "gate": "gumbel_softmax",
         "inference": "global", "device": "cpu", "compile": False, "steps": 1, "warmup": 1}


def one_step(layers=None, old: int = 3, gate: str = "gumbel_softmax") -> tuple[dict[str, Tensor], object]:
    """Everything that one step of the project's training loop moves, in float64; momentum's first buffer is the gradient."""
    config = case.config_of(case.Case("step", old, **{**SMALL, "gate": gate}))
    learner = case.learner_with(config, old, torch.device("cpu"))
    in_float64(learner)
    learner.bank.new_B.data.copy_(torch.randn(learner.bank.new_B.shape, generator=generator(0, "B")) * 0.1)
    if layers is not None:
        case.use_reference(learner, layers)
    images = torch.rand(2, 3, 32, 32, generator=generator(0, "x"), dtype=torch.float64)
    classes = learner.data.task_classes(old)
    case.train_on(learner, Quiet(), images, torch.tensor([classes.start, classes.start + 4]), 1)
    names = {"alpha": learner.bank.alpha, "logits": learner.gate.logits, "A": learner.bank.new_A, "B": learner.bank.new_B,
             "head": learner.head.new_weight}
    moved = {name: learner._optimizer.state[p]["momentum_buffer"] for name, p in names.items() if p.requires_grad}
    return moved, learner


@pytest.mark.parametrize("layers", [loop_layers, stacked_layers])
@pytest.mark.parametrize("old", [0, 3])
def test_references_take_the_same_step(layers, old: int) -> None:
    losses = []

    def noted(bank, beta):
        losses.append(beta)
        return layers(bank, beta)

    fast, _ = one_step(old=old)
    plain, _ = one_step(noted, old=old)
    assert losses, "the reference was not used"
    for name in fast:
        assert torch.allclose(fast[name], plain[name], rtol=1e-10, atol=1e-10), name
        assert old == 0 and name in ("alpha", "logits") or fast[name].abs().max() > 1e-8, name


@pytest.mark.parametrize("kind", ["step", "loop", "stacked", "floor", "backbone"])
def test_a_case_measures_time_and_memory(kind: str) -> None:
    result = case.measure(case.Case(kind, 2, **SMALL))
    assert result["step_seconds"] > 0 and result["kind"] == kind
    assert result["peak_bytes"] >= 0  # this process had more before; in one of its own it is above 0, see below
    assert ("image_seconds" in result) == (kind in ("step", "floor", "backbone"))
    assert (result["step_over_floor"] is None) == (kind in ("floor", "loop"))
    if kind in ("step", "backbone"):
        assert result["step_over_floor"] > 0 and result["image_over_floor"] > 0


# Forwards of a step and of an evaluated image after one task, where both are not 1; MOS looks them up for every image.
FORWARDS = {"simplecil": (None, 1), "ranpac": (None, 1), "aper": (None, 2), "l2p": (2, 2), "dualprompt": (2, 2),
            "codaprompt": (2, 2), "ease": (1, 2), "cl_lora": (2, 1.5), "tuna": (1, 3)}


@pytest.mark.parametrize("old", [0, 1])
@pytest.mark.parametrize("name", LEARNERS)
def test_a_case_measures_any_method(name: str, old: int) -> None:
    """After tasks that it has learned. Who makes no steps has none to time, but evaluates."""
    given = [f"{key}={value}" for key, value in OF_METHOD.get(name, {}).items() if key not in ("init_lr", "lrate")]
    measured = case.Case("step", old, **{**SMALL, "backbone": NAME}, model_name=name, overrides=given)
    learner = case.learner_after(case.config_of(measured), old, torch.device("cpu"))
    assert learner.task in (old, 0) and learner.config.model_name == name
    result = case.measure(measured)
    assert result["image_seconds"] > 0 and result["image_over_floor"] > 0 and result["peak_bytes"] >= 0
    if learner.steps_in(learner.task):
        assert result["step_seconds"] > 0 and result["step_over_floor"] > 0
    else:
        assert result["step_seconds"] is result["step_over_floor"] is None
    forwards = result.get("step_forwards"), result["image_forwards"]
    if name == "mos":
        assert forwards[0] == 1 and 1 <= forwards[1] <= old + 1
    elif old:
        assert forwards == FORWARDS.get(name, (1, 1))


def test_steps_are_taken_on_the_batch_and_then_the_data_are_the_stream_s_again() -> None:
    learner = case.learner_after(case.config_of(case.Case("step", 1, **{**SMALL, "backbone": NAME}, model_name="l2p")), 1,
                                 torch.device("cpu"))
    images, seen = torch.rand(2, 3, 16, 16, generator=generator(0, "x")), []
    own = learner.loss
    learner.loss = lambda x, y: seen.append(x) or own(x, y)
    case.train_on(learner, Quiet(), images, torch.tensor([10, 12]), 3)
    assert len(seen) == 3 and all(torch.equal(x, images) for x in seen)
    assert learner.data.images_in_batch(1, 0, 16) == 16 and len(next(learner.data.train_batches(1, 0, 16))[1]) == 16


def test_a_stopwatch_sets_every_span_against_the_pace_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now, events = [0.0], []
    monkeypatch.setattr("benchmarks.common.time.perf_counter", lambda: now[0])

    def take(seconds: float, name: str) -> None:
        now[0] += seconds
        events.append(name)

    speeds = iter([1.0, 1.0, 2.0, 4.0])  # the machine slows down; the first pace is not timed
    watch = case.Stopwatch(torch.device("cpu"), 2, lambda: lambda: take(10 * next(speeds), "pace"))
    for seconds in (100, 50, 12, 24):  # two to warm up, then 1.2 times the pace
        take(seconds, "step")
        watch.after_step()
    assert events == ["step", "step", "pace", "pace", "step", "pace", "step", "pace"]
    assert watch.median() == 18 and watch.over_pace() == pytest.approx(1.2)


@pytest.mark.slow
def test_the_step_command_prints_a_table_and_writes_json(tmp_path: Path, capsys) -> None:
    path = tmp_path / "new" / "step.json"
    arguments = ["--backbone", EMBEDDED, "--adapters", "0", "--batch", "2", "--rank", "2", "--steps", "1", "--warmup", "1",
                 "--repeats", "1", "--references", "--device", "cpu", "--output", str(path)]
    assert step.main(arguments) == 0
    record = json.loads(path.read_text())
    row, = record["rows"]
    assert row["adapters"] == 0 and row["memory_over_none"] == 1
    own, = (entry for entry in record["cases"] if entry["kind"] == "step")
    assert row["step_over_floor"] == own["step_over_floor"] and row["evaluation_over_timm"] == own["image_over_floor"]
    assert all(entry["peak_bytes"] > 2**20 for entry in record["cases"])
    assert {"command", "settings", "hardware", "versions"} <= set(record)
    assert "step / floor" in capsys.readouterr().out


def fake(kind: str, adapters: int, seconds: float, precision: str = "fp32") -> dict:
    return {"kind": kind, "adapters": adapters, "precision": precision, "step_seconds": seconds, "peak_bytes": 100 * seconds,
            "image_seconds": seconds / 10}


def test_summary_is_of_medians_and_says_what_was_left_out() -> None:
    options = step.parse(["--adapters", "0", "50", "--precision", "fp32", "bf16", "--references", "loop"])
    assert ("loop", 50, "fp32") not in step.keys_of(options) and step.keys_of(options).count(("loop", 0, "fp32")) == 1
    results = [fake("floor", 0, s) for s in (1.0, 2.0, 9.0)] + [fake("step", 0, 2.2), fake("step", 50, 3.0)]
    results += [{**fake("backbone", 0, 1.6), "flops": 32.0, "bf16_matmul_flops_per_second": 40.0}]
    results += [fake("loop", 0, 4.4), fake("step", 50, 1.5, "bf16"), {**fake("step", 0, 1.0, "bf16"), "error": "killed"}]
    summary = step.summarize(results, options)
    first, second, *_ = summary["rows"]
    assert first["step_over_floor"] == pytest.approx(1.1) and first["loop_over_step"] == pytest.approx(2)
    assert first["step_over_backbone"] == pytest.approx(2.2 / 1.6)
    assert second["rate_over_matmul"] == pytest.approx(32 / 3 / 40), "what the shorter backbone needs, per second of the step"
    assert second["loop_over_step"] == second["memory_over_loop"] == step.SKIPPED
    assert second["memory_over_none"] == pytest.approx(3 / 2.2)
    assert summary["bf16_speedup"] == {"0": None, "50": 2.0}
    assert "skipped: memory" in step.shown(summary) and "2 times as fast" in step.shown(summary)


def test_quotients_measured_side_by_side_are_preferred_to_those_of_seconds() -> None:
    options = step.parse(["--adapters", "0", "--precision", "fp32"])
    cases = [fake("floor", 0, 1.0), fake("loop", 0, 4.4)]
    cases += [{**fake(kind, 0, 2.2), "step_over_floor": quotient, "image_over_floor": 1.5}
              for kind, quotient in (("backbone", 0.8), ("step", 1.2), ("stacked", 1.8))]
    row, = step.summarize(cases, options)["rows"]
    assert row["step_over_floor"] == 1.2 and row["step_over_backbone"] == pytest.approx(1.5)
    assert row["stacked_over_step"] == pytest.approx(1.5) and row["evaluation_over_timm"] == 1.5
    assert row["loop_over_step"] == pytest.approx(2), "the loop leaves no memory for a floor beside it"


def test_a_method_without_steps_has_none_in_the_table() -> None:
    options = step.parse(["--model_name", "simplecil"])
    assert options.adapters == [0, 9] and ("backbone", 0, "fp32") in step.keys_of(options) and len(step.keys_of(options)) == 4
    cases = [fake("floor", 0, 1.0), fake("backbone", 0, 0.9)]
    cases += [{**fake("step", old, 1.0), "step_seconds": None, "step_over_floor": None, "image_over_floor": 0.9 + old}
              for old in (0, 9)]
    summary = step.summarize(cases, options)
    assert [row["tasks"] for row in summary["rows"]] == [0, 9] and summary["rows"][1]["evaluation_over_timm"] == 9.9
    assert summary["rows"][0]["step_seconds"] is summary["rows"][0]["step_over_floor"] is None
    assert "old tasks" in step.shown(summary) and "old adapters" not in step.shown(summary)


def test_methods_and_keys_that_there_are_not_are_refused(capsys) -> None:
    assert step.main(["--model_name", "l3p"]) == 2
    assert "error: 'model_name' is \"l3p\"" in capsys.readouterr().err
    assert step.main(["--model_name", "l2p", "--set", "pool=3"]) == 2
    assert "'pool'" in capsys.readouterr().err
    for arguments in (["--set", "pool_size=3"], ["--model_name", "l2p", "--references", "loop"]):
        with pytest.raises(SystemExit):
            step.parse(arguments)


def test_the_methods_command_has_a_row_for_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """A key is given to the methods that have it; medians are of the repeats; what fails has no numbers."""
    given = []

    def run_case(values: dict) -> dict:
        given.append(case.Case(**values))
        if given[-1].model_name == "aper":
            return {**values, "error": "killed"}
        return {**values, "step_over_floor": len(given), "image_over_floor": 2.5, "step_forwards": 2.0, "image_forwards": 2.0}

    monkeypatch.setattr(methods, "run_case", run_case)
    path, names = tmp_path / "methods.json", ["l2p", "aper"]
    assert methods.main(["--methods", *names, "--set", "pool_size=8", "--repeats", "3", "--output", str(path)]) == 1
    assert [(each.model_name, list(each.overrides)) for each in given] == [("l2p", ["pool_size=8"]), ("aper", [])] * 3
    rows = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in rows] == names
    assert rows[0] | {"method": ""} == {"method": "", "step_forwards": 2, "image_forwards": 2, "step_over_floor": 3,
                                        "image_over_floor": 2.5}
    assert set(rows[1].values()) == {"aper", None} and "forwards/step" in capsys.readouterr().out
    assert methods.parse([]).methods == list(LEARNERS)


def test_the_methods_command_refuses_keys_and_values_before_it_measures(capsys) -> None:
    assert methods.main(["--methods", "aper", "--set", "pool_size=3"]) == 2
    assert "'pool_size'" in capsys.readouterr().err
    assert methods.main(["--methods", "l2p", "--set", "pool_size=0"]) == 2
    assert "'pool_size' is 0" in capsys.readouterr().err
    assert methods.main(["--methods", "sdlora", "--set", "gate=gumbel"]) == 2
    assert "'gate' is \"gumbel\"" in capsys.readouterr().err


def test_a_step_benchmark_without_warmup_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        step.parse(["--warmup", "0"])
    assert refused.value.code == 2 and "--warmup and --steps" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [(["--classes", "3", "--tasks", "2"], "--classes: 3 is no multiple of --tasks 2"),
                                              (["--backbone", "nosuch"], "nosuch"), (["--device", "gpu"], "gpu")])
def test_the_run_command_says_mistakes_in_one_sentence(arguments: list[str], words: str, capsys) -> None:
    assert run.main(["--backbone", EMBEDDED, "--images", "200", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_the_run_command_accounts_for_all_of_the_time(tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.json"
    assert run.main(["--backbone", EMBEDDED, "--tasks", "2", "--classes", "4", "--images", "24", "--epochs", "2",
                     "--batch", "8", "--rank", "2", "--device", "cpu", "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record["parts"]) == {"data", "forward and backward", "optimizer", "evaluation", "saving", "other"}
    assert all(seconds > 0 for seconds in record["parts"].values())
    assert sum(record["parts"].values()) == pytest.approx(record["seconds"])
    assert [task["steps"] for task in record["tasks"]] == [4, 4], "12 images in batches of 8, twice"
    assert "forward and backward" in capsys.readouterr().out


def test_the_stream_command_compares_every_task_with_the_first(tmp_path: Path, capsys) -> None:
    path = tmp_path / "stream.json"
    assert stream.main(["--tasks", "3", "--images", "4", "--epochs", "1", "--batch", "4", "--rank", "2", "--device", "cpu",
                        "--output", str(path)]) == 0
    record = json.loads(path.read_text())
    assert [row["task"] for row in record["tasks"]] == [0, 1, 2] and record["tasks"][0]["over_first"] == 1
    assert "of 3 tasks within 15 percent" in capsys.readouterr().out
