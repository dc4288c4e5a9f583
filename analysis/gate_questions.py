"""What people ask of a finished run, answered from its files (METHOD.md, section 5) and its images.

Every answer is made of plain Python values, ready for JSON, and says by which definition it was computed.
Shapes: T tasks finished, t a task, k an adapter, named by the task that it was learned with (k <= t), d features.
A gate record is the content of one `beta_values_task_<t>.pt`; the functions take those of tasks 0 to T - 1 in order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from models import SavedNetwork
from models.recipes.routed import RoutedNetwork
from utils.config import Config, config_of_record
from utils.data_manager import DataManager
from utils.errors import UserError
from utils.results.metrics import TaskCounts, count_predictions
from utils.runs.files import read_sealed_json, sha256_of

GateRecord = dict[str, Any]
Answer = dict[str, Any]

# Gate weights that differ by less are equal: what is left is the rounding of float32.
_EQUAL = 1e-6

ASKED = {
    "gate_weights": (
        "How did the gate weights move from task to task?",
        "Weights in force after each task's growth decision (`beta_after`); `-` is a pruned adapter, 0 one that is stored and "
        "does not take part. `moved` is the sum over the older adapters of how much their weight changed since the task "
        "before. With routed inference the weights are those of the key that the task belongs to, and a task of another key "
        "than the one before has others without any having moved."),
    "chosen": (
        "Which adapters are chosen most?",
        "An adapter is chosen at a task if it is in the gate's support there after the growth decision (not pruned, weight "
        "above 0); it can be from its own task on. Mean weight, and mean share of the sum of |beta * alpha| over all "
        "adapters, blocks and projections, are over all those tasks, with 0 where it is not chosen."),
    "without_adapter": (
        "Which old adapters help a new task?",
        "Accuracy on each task's test images with one adapter's gate weight set to 0, the other weights as they are and not "
        "renormalised, minus that of the whole network, in points: below 0, the adapter helps. The head stays as it was "
        "learned, so this is what the network loses, not how well one trained without the adapter would do. With routed "
        "inference the adapter is out of the network of every key, and `weight` is that under the key of the newest task."),
    "similarity": (
        "Does task similarity go with the gate weight?",
        "Similarity of two tasks: cosine between the means of their class-mean features (training images, test transform, "
        "frozen backbone without adapters). One pair for every task and every older adapter in the gate when that task's "
        "growth was decided, with the weight that the decision read (`beta_values`). Weights of one task sum to 1, so they "
        "shrink as adapters are added; the relative weight is that times the number of adapters in the gate. Pairs share "
        "tasks and are not independent, so that p tends to be too small: read it as a description, not as a test."),
    "routes": (
        "Where do images go?",
        "Share of each task's test images that goes to each key (named by the task that founded it), and the key that the "
        "task belongs to. Routed inference alone has keys."),
    "growth": (
        "How do adapters and stored bytes grow with the tasks?",
        "What is kept for the stream after each task: adapters in use, and everything stored besides the frozen backbone "
        "(adapters, magnitudes, gate, head)."),
}


@dataclass(frozen=True)
class FinishedRun:
    """The record of a run (`results.json`), its config, and its gate records."""

    folder: Path
    result: dict[str, Any]
    config: Config
    gates: list[GateRecord]


def read_run(folder: Path) -> FinishedRun:
    """Reads and verifies what the questions need.

    Raises UserError for a missing or damaged file and for a run without adapters.
    """
    path = folder / "results.json"
    if not path.is_file():
        seeds = sorted(folder.glob("seed_*/results.json"))
        hint = f"the folder of one seed, such as '{seeds[0].parent}'" if seeds else "the folder of a run ('filepath')"
        raise UserError(f"{path}: there is no such file; name {hint}.")
    result = read_sealed_json(path)
    config = config_of_record(result["config"], str(path))
    if not result["tasks"]:
        raise UserError(f"{folder}: no task has been finished there; run its command again.")
    if any(entry["beta_values"] is None for entry in result["tasks"]):
        raise UserError(f"{folder}: is a run of model_name '{config.model_name}', which has no adapters to ask about; name "
                        "one that has.")
    return FinishedRun(folder, result, config, [_gate_record(folder, entry) for entry in result["tasks"]])


def _gate_record(folder: Path, entry: dict[str, Any]) -> GateRecord:
    path = folder / f"beta_values_task_{entry['task']}.pt"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; restore it from a copy.")
    if sha256_of(path) != entry["files"].get(path.name):
        raise UserError(f"{path}: is not the file that the run wrote (its checksum does not fit); restore it from a copy.")
    return torch.load(path)


# ---- the answers


def gate_weights(gates: Sequence[GateRecord]) -> Answer:
    """Gate weights `[T][T]`, row t after task t, column k of adapter k; None where it is not there (yet or any more).

    `in_force` after the growth decision, `decision` as the decision read them. moved: `[T]`, None for task 0.
    """
    moved: list[float | None] = [None]
    for before, after in zip(gates, gates[1:]):
        moved.append(float((after["beta_after"][:-1].double() - before["beta_after"].double()).abs().sum()))
    return {"in_force": _matrix(gates, "beta_after", _kept), "decision": _matrix(gates, "beta_values", in_gate),
            "moved": moved}


def chosen(gates: Sequence[GateRecord]) -> Answer:
    """Per adapter: at how many of the tasks since its own it is in the support, its mean weight and share over those tasks."""
    weights, shares = np.zeros((2, len(gates), len(gates)))
    for t, record in enumerate(gates):
        weights[t, :t + 1] = record["beta_after"] * record["pruning_mask"][:t + 1]
        products = np.abs(weights[t, :t + 1, None, None] * record["alphas"].double().numpy()).sum((1, 2))
        shares[t, :t + 1] = products / products.sum() if products.sum() > 0 else 0.0
    stored = _kept(gates, len(gates) - 1)
    return {"adapters": [
        {"adapter": k, "chosen": int((weights[k:, k] > 0).sum()), "tasks": len(gates) - k,
         "mean_weight": float(weights[k:, k].mean()), "mean_share": float(shares[k:, k].mean()), "stored": k in stored}
        for k in range(len(gates))]}


def without_adapter(whole: TaskCounts, without: dict[int, TaskCounts], weights: dict[int, float]) -> Answer:
    """What each adapter is worth to each task, from the counts of the whole network and of those without one adapter.

    top1 (all classes seen compete), within (the task's own): the whole network's accuracy in percent by task, and that over
    all images as `all`. Of each adapter: its weight and the changes without it, in points.
    """
    full = {field: _percents(whole, field) for field in ("top1", "within")}
    adapters = []
    for k, counts in without.items():
        changes = {field: _differences(_percents(counts, field), accuracies) for field, accuracies in full.items()}
        adapters.append({"adapter": k, "weight": weights[k], **_by_task(changes)})
    return {"images": whole.images, **_by_task(full), "adapters": adapters}


def similarity(gates: Sequence[GateRecord], means: np.ndarray) -> Answer:
    """Spearman's correlation between task similarity and gate weight; `means` `[T, d]` are the tasks' mean features."""
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    cosines = unit @ unit.T
    pairs = [{"task": t, "adapter": k, "similarity": float(cosines[t, k]), "weight": weight,
              "relative_weight": weight * len(in_gate(gates, t))}
             for t in range(len(gates)) for k in in_gate(gates, t)[:-1] for weight in [float(gates[t]["beta_values"][k])]]
    columns = {name: np.array([pair[name] for pair in pairs]) for name in ("similarity", "weight", "relative_weight")}
    undefined = _undefined(columns["similarity"], columns["weight"])
    return {"cosines": cosines.tolist(), "pairs": pairs,
            **{name: _spearman(columns["similarity"], columns[name], undefined) for name in ("weight", "relative_weight")}}


def growth(result: dict[str, Any]) -> Answer:
    """Adapters in use, stored parameters and stored bytes after each task, and the fate of its own adapter."""
    names = ("task", "kept", "evicted", "active_adapters", "stored_parameters", "stored_bytes")
    return {"tasks": [{name: entry[name] for name in names} for entry in result["tasks"]]}


# ---- what is computed with the images


@torch.no_grad()
def task_means(backbone: nn.Module, data: DataManager, tasks: int, batch_size: int) -> np.ndarray:
    """For each task the mean of its classes' mean features, float64 `[T, d]`: every class counts the same.

    Training images (without held-out ones) under the test transform.
    """
    means = []
    for task in range(tasks):
        classes = data.task_classes(task)
        sums, images = 0, 0
        for batch, labels in data.eval_batches("train", data.task_cells(task), batch_size):
            members = nn.functional.one_hot(labels - classes.start, len(classes)).double()  # [b, c]
            sums, images = sums + members.T @ backbone(batch).double(), images + members.sum(0)
        means.append((sums / images[:, None]).mean(0).cpu().numpy())
    return np.stack(means)


def counts_without(network: SavedNetwork, data: DataManager, task: int, batch_size: int
                   ) -> Iterator[tuple[int | None, TaskCounts]]:
    """Counts on the test images of every class seen: of the whole network (None), then without each adapter (its task)."""
    yield None, count(network, data, task, batch_size)
    for adapter in network.bank.tasks:
        with network.without(adapter):
            yield adapter, count(network, data, task, batch_size)


def routes(network: RoutedNetwork, data: DataManager, task: int, batch_size: int) -> Answer:
    """The share of every task's test images that goes to each key, `[task + 1, K]`, and the key that the task belongs to."""
    shares = []
    for seen in range(task + 1):
        keys = []
        for images, _ in data.eval_batches("test", data.task_cells(seen), batch_size):
            network(images)
            keys.append(network.keys)
        went = torch.cat(keys)
        shares.append([(went == key).double().mean().item() for key in network.router.tasks])
    return {"keys": list(network.router.tasks), "key_of_task": list(network.route), "shares": shares}


def count(network: nn.Module, data: DataManager, task: int, batch_size: int) -> TaskCounts:
    """Counts on the test images of tasks 0 to `task`, as the trainer takes them."""
    counts = TaskCounts.zeros(task + 1)
    for images, labels, owners in data.test_batches(task, batch_size):
        counts += count_predictions(network(images), labels, owners, task + 1)
    return counts


def reproduced(counts: TaskCounts, recorded: TaskCounts, exact: bool, folder: Path) -> int:
    """Checks the rebuilt network's correct images by task against the run's record; returns the largest difference.

    `exact`: computed as the run computed, so that no image may differ. Otherwise (another device, other threads, bf16) one
    image or 1 % of a task's may, since rounding can turn a close decision. Raises UserError for more.
    """
    largest = 0
    for field in ("top1", "within"):
        pairs = zip(getattr(counts, field), getattr(recorded, field), counts.images, recorded.images, strict=True)
        for task, (right, expected, images, all_images) in enumerate(pairs):
            largest = max(largest, abs(right - expected))
            if images != all_images or abs(right - expected) > (0 if exact else max(1, images / 100)):
                raise UserError(f"{folder}: the network rebuilt from its files is right on {right} of {images} test images of "
                                f"task {task} ({field}), and results.json says {expected} of {all_images}; use the code and "
                                "the data of the run.")
    return largest


# ---- helpers


def in_gate(gates: Sequence[GateRecord], t: int) -> list[int]:
    """Adapters whose weights the decision of task t read: those not pruned before it, the newcomer last."""
    return [*(_kept(gates, t - 1) if t else []), t]


def _kept(gates: Sequence[GateRecord], t: int) -> list[int]:
    """Adapters that are stored after task t."""
    return [k for k in range(t + 1) if gates[t]["pruning_mask"][k]]


def _matrix(gates: Sequence[GateRecord], key: str, there: Callable[[Sequence[GateRecord], int], list[int]]
            ) -> list[list[float | None]]:
    rows = []
    for t, record in enumerate(gates):
        known = there(gates, t)
        rows.append([float(record[key][k]) if k in known else None for k in range(len(gates))])
    return rows


def _percents(counts: TaskCounts, field: str) -> list[float | None]:
    """Accuracy by task, None for a task without test images, and that over all images last."""
    right = getattr(counts, field)
    return [100 * part / whole if whole else None
            for part, whole in zip([*right, sum(right)], [*counts.images, sum(counts.images)], strict=True)]


def _differences(values: list[float | None], others: list[float | None]) -> list[float | None]:
    return [None if value is None else value - other for value, other in zip(values, others, strict=True)]


def _by_task(fields: dict[str, list[float | None]]) -> dict[str, dict[str, Any]]:
    return {field: {"all": values[-1], "tasks": values[:-1]} for field, values in fields.items()}


def _undefined(similarities: np.ndarray, weights: np.ndarray) -> str | None:
    """Why there is no rank correlation between the two, None where there is one."""
    if len(weights) < 3:
        return f"a correlation needs 3 pairs of a task and an older adapter, and this run has {len(weights)}"
    if np.ptp(weights) < _EQUAL:
        return f"all {len(weights)} gate weights are {weights[0]:.4g}, so there is nothing to correlate"
    if np.ptp(similarities) == 0:
        return "all tasks are equally similar, so there is nothing to correlate"
    return None


def _spearman(x: np.ndarray, y: np.ndarray, undefined: str | None) -> dict[str, Any]:
    if undefined is None and np.ptp(y) < _EQUAL:
        undefined = f"all {len(y)} values are {y[0]:.4g}, so there is nothing to correlate"
    if undefined is not None:
        return {"rho": None, "p": None, "pairs": len(x), "undefined": undefined}
    found = spearmanr(x, y)
    return {"rho": float(found.statistic), "p": float(found.pvalue), "pairs": len(x), "undefined": None}
