"""All answers about one run: loads it, asks the questions, writes what came out."""

import textwrap
from collections.abc import Callable
from pathlib import Path

from analysis.gate_pictures import FIGURES, png
from analysis.gate_questions import (
    ASKED,
    Answer,
    FinishedRun,
    chosen,
    counts_without,
    gate_weights,
    growth,
    reproduced,
    routes,
    similarity,
    task_means,
    without_adapter,
)
from analysis.gate_tables import TABLES
from models import load_network
from models.recipes.routed import RoutedNetwork
from trainer import build
from utils.config import config_from_dict, title_of
from utils.errors import UserError
from utils.results.metrics import TaskCounts
from utils.runs.files import write_bytes, write_json
from utils.runs.runtime import hardware, pick_device, versions

Say = Callable[[str], None]


def task_of(run: FinishedRun, task: int | None) -> int:
    """The task that is asked for, by default the last; raises UserError for one that is not finished."""
    last = len(run.gates) - 1
    if task is not None and not 0 <= task <= last:
        raise UserError(f"--task: {run.folder} has finished tasks 0 to {last}, not {task}; choose one of those.")
    return last if task is None else task


def answer_all(run: FinishedRun, task: int | None, batch_size: int | None, device: str, say: Say) -> dict[str, Answer]:
    """The answer to every question; `say` gets lines on the progress.

    task: whose network adapters are taken out of, by default the last. batch_size: by default the run's. Raises UserError for
    missing or damaged files, other images than the run had, and a network that does not reproduce the accuracy that the run
    recorded.
    """
    folder, task = run.folder, task_of(run, task)
    config = config_from_dict({**run.config.model_dump(mode="json"), "device": device}, options={"device": "--device"})
    place, warnings = pick_device(config.device)
    for warning in warnings:
        say(warning)
    network = load_network(folder, task).to(place)
    backbone, data = build(config, run.result["seed"], place)
    if data.split_record()["sha256"] != run.result["split_sha256"]:
        raise UserError(f"{folder}: the images under data_path '{config.data_path}' are not those of the run; put the run's "
                        "data set there.")
    size = batch_size or config.batch_size
    beta = run.gates[task]["beta_after"][network.bank.tasks].to(place)
    exact = size == config.batch_size and _computes_alike(run, hardware(place))
    counts: dict[int | None, TaskCounts] = {}
    for adapter, found in counts_without(network, data, task, size):
        counts[adapter] = found
        if adapter is None:
            difference = reproduced(found, TaskCounts(**run.result["tasks"][task]["counts"]), exact, folder)
        say("Measured the whole network" if adapter is None else f"Measured without adapter {adapter}")
    whole = counts.pop(None)
    say("Computing the features of the frozen backbone")
    means = task_means(backbone.to(place), data, len(run.gates), size)
    weights = dict(zip(network.bank.tasks, beta.tolist(), strict=True))
    answers = {
        "gate_weights": gate_weights(run.gates), "chosen": chosen(run.gates),
        "without_adapter": {"task": task, "largest_difference": difference, **without_adapter(whole, counts, weights)},
        "similarity": similarity(run.gates, means), "growth": growth(run.result)}
    if isinstance(network, RoutedNetwork):
        answers["routes"] = routes(network, data, task, size)
    return {name: {"question": question, "definition": definition, **answers[name]}
            for name, (question, definition) in ASKED.items() if name in answers}


def _computes_alike(run: FinishedRun, here: dict) -> bool:
    """Whether this process computes as the run did, to the bit (METHOD.md, invariant I3)."""
    there = run.result["hardware"]
    same = all(there.get(key) == here[key] for key in ("device", "name", "threads"))
    plain = run.config.precision == "fp32" and not run.config.compile
    return same and plain and run.result["versions"]["torch"] == versions()["torch"]


def report(run: FinishedRun, answers: dict[str, Answer], pictures: bool = False) -> str:
    """Questions, definitions and tables as Markdown; with `pictures` links to them too."""
    config, tasks = run.config, len(run.gates)
    state = "" if run.result["finished"] else " so far (the run is not finished)"
    gate = f", gate {config.gate}" if hasattr(config, "gate") else ""
    parts = [f"# What the gate learned: {title_of(config.dataset)}, {config.model_name}{gate}, seed {run.result['seed']}, "
             f"{tasks} tasks{state}"]
    for number, (name, answer) in enumerate(answers.items(), 1):
        parts += [f"## {number}. {answer['question']}", textwrap.fill(answer["definition"], 110), TABLES[name](answer)]
        if pictures:
            parts.append(f"![{answer['question']}]({name}.png)")
    return "\n\n".join(parts) + "\n"


def write(run: FinishedRun, answers: dict[str, Answer], folder: Path) -> None:
    """Writes `<name>.json` and `<name>.png` of every answer, and `gates.md`."""
    for name, answer in answers.items():
        write_json(folder / f"{name}.json", answer)
        write_bytes(folder / f"{name}.png", png(FIGURES[name](answer, run.result)))
    write_bytes(folder / "gates.md", report(run, answers, pictures=True).encode())
