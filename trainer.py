"""One run: the stream of tasks, evaluation, checkpoints and results. It knows learners only by what `BaseLearner` offers."""

import hashlib
import json
import os
import signal
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from backbone import FrozenViT, create_backbone
from models import LEARNERS
from models.zero_shot import Reference
from utils.config import Config, config_warnings, title_of
from utils.data import load_datasets
from utils.data_manager import DataManager
from utils.errors import UserError
from utils.results.calibration import Calibration
from utils.results.metrics import TaskCounts, ZeroShot, kept_set, summary
from utils.results.plots import write_pictures
from utils.results.report import curve_lines, final_table, seeds_table, task_figures, transfer_line
from utils.results.tally import Counts, Tally
from utils.rng import global_state, restore_global_state
from utils.runs import distributed
from utils.runs import folder as run_folder
from utils.runs.checkpoint import Checkpoints
from utils.runs.distributed import on_main
from utils.runs.files import sha256_of, write_json, write_sealed_json
from utils.runs.lock import lock
from utils.runs.processes import place
from utils.runs.progress import LOGGER, Progress
from utils.runs.runtime import (
    AT_THE_START,
    WITHIN_A_RUN,
    code_version,
    environment,
    hardware,
    log_to_file,
    memory_may_run_out,
    peak_memory,
    pick_device,
    reset_peak_memory,
    use_deterministic_algorithms,
    versions,
    wait_for,
)
from utils.runs.signals import Signals, Stopped
from utils.runs.tracking import Tracking
from utils.runs.tracking import check as check_trackers


def run(config: Config, overwrite: bool = False) -> list[dict[str, Any]]:
    """Runs every seed of the config in turn; returns the records (`results.json`) of all.

    Of several processes each calls this; the main one alone touches folders.
    """
    if config.deterministic:
        use_deterministic_algorithms()
    device, warnings = pick_device(config.device)
    distributed.join(device)
    if config.batch_size < place().processes:
        raise UserError(f"batch_size: {config.batch_size} images cannot be shared by {place().processes} processes; raise it, "
                        "or start fewer.")
    on_main(check_trackers, config.trackers)
    for warning in [*config_warnings(config), *warnings]:
        LOGGER.warning(warning)
    folders = {seed: run_folder.folder_of(config, seed) for seed in config.seed}
    for seed, folder in folders.items():
        if not overwrite:
            on_main(run_folder.check_owner, folder, run_folder.of_seed(config, seed))
    results = [Run(run_folder.of_seed(config, seed), seed, folder, device).finish(overwrite)
               for seed, folder in folders.items()]
    if len(results) > 1:
        LOGGER.info(f"All seeds:\n{seeds_table(results)}")
    return results


def describe(config: Config, overwrite: bool = False) -> dict[str, Any]:
    """What `--dry-run` prints: resolved config, split and parameter counts; trains and writes nothing.

    overwrite: whatever a folder holds would be set aside."""
    device, warnings = pick_device(config.device)
    check_trackers(config.trackers)
    for seed in () if overwrite else config.seed:
        run_folder.check_owner(run_folder.folder_of(config, seed), run_folder.of_seed(config, seed))
    with memory_may_run_out(AT_THE_START):
        backbone, data = build(config, config.seed[0], device)
        frozen = backbone.identity.parameters
        kind = LEARNERS[config.model_name]
        learner = kind(config, kind.stream(data), backbone, config.seed[0], Quiet())
        learner.make_room(0)
    record = data.split_record()
    return {"config": config.model_dump(mode="json"), "warnings": [*config_warnings(config), *warnings], "device": str(device),
            "backbone": asdict(backbone.identity), "frozen_parameters": frozen,
            "trainable_parameters_task_0": learner.trainable_parameters(),
            "split": {"sha256": record["sha256"], "class_order": data.class_order, "task_sizes": data.task_sizes,
                      "train_images": [data.train_size(task) for task in range(data.nb_tasks)]}}


def build(config: Config, seed: int, device: torch.device) -> tuple[FrozenViT, DataManager]:
    """The frozen backbone and the stream of one seed; the data are looked for first, being the usual thing to miss."""
    datasets = distributed.in_turn(load_datasets, config.dataset, config.data_path, seed)
    backbone = distributed.in_turn(create_backbone, config, seed)
    processes = place().local_processes
    # Workers pay off beside a GPU; on the CPU they would take the cores that the network computes with.
    spare = min(8, (os.cpu_count() or 1) // processes) if device.type == "cuda" else 0
    workers = spare if config.num_workers is None else config.num_workers
    held_out = LEARNERS[config.model_name].held_out(config)
    data = DataManager(
        datasets, init_cls=config.init_cls, increment=config.increment, seed=seed, image_size=backbone.image_size,
        device=device, shuffle=config.shuffle, nb_tasks=config.nb_tasks, val_fraction=held_out,
        mean_std=backbone.mean_std if config.normalize == "backbone" else None, placement=config.data_placement,
        num_workers=workers, copies=processes, bad_images=config.bad_images, task_domains=config.task_domains,
        order_seed=config.order_seed, scenario=config.scenario, images_per_class=config.images_per_class,
        test_images_per_class=config.test_images_per_class)
    return backbone, data


class Quiet:
    """The session of a learner that nobody watches, evaluates or interrupts."""

    def __init__(self) -> None:
        self.progress = Progress(1, terminal=False)

    def evaluate(self) -> float:
        return 0.0

    def after_step(self) -> None:
        pass

    def track(self, figures: dict[str, float]) -> None:
        pass

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        pass


class Run:
    """One seed of a config in one folder. An unfinished run goes on from its newest whole checkpoint, within a task too.

    Of several processes each has a Run: all learn and count, the main one alone reads and writes the folder, and all come to
    the same decisions.
    """

    def __init__(self, config: Config, seed: int, folder: Path, device: torch.device) -> None:
        self.config, self.seed, self.folder, self.device = config, seed, folder, device
        self.checkpoints = Checkpoints(folder)
        self.signals = Signals()
        self.records: list[dict[str, Any]] = []
        self.result: dict[str, Any] = {}
        self.within_task = False  # the newest checkpoint lies within a task that has begun
        self.task_started = self.checkpoint_written = time.monotonic()
        self.steps = 0
        self.tested = 0.0  # seconds of the current task that went into `evaluate`
        self.trainable = 0  # scalars that it trains
        self.tracking = Tracking([], folder, {})  # in the main process it becomes one with trackers

    def finish(self, overwrite: bool = False) -> dict[str, Any]:
        """Trains what is left and returns the record; a run that has ended already is only reported.

        Raises utils.runs.signals.Stopped after a signal, with everything saved.
        """
        done = None if overwrite else on_main(run_folder.finished_result, self.folder)
        if done is not None:
            LOGGER.info(f"{self.folder} holds a finished run of this config; nothing is trained (--overwrite starts over).")
            on_main(self.checkpoints.remove_all)  # a kill between the last record and this would have left them
            self.result = done
            self._report()
            return done
        with memory_may_run_out(AT_THE_START):
            self._build()  # what refuses a config comes before the folder is touched, which then is nobody's
        if overwrite and (aside := on_main(run_folder.set_aside, self.folder)):
            LOGGER.info(f"--overwrite: what was in {self.folder} is now in {aside}")
        with ExitStack() as held, self.signals:
            on_main(self._take_folder, held)
            self._prepare()
            on_main(self._begin_tracking, held)
            try:
                with memory_may_run_out(WITHIN_A_RUN):
                    self._stream()
            finally:
                self.progress.close()
            self._report()
            pictures = sorted(self.folder.glob("*.png"))
            LOGGER.info("Pictures: " + ", ".join(str(path) for path in pictures))
            LOGGER.info(f"Results: {self.folder / 'results.json'}, artifacts: {self.folder}")
        return self.result

    # ---- what the learner may ask for while it learns (models.base.Session)

    def evaluate(self) -> float:
        """Accuracy in percent on the test images of every class seen so far."""
        began = time.monotonic()
        counts = self._counts(f"Task {self.learner.task}: evaluation", whole=True).tasks
        self.tested += time.monotonic() - began
        return 100 * sum(counts.top1) / sum(counts.images)

    def after_step(self) -> None:
        """Writes a checkpoint when one is due, and stops the run once a signal has come."""
        self.steps += 1
        due, received = self._asked()
        if due or received or (self.config.checkpoint_steps and self.steps % self.config.checkpoint_steps == 0):
            self._checkpoint()
        self._stop_on(received)

    def track(self, figures: dict[str, float]) -> None:
        """To the trackers, at a step that counts optimizer steps and finished tasks: some methods make no steps."""
        self.tracking.log(figures, self.steps + len(self.records))

    def work(self, title: str, done: int, total: int, whole: bool = False) -> None:
        """Shows work that is no optimizer step, and stops the run once a signal has come: with a checkpoint of what is done if
        the learner's state is `whole`, else the newest one is where the run goes on from."""
        self.progress.work(title, done, total)
        due, received = self._asked()
        if whole and (due or received):
            self._checkpoint()
        self._stop_on(received)

    def _asked(self) -> list[int]:
        """Whether a checkpoint is due, by the clock of any process, and the signal that any has received: the same in all."""
        due = time.monotonic() - self.checkpoint_written >= 60 * self.config.checkpoint_minutes
        return distributed.largest(due, self.signals.received or 0)

    # ---- the run

    def _take_folder(self, held: ExitStack) -> None:
        """Makes the folder this run's for as long as `held` is open, and has log lines go to it."""
        held.enter_context(lock(self.folder))
        held.enter_context(log_to_file(self.folder / "train.log"))
        run_folder.claim(self.folder, self.config)

    def _begin_tracking(self, held: ExitStack) -> None:
        self.tracking = Tracking(self.config.trackers, self.folder,
                                 {**self.config.model_dump(mode="json"), "seed": self.seed})
        held.callback(self.tracking.close)

    def _build(self) -> None:
        config = self.config
        backbone, self.data = build(config, self.seed, self.device)
        kind = LEARNERS[config.model_name]
        self.stream = kind.stream(self.data)
        self.reference = Reference(backbone, config, self.device) if config.forward_transfer else None
        self.learner = kind(config, self.stream, backbone, self.seed, self)
        self.task_steps = [self.learner.steps_in(task) for task in range(self.stream.nb_tasks)]
        self.progress = Progress(sum(self.task_steps), terminal=None if distributed.is_main() else False)

    def _prepare(self) -> None:
        config, identity = self.config, self.learner.backbone.identity
        split = self.data.split_record()
        on_main(write_json, self.folder / "split.json", split)
        order, view = json.dumps(self.data.class_order).encode(), self.data.test_view()
        self.result = {
            "finished": False, "config": config.model_dump(mode="json"), "seed": self.seed,
            "order_seed": self.data.order_seed, "versions": versions(),
            "code": code_version(), "hardware": hardware(self.device), "environment": environment(),
            "backbone": asdict(identity),
            "class_order": self.data.class_order, "class_order_sha256": hashlib.sha256(order).hexdigest(),
            "class_names": self.data.class_names, "test_view": view and asdict(view),
            "split_sha256": split["sha256"], "bad_images": self.data.bad_images, "tasks": self.records, "metrics": {}}
        LOGGER.info(f"Run: {title_of(config.dataset)}, {self.data.nb_tasks} tasks, {config.model_name}, seed {self.seed}, "
                    f"{identity.name} on {', '.join(self.result['hardware']['devices'])}, in {self.folder}")
        if self.data.bad_images:
            LOGGER.warning(f"{len(self.data.bad_images)} images cannot be decoded and are left out; results.json lists them.")
        self.learner.announce()
        self._resume()
        finished = sum(self.task_steps[:len(self.records)])
        self.progress.skip(finished + (self.learner.steps_done() if self.within_task else 0))

    def _resume(self) -> None:
        state, damaged = on_main(self.checkpoints.load)
        for line in damaged:
            LOGGER.warning(line)
        if state is None:
            return
        try:
            self.learner.load_state(state["learner"])
        except KeyError as missing:  # parts have names
            raise UserError(f"{self.folder}: its checkpoint is of other code and lacks {missing}; finish the run with that "
                            "code, or use --overwrite to start over.") from missing
        self.records[:] = json.loads(state["records"])
        self.within_task, self.steps, self.tested = state["within_task"], state["steps"], state.get("tested", 0.0)
        self.trainable = state.get("trainable", 0)
        self.task_started = time.monotonic() - state["seconds"]
        restore_global_state(state["random"])
        place = f"within task {len(self.records)}" if self.within_task else f"after task {len(self.records) - 1}"
        LOGGER.info(f"Continuing {place}, from the checkpoint in {self.folder}")

    def _stream(self) -> None:
        for task in range(len(self.records), self.stream.nb_tasks):
            reset_peak_memory(self.device)
            if not self.within_task:
                self.task_started, self.tested = time.monotonic(), 0.0
                self.learner.begin_task(task)
                self.trainable = self.learner.trainable_parameters()
            self.within_task = True
            self.learner.train()
            self.trainable = max(self.trainable, self.learner.trainable_parameters())  # a method may add while it trains
            self.progress.skip(self.task_steps[task] - self.learner.steps_done())  # a method may need fewer
            self._checkpoint()
            report = self.learner.end_task()
            wait_for(self.device)
            ended = time.monotonic()
            counts = self._counts(f"Task {task}: evaluation")
            evaluated = time.monotonic()
            before = self._zero_shot(task + 1)
            stored = self.learner.stored_tensors()
            files = on_main(self._save)
            peak, = distributed.largest(peak_memory(self.device))
            self.records.append({
                "task": task, "classes": self.stream.task_sizes[task], "seen_classes": self.stream.seen_classes(task),
                **asdict(report), "trainable_parameters": self.trainable,
                "stored_parameters": sum(tensor.numel() for tensor in stored),
                "stored_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
                "seconds": round(time.monotonic() - self.task_started, 3),
                "training_seconds": round(ended - self.task_started - self.tested, 3),
                "evaluation_seconds": round(evaluated - ended, 3), "peak_memory_bytes": peak,
                "files": files, "probe": self.learner.probe(), "counts": asdict(counts.tasks),
                "class_counts": asdict(counts.classes), "calibration": asdict(counts.calibration),
                "zero_shot": before and asdict(before)})
            self.within_task = False
            self.track(task_figures(self.records[-1], self._metrics()))
            self._checkpoint()
            self._write_results()
            LOGGER.info(f"Saved: {', '.join(files)} in {self.folder}")
            for line in curve_lines(self.result["metrics"]):
                LOGGER.info(line)
            self._stop_on(*distributed.largest(self.signals.received or 0))
        self._write_results()
        pictures = on_main(write_pictures, self.result, self.folder)
        self.tracking.show(pictures, self.steps + len(self.records))
        self._write_results(finished=True)
        on_main(self.checkpoints.remove_all)

    def _counts(self, title: str, whole: bool = False) -> Counts:
        tasks, size = self.stream.tasks_learned(self.learner.task), self.config.batch_size
        tally = Tally(self.data.seen_classes(tasks - 1), tasks, self.device)
        self.learner.start_evaluation()
        batches = self.data.test_batch_count(tasks - 1, size)
        for number, (images, labels, owners) in enumerate(self.data.test_batches(tasks - 1, size, distributed.part())):
            self.work(title, number, batches, whole)
            if len(labels):
                tally.add(self.learner.predict(images), labels, owners)
        distributed.add_up(*tally.sums)
        return tally.read()  # the only read of the device

    def _zero_shot(self, task: int) -> ZeroShot | None:
        """How well the network tells the classes of `task` apart, which it has not learned yet, beside the frozen one."""
        if self.reference is None or task == self.stream.nb_tasks:
            return None
        self.learner.start_evaluation()
        return self.reference.beside(self.learner, task)

    def _stop_on(self, received: int) -> None:
        if received:
            raise Stopped(signal.Signals(received))

    def _save(self) -> dict[str, str]:
        """Writes the task's artifacts; their names and SHA-256 sums."""
        return {path.name: sha256_of(path) for path in self.learner.save(self.folder)}

    def _checkpoint(self) -> None:
        on_main(self._write_checkpoint)
        self.checkpoint_written = time.monotonic()

    def _write_checkpoint(self) -> None:
        self.checkpoints.save({
            "learner": self.learner.state(), "records": json.dumps(self.records), "within_task": self.within_task,
            "seconds": time.monotonic() - self.task_started, "tested": self.tested, "steps": self.steps,
            "trainable": self.trainable,
            "random": global_state()})

    def _metrics(self) -> dict[str, Any]:
        metrics = summary([TaskCounts(**record["counts"]) for record in self.records],
                          [Calibration.of_record(record) for record in self.records],
                          [ZeroShot.of_record(record) for record in self.records])
        decided = self.records and all(record["kept"] is not None for record in self.records)
        needed = self.stream.needed_adapters(len(self.records))
        if needed and decided:
            metrics["kept_set"] = kept_set(
                needed, [bool(self.records[-1]["pruning_mask"][t]) for t in range(len(self.records))],
                [record["beta"] for record in self.records])
        return metrics

    def _write_results(self, finished: bool = False) -> None:
        self.result["metrics"], self.result["finished"] = self._metrics(), finished
        on_main(write_sealed_json, self.folder / "results.json", self.result)

    def _report(self) -> None:
        metrics = self.result["metrics"]
        for line in [*final_table(self.result).splitlines(), *curve_lines(metrics), transfer_line(metrics)]:
            LOGGER.info(line)
