"""python -m analysis.gates: each answer against a recomputation that goes another way, and the command from end to end."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import rankdata

import trainer
from analysis.gate_answers import answer_all
from analysis.gate_pictures import FIGURES
from analysis.gate_questions import (
    chosen,
    counts_without,
    gate_weights,
    growth,
    read_run,
    reproduced,
    similarity,
    without_adapter,
)
from analysis.gate_tables import TABLES
from analysis.gates import main
from backbone import create_backbone
from models import load_network
from tests.helpers import small_config
from utils.data import load_dataset
from utils.errors import UserError
from utils.results.metrics import TaskCounts
from utils.runs.files import read_sealed_json, write_sealed_json

NAMES = ["gate_weights", "chosen", "without_adapter", "similarity", "growth"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three tasks of the digits; strong adapters, so that taking one out is seen."""
    path = tmp_path_factory.mktemp("run") / "run"
    trainer.run(small_config(path, growth_rule="none", optimizer="adam", init_alpha=4.0, gate_lr=0.003))
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, Any]:
    return answer_all(read_run(folder), None, None, "cpu", lambda line: None)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def record(mask: list[int], before: list[float], after: list[float], magnitudes: list[float]) -> dict[str, Any]:
    """A gate record of a network with two blocks; magnitudes are those of every block and projection."""
    return {"pruning_mask": torch.tensor(mask), "beta_values": torch.tensor(before), "beta_after": torch.tensor(after),
            "alphas": torch.tensor(magnitudes)[:, None, None].expand(-1, 2, 2)}


def stream() -> list[dict[str, Any]]:
    """Adapter 1 is pruned when task 2 is decided, adapter 3 at once; adapter 0 is once out of the support but stored."""
    return [record([1, 1, 1, 1], [1.0], [1.0], [2.0]),
            record([1, 1, 1, 1], [0.25, 0.75], [0.25, 0.75], [-1.0, 1.0]),
            record([1, 0, 1, 1], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0], [5.0, 0.0, 3.0]),
            record([1, 0, 1, 0], [0.5, 0.0, 0.25, 0.25], [0.625, 0.0, 0.375, 0.0], [1.0, 0.0, 1.0, 0.0])]


# ---- from the files alone


def test_gate_weights_are_the_records_with_gaps_where_there_is_no_adapter() -> None:
    answer = gate_weights(stream())
    first = [[1, None, None, None], [0.25, 0.75, None, None]]
    assert answer["in_force"] == [*first, [0, None, 1, None], [0.625, None, 0.375, None]]
    assert answer["decision"] == [*first, [0, 0.5, 0.5, None], [0.5, None, 0.25, 0.25]]
    assert answer["moved"] == [None, 0.75, 1.0, 0.625 + 0.625]


def test_chosen_counts_the_support_and_means_over_all_tasks_since_its_own() -> None:
    first, second, third, fourth = chosen(stream())["adapters"]
    assert first == {"adapter": 0, "chosen": 3, "tasks": 4, "mean_weight": (1 + 0.25 + 0 + 0.625) / 4,
                     "mean_share": (1 + 0.25 + 0 + 0.625) / 4, "stored": True}  # a negative magnitude counts by its size
    assert second == {"adapter": 1, "chosen": 1, "tasks": 3, "mean_weight": 0.25, "mean_share": 0.25, "stored": False}
    assert (third["chosen"], third["tasks"], third["mean_share"]) == (2, 2, (1 + 0.375) / 2)
    assert fourth == {"adapter": 3, "chosen": 0, "tasks": 1, "mean_weight": 0, "mean_share": 0, "stored": False}


def test_similarity_takes_the_pairs_that_were_in_the_gate() -> None:
    means = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]])
    answer = similarity(stream(), means)
    pairs = {(pair["task"], pair["adapter"]): pair for pair in answer["pairs"]}
    assert set(pairs) == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 2)}  # adapter 1 was still read by the decision on task 2
    assert pairs[2, 1]["similarity"] == pytest.approx(np.sqrt(0.5)) and pairs[2, 1]["weight"] == 0.5
    assert pairs[3, 2]["relative_weight"] == 0.25 * 3
    # Similarities .71, 0, .71, -.71, .71 have ranks 4, 2, 4, 1, 4; weights .25, 0, .5, .5, .25 ranks 2.5, 1, 4.5, 4.5, 2.5.
    rho = np.corrcoef([4, 2, 4, 1, 4], [2.5, 1, 4.5, 4.5, 2.5])[0, 1]
    assert answer["weight"]["rho"] == pytest.approx(rho) and answer["weight"]["pairs"] == 5
    assert 0 < answer["weight"]["p"] <= 1 and answer["weight"]["undefined"] is None


@pytest.mark.parametrize("tasks, reason", [(1, "this run has 0"), (2, "this run has 1"), (4, "all 6 gate weights are 1, so")])
def test_an_undefined_correlation_is_said_not_computed(tasks: int, reason: str) -> None:
    gates = [record([1] * tasks, [1.0] * (t + 1), [1.0] * (t + 1), [1.0] * (t + 1)) for t in range(tasks)]
    answer = similarity(gates, np.random.default_rng(0).normal(size=(tasks, 5)))
    for name in ("weight", "relative_weight"):
        assert answer[name]["rho"] is None and answer[name]["p"] is None and reason in answer[name]["undefined"]
    assert reason in TABLES["similarity"](answer) and "nan" not in TABLES["similarity"](answer)
    json.dumps(answer, allow_nan=False)


def test_a_gate_that_never_left_the_equal_share_has_no_relative_weights_to_rank() -> None:
    gates = [record([1] * 5, [1 / (t + 1)] * (t + 1), [1 / (t + 1)] * (t + 1), [1.0] * (t + 1)) for t in range(5)]
    answer = similarity(gates, np.random.default_rng(0).normal(size=(5, 4)))
    assert answer["weight"]["rho"] is not None  # it falls with the number of adapters
    assert answer["relative_weight"]["rho"] is None and "all 10 values are 1" in answer["relative_weight"]["undefined"]


def test_changes_are_in_points_and_a_task_without_images_has_none() -> None:
    whole, less = (TaskCounts([50, 0, 20], top1, top1, top1, [0, 0, 0]) for top1 in ([40, 0, 10], [35, 0, 12]))
    answer = without_adapter(whole, {1: less}, {1: 0.5})
    assert answer["top1"] == {"all": pytest.approx(100 * 50 / 70), "tasks": [80, None, 50]}
    assert answer["adapters"][0]["top1"] == {"all": pytest.approx(-300 / 70), "tasks": [-10, None, 10]}
    assert "-10.00" in TABLES["without_adapter"]({"task": 2, "largest_difference": 0, **answer})


def test_a_network_that_does_not_reproduce_the_run_is_refused() -> None:
    recorded = TaskCounts([200], [150], [200], [160], [0])
    near, far = (TaskCounts([200], [top1], [200], [160], [0]) for top1 in (151, 147))
    assert reproduced(recorded, recorded, True, Path("run")) == 0
    assert reproduced(near, recorded, False, Path("run")) == 1
    for counts, exact in ((near, True), (far, False)):
        with pytest.raises(UserError, match="is right on 1.. of 200 test images of task 0"):
            reproduced(counts, recorded, exact, Path("run"))


# ---- with the images of a real run


def by_hand(folder: Path, task: int, out: int | None) -> np.ndarray:
    """Top-1 and within-task accuracy in percent `[2, task + 1]`: each adapter added to the frozen weights by equation 1."""
    result = read_sealed_json(folder / "results.json")
    config = read_run(folder).config
    vit = create_backbone(config).vit
    gate, width = torch.load(folder / f"beta_values_task_{task}.pt"), vit.num_features
    for k in range(task + 1):
        adapter = load_file(folder / f"adapter_task_{k}.safetensors")
        for block, layer in enumerate(vit.blocks):
            for p, name in enumerate("qv"):
                factor = 0.0 if k == out else gate["beta_after"][k] * gate["alphas"][k, block, p]
                delta = adapter[f"blocks.{block}.{name}.B"] @ adapter[f"blocks.{block}.{name}.A"]
                layer.attn.qkv.weight[2 * p * width:(2 * p + 1) * width] += factor * delta
    head = load_file(folder / f"head_task_{task}.safetensors")
    data = trainer.build(config, result["seed"], torch.device("cpu"))[1]
    rows = []
    for t in range(task + 1):
        classes = list(data.task_classes(t))
        images, labels = next(iter(data.eval_batches("test", data.task_classes(t), 10_000)))
        with torch.no_grad():
            logits = vit(images) @ head["weight"].T + head["bias"]
        told = torch.tensor(classes)[logits[:, classes].argmax(1)]
        rows.append([100 * (logits.argmax(1) == labels).double().mean(), 100 * (told == labels).double().mean()])
    return np.array(rows).T


def test_without_adapter_is_what_adding_the_others_by_hand_gives(folder: Path, answers: dict[str, Any]) -> None:
    answer = answers["without_adapter"]
    assert answer["task"] == 2 and answer["largest_difference"] == 0
    assert [entry["adapter"] for entry in answer["adapters"]] == [0, 1, 2]
    tolerance = 100 / min(answer["images"]) + 1e-9  # sums in another order may turn one close decision
    whole = by_hand(folder, 2, None)
    assert np.allclose([answer["top1"]["tasks"], answer["within"]["tasks"]], whole, rtol=0, atol=tolerance)
    largest = 0.0
    for entry in answer["adapters"]:
        changes = np.array([entry["top1"]["tasks"], entry["within"]["tasks"]])
        assert np.allclose(changes, by_hand(folder, 2, entry["adapter"]) - whole, rtol=0, atol=2 * tolerance)
        largest = max(largest, np.abs(changes).max())
    assert largest > 4 * tolerance, "the adapters of this run matter too little to test anything"


def test_the_whole_network_has_the_accuracy_that_the_run_recorded(folder: Path, answers: dict[str, Any]) -> None:
    metrics = read_sealed_json(folder / "results.json")["metrics"]
    assert answers["without_adapter"]["top1"]["tasks"] == metrics["accuracy_matrix"][-1]
    assert answers["without_adapter"]["top1"]["all"] == metrics["last_accuracy"]
    assert answers["without_adapter"]["within"]["all"] == metrics["within_task_curve"][-1]


def test_taking_out_an_adapter_of_weight_zero_changes_nothing(folder: Path) -> None:
    run, network = read_run(folder), load_network(folder, 2)
    data = trainer.build(run.config, 1993, torch.device("cpu"))[1]
    beta = torch.tensor([0.4, 0.0, 0.6])
    network.beta = beta
    network.bank.merge(beta)
    found = dict(counts_without(network, data, 2, 64))
    assert list(found) == [None, 0, 1, 2]
    assert found[1] == found[None] and found[0] != found[None] != found[2]
    assert dict(counts_without(network, data, 2, 64)) == found  # the network is left as it was


def test_similarity_is_that_of_the_mean_features(folder: Path, answers: dict[str, Any]) -> None:
    result, config = read_sealed_json(folder / "results.json"), read_run(folder).config
    train = load_dataset(config.dataset, config.data_path).train
    vit = create_backbone(config).vit
    data = trainer.build(config, 1993, torch.device("cpu"))[1]
    means = []
    for first in (0, 2, 4):
        per_class = []
        for natural, label in zip(result["class_order"][first:first + 2], range(first, first + 2)):
            images, _ = next(iter(data.eval_batches("train", range(label, label + 1), 10_000)))
            assert len(images) == (train.labels == natural).sum()
            with torch.no_grad():
                per_class.append(vit(images).double().mean(0).numpy())
        means.append(sum(per_class) / 2)
    cosine = {(t, k): means[t] @ means[k] / np.sqrt(means[t] @ means[t] * (means[k] @ means[k]))
              for t, k in ((1, 0), (2, 0), (2, 1))}
    answer = answers["similarity"]
    assert {(pair["task"], pair["adapter"]) for pair in answer["pairs"]} == set(cosine)
    weights = {}
    for pair in answer["pairs"]:
        place = pair["task"], pair["adapter"]
        weights[place] = torch.load(folder / f"beta_values_task_{place[0]}.pt")["beta_values"][place[1]].item()
        assert pair["similarity"] == pytest.approx(cosine[place], abs=1e-5) and pair["weight"] == weights[place]
    ranks = [rankdata([values[place] for place in cosine]) for values in (cosine, weights)]
    assert answer["weight"]["rho"] == pytest.approx(np.corrcoef(ranks)[0, 1])


def test_growth_is_that_of_the_record(folder: Path) -> None:
    result = read_sealed_json(folder / "results.json")
    entries = growth(result)["tasks"]
    assert [entry["active_adapters"] for entry in entries] == [1, 2, 3]
    assert [entry["stored_bytes"] for entry in entries] == [entry["stored_bytes"] for entry in result["tasks"]]


# ---- the command


def test_the_command_writes_tables_pictures_and_json(copy: Path, answers: dict[str, Any], tmp_path: Path, capsys) -> None:
    output = tmp_path / "new" / "out"
    assert main([str(copy), "--task", "1", "--output", str(output), "--batch-size", "50", "--device", "cpu"]) == 0
    printed, said = capsys.readouterr()
    expected = {"gates.md", *(f"{name}.{kind}" for name in NAMES for kind in ("json", "png"))}
    assert {path.name for path in output.iterdir()} == expected
    assert not (copy / "gates").exists()
    text = (output / "gates.md").read_text()
    for name in NAMES:
        written = json.loads((output / f"{name}.json").read_text())
        assert written["question"] in printed and TABLES[name](written) in printed and TABLES[name](written) in text
        assert f"]({name}.png)" in text
        if name != "without_adapter":  # the others are about the whole run, and the batch size rounds at most
            assert TABLES[name](written) == TABLES[name](answers[name])
        with Image.open(output / f"{name}.png") as image:
            image.load()
    taken_out = json.loads((output / "without_adapter.json").read_text())
    assert taken_out["task"] == 1 and len(taken_out["images"]) == 2 and "Measured without adapter 1" in said


@pytest.mark.slow
def test_a_run_without_gate_has_nothing_to_correlate(tmp_path: Path, capsys) -> None:
    trainer.run(small_config(tmp_path / "run", gate="none"))
    assert main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "Undefined: all 3 gate weights are 1, so there is nothing to correlate." in capsys.readouterr().out
    weights = json.loads((tmp_path / "run" / "gates" / "gate_weights.json").read_text())
    assert weights["in_force"] == [[1, None, None], [1, 1, None], [1, 1, 1]] and weights["moved"] == [None, 0, 0]


def refused(capsys, *arguments: str) -> str:
    """The one sentence with which the command ends with status 2."""
    assert main([*arguments, "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    *progress, last = err.splitlines()
    assert out == "" and last.startswith("error: ") and not any("error" in line or "Trace" in line for line in progress)
    return last


def test_a_run_without_adapters_is_refused(tmp_path: Path, capsys) -> None:
    trainer.run(small_config(tmp_path / "run", model_name="simplecil"))
    capsys.readouterr()
    assert "'simplecil', which has no adapters" in refused(capsys, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "gates").exists()


@pytest.mark.parametrize("name", ["results.json", "beta_values_task_0.pt", "beta_values_task_2.pt", "head_task_2.safetensors",
                                  "adapter_task_1.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_damaged_file_is_named(name: str, damage: str, copy: Path, capsys) -> None:
    data = (copy / name).read_bytes()
    (copy / name).unlink()
    if damage == "changed":
        (copy / name).write_bytes(data[:100] + b"?" + data[101:])
    assert f"{name}:" in refused(capsys, str(copy)) and not list(copy.glob("gates/*"))


def test_other_mistakes_are_one_sentence(copy: Path, tmp_path: Path, capsys) -> None:
    assert "--task" in refused(capsys, str(copy), "--task", "3") and "--task" in refused(capsys, str(copy), "--task", "-1")
    assert main([str(copy), "--device", "gpu"]) == 2 and "--device" in capsys.readouterr().err
    (tmp_path / "seeds").mkdir()
    copy.rename(tmp_path / "seeds" / "seed_7")
    assert "seed_7" in refused(capsys, str(tmp_path / "seeds"))
    (tmp_path / "file").write_text("")
    assert "--output" in refused(capsys, str(tmp_path / "seeds" / "seed_7"), "--output", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--batch-size", "0"])


def test_other_images_and_another_accuracy_are_refused(copy: Path, capsys) -> None:
    result = read_sealed_json(copy / "results.json")
    write_sealed_json(copy / "results.json", {**result, "split_sha256": "0" * 64})
    assert "are not those of the run" in refused(capsys, str(copy))
    result["tasks"][2]["counts"]["top1"][0] += 5
    write_sealed_json(copy / "results.json", result)
    assert "results.json says" in refused(capsys, str(copy))


# ---- pictures


def long_answers(tasks: int) -> dict[str, Any]:
    """Answers about a stream of so many tasks in which every fifth adapter is kept."""
    mask = [int(k % 5 == 0) for k in range(tasks)]
    draw = np.random.default_rng(tasks)
    gates = []
    for t in range(tasks):
        before = draw.dirichlet([1.0] * (t + 1)) * [mask[k] or k == t for k in range(t + 1)]
        gates.append(record([*mask[:t + 1], *([1] * (tasks - t - 1))], before.tolist(), (before * mask[:t + 1]).tolist(),
                            [1.0] * (t + 1)))
    counts = {k: TaskCounts([100] * tasks, *[draw.integers(40, 60, tasks).tolist() for _ in range(3)], [0] * tasks)
              for k in [-1, *(k for k in range(tasks) if mask[k])]}
    whole = counts.pop(-1)
    entries = [{"task": t, "kept": bool(mask[t]), "evicted": [], "active_adapters": sum(mask[:t + 1]),
                "stored_parameters": 10 ** 6 * sum(mask[:t + 1]), "stored_bytes": 4 * 10 ** 6 * sum(mask[:t + 1])}
               for t in range(tasks)]
    return {"gate_weights": gate_weights(gates), "chosen": chosen(gates),
            "without_adapter": {"task": tasks - 1, "largest_difference": 0,
                                **without_adapter(whole, counts, dict.fromkeys(counts, 0.1))},
            "similarity": similarity(gates, draw.normal(size=(tasks, 8))), "growth": growth({"tasks": entries})}


RUN = {"config": {"dataset": "digits", "model_name": "sdlora", "gate": "gumbel_sparsemax"}, "seed": 1993}


def overlapping(figure: Figure) -> list[str]:
    """Tick labels that touch the next one, and anything off the page."""
    figure.draw_without_rendering()
    renderer, found = figure._get_renderer(), []
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, ("x0", "x1")), (axes.yaxis, ("y0", "y1"))):
            start, stop = sorted(axis.get_view_interval())
            labels = [tick.label1 for tick in axis.get_major_ticks() if start <= tick.get_loc() <= stop]
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_visible() and label.get_text()]
            spans = sorted((getattr(box, low), getattr(box, high)) for box in boxes)
            found += [f"ticks {axis}" for first, second in zip(spans, spans[1:]) if first[1] >= second[0]]
            boxes += [axis.label.get_window_extent(renderer)] if axis.label.get_text() else []
            found += [f"off the page {axis}" for box in boxes
                      if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1]
    return found


@pytest.mark.parametrize("tasks", [1, 10, 50])
def test_pictures_and_tables_hold_short_and_long_streams(tasks: int) -> None:
    for name, answer in long_answers(tasks).items():
        assert overlapping(FIGURES[name](answer, RUN)) == [], name
        lines = TABLES[name](answer).splitlines()
        assert max(len(line) for line in lines) <= 160, name
        json.dumps(answer, allow_nan=False)


def test_the_pictures_show_the_numbers() -> None:
    answer = gate_weights(stream())
    upper, lower = FIGURES["gate_weights"](answer, RUN).axes[:2]
    shown = np.ma.filled(upper.images[0].get_array().astype(float), np.nan)
    assert np.array_equal(shown.T, np.array(answer["in_force"], dtype=float), equal_nan=True)
    assert {(x, y) for y, x in np.argwhere(~np.ma.getmaskarray(upper.images[1].get_array()))} == {(2, 1), (3, 1), (3, 3)}
    assert [bar.get_height() for bar in lower.patches[1:]] == answer["moved"][1:]
    drawn = FIGURES["without_adapter"](long_answers(10)["without_adapter"], RUN).axes[1].images[0].get_array()
    expected = [entry["within"]["tasks"] for entry in long_answers(10)["without_adapter"]["adapters"]]
    assert np.allclose(drawn, expected)
