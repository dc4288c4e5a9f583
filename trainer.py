"""One run: the stream of tasks, evaluation, checkpoints and results. It knows learners only by what `BaseLearner` offers."""

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backbone import FrozenViT, create_backbone
from models import LEARNERS, BaseLearner
from models.training import epochs_of
from utils import run_folder
from utils.config import Config, config_warnings
from utils.data import load_dataset
from utils.data_manager import DataManager
from utils.errors import UserError, unknown
from utils.files import write_json, write_torch
from utils.metrics import TaskCounts, count_predictions, summary
from utils.plots import write_pictures
from utils.progress import LOGGER, Progress
from utils.report import curve_lines, final_table, seeds_table
from utils.runtime import code_version, hardware, log_to_file, peak_memory, pick_device, reset_peak_memory, versions

CHECKPOINT = "checkpoint.pt"


def run(config: Config, overwrite: bool = False) -> list[dict[str, Any]]:
    """Runs every seed of the config in turn; returns the records (`results.json`) of all."""
    learner_class(config).check(config)
    device, warnings = pick_device(config.device)
    for warning in [*config_warnings(config), *warnings]:
        LOGGER.warning(warning)
    folders = {seed: run_folder.folder_of(config, seed) for seed in config.seed}
    for seed, folder in folders.items():
        if overwrite and (aside := run_folder.set_aside(folder)):
            LOGGER.info(f"--overwrite: what was in {folder} is now in {aside}")
        run_folder.check_owner(folder, run_folder.of_seed(config, seed))
    results = [Run(run_folder.of_seed(config, seed), seed, folder, device).finish() for seed, folder in folders.items()]
    if len(results) > 1:
        LOGGER.info(f"All seeds:\n{seeds_table(results)}")
    return results


def describe(config: Config) -> dict[str, Any]:
    """What `--dry-run` prints: resolved config, split and parameter counts; trains and writes nothing."""
    learner_class(config).check(config)
    device, warnings = pick_device(config.device)
    for seed in config.seed:
        run_folder.check_owner(run_folder.folder_of(config, seed), run_folder.of_seed(config, seed))
    backbone, data = build(config, config.seed[0], device)
    frozen = backbone.identity.parameters
    learner = learner_class(config)(config, data, backbone, config.seed[0], Progress(0, terminal=False))
    learner.begin_task(0)
    record = data.split_record()
    return {"config": config.model_dump(mode="json"), "warnings": [*config_warnings(config), *warnings], "device": str(device),
            "backbone": asdict(backbone.identity), "frozen_parameters": frozen,
            "trainable_parameters_task_0": learner.trainable_parameters(),
            "split": {"sha256": record["sha256"], "class_order": data.class_order, "task_sizes": data.task_sizes,
                      "train_images": [data.train_size(task) for task in range(data.nb_tasks)]}}


def learner_class(config: Config) -> type[BaseLearner]:
    """The method that `model_name` names."""
    if config.model_name not in LEARNERS:
        raise unknown("model_name", config.model_name, LEARNERS)
    return LEARNERS[config.model_name]


def build(config: Config, seed: int, device: torch.device) -> tuple[FrozenViT, DataManager]:
    """The frozen backbone and the stream of one seed; the data are looked for first, being the usual thing to miss."""
    dataset = load_dataset(config.dataset, config.data_path)
    backbone = create_backbone(config, seed)
    # Workers pay off beside a GPU; on the CPU they would take the cores that the network computes with.
    spare = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    workers = spare if config.num_workers is None else config.num_workers
    held_out = config.val_fraction if config.growth_rule == "val_loss" else 0.0
    data = DataManager(
        dataset, init_cls=config.init_cls, increment=config.increment, seed=seed, image_size=backbone.image_size,
        device=device, shuffle=config.shuffle, nb_tasks=config.nb_tasks, val_fraction=held_out,
        mean_std=backbone.mean_std if config.normalize == "backbone" else None, placement=config.data_placement,
        num_workers=workers)
    return backbone, data


def evaluate(learner: BaseLearner, data: DataManager, task: int, batch_size: int) -> TaskCounts:
    """Counts right and wrong predictions on the test images of every class seen up to `task`."""
    learner.start_evaluation()
    counts = TaskCounts.zeros(task + 1)
    for images, labels in data.eval_batches("test", range(data.seen_classes(task)), batch_size):
        counts += count_predictions(learner.predict(images), labels, data.task_of_class, task + 1)
    return counts


class Run:
    """One seed of a config in one folder, continued after its last finished task if it was interrupted."""

    def __init__(self, config: Config, seed: int, folder: Path, device: torch.device) -> None:
        self.config, self.seed, self.folder, self.device = config, seed, folder, device
        self.records: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}

    def finish(self) -> dict[str, Any]:
        """Trains what is left and returns the record; a run that has ended already is only reported."""
        done = run_folder.finished_result(self.folder)
        if done is not None:
            LOGGER.info(f"{self.folder} holds a finished run of this config; nothing is trained (--overwrite starts over).")
            self.result = done
            self._report()
            return done
        run_folder.claim(self.folder, self.config)
        with log_to_file(self.folder / "train.log"):
            self._prepare()
            try:
                self._stream()
            finally:
                self.progress.close()
            self._report()
            pictures = write_pictures(self.result, self.folder)
            LOGGER.info("Pictures: " + ", ".join(str(path) for path in pictures))
            LOGGER.info(f"Results: {self.folder / 'results.json'}, artifacts: {self.folder}")
        return self.result

    def _prepare(self) -> None:
        config = self.config
        backbone, self.data = build(config, self.seed, self.device)
        batches = [epochs_of(config, t) * self.data.steps_per_epoch(t, config.batch_size) for t in range(self.data.nb_tasks)]
        self.progress = Progress(sum(batches) if learner_class(config).trains else 0)
        self.learner = learner_class(config)(config, self.data, backbone, self.seed, self.progress)
        split = self.data.split_record()
        write_json(self.folder / "split.json", split)
        order = json.dumps(self.data.class_order).encode()
        self.result = {
            "finished": False, "config": config.model_dump(mode="json"), "seed": self.seed, "versions": versions(),
            "code": code_version(), "hardware": hardware(self.device), "backbone": asdict(backbone.identity),
            "class_order": self.data.class_order, "class_order_sha256": hashlib.sha256(order).hexdigest(),
            "split_sha256": split["sha256"], "tasks": self.records, "metrics": {}}
        LOGGER.info(f"Run: {config.dataset}, {self.data.nb_tasks} tasks, {config.model_name}, seed {self.seed}, "
                    f"{backbone.identity.name} on {self.device}, in {self.folder}")
        self.learner.announce()
        self._resume()
        self.progress.skip(sum(batches[:len(self.records)]) if learner_class(config).trains else 0)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise UserError(f"{path}: the checkpoint cannot be read; use --overwrite to start over.") from error
        self.learner.load_state(state["learner"])
        self.records[:] = json.loads(state["records"])
        LOGGER.info(f"Continuing after task {len(self.records) - 1}, from {path}")

    def _stream(self) -> None:
        for task in range(len(self.records), self.data.nb_tasks):
            started = time.monotonic()
            reset_peak_memory(self.device)
            self.learner.begin_task(task)
            trainable = self.learner.trainable_parameters()
            self.learner.train(lambda: _percent(self._counts(task)))  # noqa: B023
            report = self.learner.end_task()
            counts = self._counts(task)
            stored = self.learner.stored_tensors()
            saved = self.learner.save(self.folder)
            self.records.append({
                "task": task, "classes": self.data.task_sizes[task], "seen_classes": self.data.seen_classes(task),
                **asdict(report), "trainable_parameters": trainable,
                "stored_parameters": sum(tensor.numel() for tensor in stored),
                "stored_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
                "seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory(self.device),
                "counts": asdict(counts)})
            self._save(finished=task + 1 == self.data.nb_tasks)
            LOGGER.info(f"Saved: {', '.join(path.name for path in saved)} in {self.folder}")
            for line in curve_lines(self.result["metrics"]):
                LOGGER.info(line)

    def _counts(self, task: int) -> TaskCounts:
        return evaluate(self.learner, self.data, task, self.config.batch_size)

    def _save(self, finished: bool) -> None:
        self.result["metrics"] = summary([TaskCounts(**record["counts"]) for record in self.records])
        self.result["finished"] = finished
        write_torch(self.folder / CHECKPOINT, {"learner": self.learner.state(), "records": json.dumps(self.records)})
        write_json(self.folder / "results.json", self.result)

    def _report(self) -> None:
        for line in [*final_table(self.result).splitlines(), *curve_lines(self.result["metrics"])]:
            LOGGER.info(line)


def _percent(counts: TaskCounts) -> float:
    return 100 * sum(counts.top1) / sum(counts.images)
