"""The stream of tasks: order of the classes, splits, and batches of each task.

A task has classes, and in some streams a domain (utils/data/tasks.py). Classes are renumbered in the order in which they
arrive: "stream labels" 0, 1, 2, ... Everything here that is random is keyed by the seed and by what it is for (utils/rng.py),
so that neither the number of evaluations nor batch size, workers or interruptions move it (METHOD.md, invariants I8, I9 and
I10).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, repeat
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from utils.data import Dataset
from utils.data.domains import check_domains, first_appearances
from utils.data.lenses import through_lenses
from utils.data.portions import at_most, hold_out
from utils.data.readers import View, decoded_bytes, free_memory
from utils.data.series import Series, SeriesSource
from utils.data.sources import DecodedSource, EvaluationFileSource, FileSource, Source, TensorSource, TestView
from utils.data.tasks import Tasks, class_order, domain_tasks, task_sizes
from utils.errors import UserError, unknown
from utils.rng import generator
from utils.runs.distributed import parts_of_batches

PLACEMENTS = ("auto", "memory", "lazy")
_SHARE = 4  # images are kept in a memory if they take at most this fraction of what is free there
SplitName = Literal["train", "val", "test"]


class DataManager:
    """Cuts a data set, or one after another of several, into tasks and gives their batches. No task mixes two data sets.

    image_size: S, pixels of the square input. `val_fraction` of the training images of every class is held
    out as `val`. `mean_std`: channel means and standard deviations to normalise with; None leaves images in
    0..1. `placement`: "memory" keeps everything decoded, on the device if it fits there, else in main memory; "lazy" reads
    files when they are needed and leaves tensors off the device; "auto" is "memory" if that fits, else "lazy", where
    `copies` processes share this machine's main memory. `num_workers` processes read files.
    `bad_images`: "stop" raises UserError at the first file that cannot be decoded, "skip" decodes every file
    beforehand and leaves those out. `task_domains`: the image domain of every task (utils/data/domains.py); None shows
    all images as they are. `order_seed`: draws the class order, by default `seed` does. `scenario`: "class", new classes in
    every task, or "domain", the first `init_cls` classes in every task and another domain: those of `task_domains`, by default
    all that the data set has of its own. `images_per_class`: at most so many training images of every class are taken, before
    `val_fraction` is, and `test_images_per_class` test images; of a class that comes back, in every task.

    tasks: which classes each task has. class_order: natural labels of the stream's classes in their order. class_names: their
    names, in the same order. task_sizes: classes of each task. task_of_class: the task that brings each class, int64
    `[classes in the stream]`. bad_images: files that were left out.
    """

    def __init__(
        self,
        dataset: Dataset | Sequence[Dataset],
        *,
        init_cls: int,
        increment: int,
        seed: int,
        image_size: int,
        device: str | torch.device = "cpu",
        shuffle: bool = True,
        nb_tasks: int | None = None,
        val_fraction: float = 0.0,
        mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
        placement: str = "auto",
        num_workers: int = 0,
        copies: int = 1,
        bad_images: str = "stop",
        task_domains: list[str] | None = None,
        order_seed: int | None = None,
        scenario: str = "class",
        images_per_class: int | None = None,
        test_images_per_class: int | None = None,
    ) -> None:
        if placement not in PLACEMENTS:
            raise unknown("data_placement", placement, PLACEMENTS)
        self.series, self.seed, self.image_size, self.shuffle = Series(dataset), seed, image_size, shuffle
        self.device, self.placement, self.num_workers = torch.device(device), placement, num_workers
        self.copies = copies
        own = self.series.parts[0].domains  # a config with task_domains names a single data set
        if scenario == "domain":
            named = check_domains(task_domains, 0 if task_domains is None else len(task_domains), own) or list(own)
            self.tasks = domain_tasks(len(self.series.classes), init_cls, named, nb_tasks, self.series.parts[0].name)
            self.task_domains = named[: len(self.tasks.classes)]
        else:
            self.tasks = Tasks.of_sizes(task_sizes([len(part.classes) for part in self.series.parts], init_cls, increment,
                                                   nb_tasks))
            self.task_domains = check_domains(task_domains, len(self.tasks.classes), own)
        self.scenario, self.nb_tasks = scenario, len(self.tasks.classes)
        self.portions = {"images_per_class": images_per_class, "test_images_per_class": test_images_per_class}
        self.task_sizes, self.task_of_class = [len(classes) for classes in self.tasks.classes], self.tasks.task_of_class
        self.order_seed = seed if order_seed is None else order_seed
        order = self.series.class_order(lambda classes: class_order(classes, self.order_seed, shuffle))
        self.class_order = order[: self.tasks.seen[-1]]
        self.class_names = [self.series.classes[label] for label in self.class_order]
        self.bad_images: list[str] = []
        skip = bad_images == "skip"
        trained, test = (self._of_cells(self._usable(split, skip), number, own)
                         for number, split in enumerate(("train", "test")))
        trained, test = (at_most(count, key, members, self.tasks, order, seed)
                         for (key, count), members in zip(self.portions.items(), (trained, test), strict=True))
        if self.task_domains and not own:
            shown, (trained, test) = through_lenses(self.series.parts[0], self.tasks, self.task_domains, (trained, test), seed)
            self.series = Series(shown)
        train, val = hold_out(val_fraction, trained, self.tasks, order, self.class_names, seed)
        self._members = {"train": train, "val": val, "test": test}
        self._mean_std = None
        if mean_std is not None:
            self._mean_std = [torch.tensor(part, device=self.device).view(1, -1, 1, 1) for part in mean_std]

    def _usable(self, split: str, skip_bad: bool) -> list[np.ndarray]:
        """The split's images class by class in stream order, with `skip_bad` without those that cannot be decoded."""
        members = self.series.members(split, self.class_order)
        if not skip_bad:
            return members
        bad, paths = self.series.undecodable(split, np.concatenate(members))
        self.bad_images += paths
        usable = [images[~np.isin(images, bad)] for images in members]
        for images, name in zip(usable, self.class_names, strict=True):
            if len(images) == 0:
                raise UserError(f"data_path: no image of class '{name}' can be decoded; get the data set again.")
        return usable

    def _of_cells(self, members: list[np.ndarray], split: int, own: dict[str, tuple[np.ndarray, np.ndarray]]
                  ) -> list[np.ndarray]:
        """The images of every cell, from those of each class in a split (0 training, 1 test): all of its class, or where the
        data set has domains of its `own` those of the task's domain."""
        cells = [members[label] for label in self.tasks.label_of_cell]
        if not own or not self.task_domains:
            return cells
        domains = [self.task_domains[task] for task in self.tasks.task_of_cell]
        found = [np.intersect1d(images, own[domain][split], assume_unique=True)
                 for images, domain in zip(cells, domains, strict=True)]
        for images, label, domain in zip(found, self.tasks.label_of_cell, domains, strict=True):
            if len(images) == 0:
                raise UserError(f"task_domains: class '{self.class_names[label]}' has no image of the domain '{domain}'; "
                                f"choose another order or domain.")
        return found

    def task_classes(self, task: int) -> range:
        """Stream labels of the classes of `task`."""
        return self.tasks.classes[task]

    def seen_classes(self, task: int) -> int:
        """How many classes tasks 0 to `task` have together."""
        return self.tasks.seen[task]

    def task_cells(self, task: int) -> range:
        """What `task` has, for `eval_batches`: the numbers of its cells, which are its classes where none comes back."""
        return self.tasks.cells[task]

    def visits(self, task: int) -> tuple[int, int]:
        """How many tasks have the classes of `task`: before it, and in all. 0 and 1 for new classes that never come back."""
        return self.tasks.visits(task)

    def tasks_learned(self, task: int) -> int:
        """How many tasks of the stream as it was cut have been learned with `task`."""
        return task + 1

    def needed_adapters(self, tasks: int) -> list[bool] | None:
        """Which of the first `tasks` tasks bring a domain that came in none before, where domains recur: the right growth
        decision. None where that is not known."""
        return first_appearances(self.task_domains[:tasks]) if self.task_domains and self.scenario == "class" else None

    def train_size(self, task: int) -> int:
        """Training images of `task`, without the held-out ones."""
        return self.eval_size("train", self.task_cells(task))

    def steps_per_epoch(self, task: int, batch_size: int) -> int:
        """Batches of an epoch; the last may be smaller."""
        return -(-self.train_size(task) // batch_size)

    def images_in_batch(self, task: int, batch: int, batch_size: int) -> int:
        """Images of batch number `batch` of an epoch, in all its parts together."""
        return min(batch_size, self.train_size(task) - batch * batch_size)

    def train_batches(
        self, task: int, epoch: int, batch_size: int, skip: int = 0, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of `task`: images float32 `[b, 3, S, S]` and stream labels int64 `[b]`, both on the device.

        Order and augmentation depend on (seed, task, epoch, image) alone; the first `skip` batches are left out unread.
        `part` (k, n): of every batch only the k-th of n parts in a row, which are as equal as can be. Only this
        part is read; in an epoch's last batch it may be empty.
        """
        index, labels = self._shuffled(task, epoch)
        order, sizes = _end_to_end(parts_of_batches(len(index), batch_size, part, skip))
        images = self._sources["train"].train(index[order], View(self.seed, task, epoch), max(sizes, default=1))
        yield from zip(self._batches(images, sizes), torch.from_numpy(labels[order]).to(self.device).split(sizes), strict=True)

    def train_labels(self, task: int, epoch: int) -> Tensor:
        """Stream labels int64 `[n]` of `task`'s training images, on the device, in the order of that epoch's batches."""
        return torch.from_numpy(self._shuffled(task, epoch)[1]).to(self.device)

    def eval_size(self, split: SplitName, cells: range) -> int:
        """How many images `eval_batches` gives, in all parts together."""
        return sum(len(self._members[split][cell]) for cell in cells)

    def eval_batch_count(self, split: SplitName, cells: range, batch_size: int) -> int:
        """How many batches `eval_batches` gives."""
        return -(-self.eval_size(split, cells) // batch_size)

    def eval_batches(
        self, split: SplitName, cells: range, batch_size: int, part: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of `cells` (see `task_cells`) in `split` under the test transform, cell by cell, and their stream labels;
        `part` as in `train_batches`."""
        for images, _, labels in self._evaluated(split, cells, batch_size, part):
            yield images, labels

    def test_batches(self, task: int, batch_size: int, part: tuple[int, int] = (0, 1)
                     ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The test images of tasks 0 to `task`, their labels, and the task of every class seen as each image meets it, int64
        `[b, seen]`: utils/results/metrics.py wants it. `part` as in `train_batches`."""
        owners = self.tasks.owners[:, : self.tasks.seen[task]].to(self.device)
        for images, tasks, labels in self._evaluated("test", range(self.tasks.cells[task].stop), batch_size, part):
            yield images, labels, owners[tasks]

    def test_batch_count(self, task: int, batch_size: int) -> int:
        """How many batches `test_batches` gives."""
        return self.eval_batch_count("test", range(self.tasks.cells[task].stop), batch_size)

    def _evaluated(self, split: SplitName, cells: range, batch_size: int, part: tuple[int, int]
                   ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images under the test transform, their tasks and their labels."""
        index, numbers = self._gather(split, cells)
        order, sizes = _end_to_end(parts_of_batches(len(index), batch_size, part))
        source = self._sources["test" if split == "test" else "train"]
        tasks, labels = (torch.from_numpy(each[numbers[order]]).to(self.device)
                         for each in (self.tasks.task_of_cell, self.tasks.label_of_cell))
        images = self._batches(source.evaluate(index[order], max(sizes, default=1)), sizes)
        yield from zip(images, tasks.split(sizes), labels.split(sizes), strict=True)

    def _shuffled(self, task: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and stream labels of `task`'s training images in the order of an epoch."""
        index, cells = self._gather("train", self.task_cells(task))
        by_image = np.argsort(index)
        drawn = torch.randperm(len(index), generator=generator(self.seed, "order", task, epoch)).numpy()
        return index[by_image[drawn]], self.tasks.label_of_cell[cells[by_image[drawn]]]

    def _gather(self, split: SplitName, cells: range) -> tuple[np.ndarray, np.ndarray]:
        """Indices into the data set's split, cell by cell, and the numbers of their cells."""
        parts = [self._members[split][cell] for cell in cells]
        numbers = np.repeat(np.asarray(cells, dtype=np.int64), [len(part) for part in parts])
        return np.concatenate([np.empty(0, dtype=np.int64), *parts]), numbers

    def _batches(self, images: Iterator[Tensor], sizes: list[int]) -> Iterator[Tensor]:
        """Batches of these `sizes`, normalised; only the last can be 0, for which `images` gives none."""
        nothing = torch.empty(0, 3, self.image_size, self.image_size, device=self.device)
        given = chain(images, [nothing] if 0 in sizes else []) if any(sizes) else repeat(nothing, len(sizes))
        for batch, _ in zip(given, sizes, strict=True):
            if self._mean_std is not None:
                mean, std = self._mean_std
                batch = batch.sub_(mean).div_(std)
            yield batch

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Where the images come from; built on first use, since it may read the whole data set into memory."""
        trained = np.unique(np.concatenate(self._members["train"] + self._members["val"]))
        tested = np.unique(np.concatenate(self._members["test"]))
        home = self._home(self._decoded_bytes(trained, tested))
        return {"train": self._source("train", trained, home), "test": self._source("test", tested, home)}

    def _source(self, name: str, members: np.ndarray, home: torch.device | None) -> Source:
        """Of files that are augmented the decoded images may be kept; of those that are only tested the finished views."""
        sources = []
        for part, (split, own, _) in zip(self.series.parts, self.series.apart(name, members), strict=True):
            if isinstance(split.images, Tensor):
                where = home or torch.device("cpu")
                sources.append(TensorSource(split.images, part.augmentation, self.image_size, self.device, where))
                continue
            kept = DecodedSource if home == self.device else FileSource
            kind = kept if name == "train" else EvaluationFileSource
            sources.append(kind(split.images, own, part.augmentation, self.image_size, self.device, self.num_workers, home))
        return SeriesSource(sources, self.series.first_image[name]) if len(sources) > 1 else sources[0]

    def _home(self, needed: int) -> torch.device | None:
        """Where `needed` bytes of images are kept; None if nowhere."""
        main = torch.device("cpu")
        if self.placement == "lazy":
            return None
        if self.device != main and needed * _SHARE <= free_memory(self.device):
            return self.device
        return main if self.placement == "memory" or needed * self.copies * _SHARE <= free_memory() else None

    def _decoded_bytes(self, trained: np.ndarray, tested: np.ndarray) -> int:
        total = 0
        for split, own, _ in self.series.apart("train", trained):
            total += split.images.nbytes if isinstance(split.images, Tensor) else decoded_bytes(split.images, own)
        for split, own, _ in self.series.apart("test", tested):
            total += split.images.nbytes if isinstance(split.images, Tensor) else len(own) * 3 * self.image_size**2
        return total

    def test_view(self) -> TestView | None:
        """How `eval_batches` shows an image; None where the stream's data sets differ in that."""
        mean, std = (None, None) if self._mean_std is None else (part.flatten().tolist() for part in self._mean_std)
        views = [TestView(self.image_size, part.augmentation.test_resize, not isinstance(part.test.images, Tensor), mean, std)
                 for part in self.series.parts]
        return views[0] if all(view == views[0] for view in views) else None

    def split_record(self) -> dict[str, Any]:
        """What the run's split was, for its folder: classes and images of every task, with SHA-256 sums.

        `images` sums the images themselves: the bytes of tensors, the relative paths and sizes of files; of several data
        sets, of each.
        `sha256` sums the whole record, the images of every task included.
        """
        tasks = []
        for task in range(self.nb_tasks):
            classes = self.task_classes(task)
            entry: dict[str, Any] = {"task": task, "classes": [self.class_order[label] for label in classes]}
            for split in ("train", "val", "test"):
                index, _ = self._gather(split, self.task_cells(task))
                entry[split] = {
                    "images": len(index),
                    "sha256": hashlib.sha256(index.astype("<i8")).hexdigest(),
                }
            tasks.append(entry)
        record = {
            "dataset": self.series.name,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "class_order": self.class_order,
            "class_names": self.class_names,
            **({"task_domains": self.task_domains} if self.task_domains else {}),
            **({"scenario": self.scenario} if self.scenario != "class" else {}),  # so that older sums stay what they are
            **{key: count for key, count in self.portions.items() if count is not None},
            "images": {split: self.series.digest(split) for split in ("train", "test")},
            "tasks": tasks,
        }
        return {**record, "sha256": hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()}


class JoinedStream(DataManager):
    """The classes of another stream, with their images and in their order, as a single task."""

    def __init__(self, stream: DataManager) -> None:
        self.__dict__.update(stream.__dict__)
        self._stream = stream
        self.task_sizes, self.nb_tasks = [stream.tasks.seen[-1]], 1

    def task_classes(self, task: int) -> range:
        return range(self.task_sizes[task])

    def seen_classes(self, task: int) -> int:
        return self.task_sizes[task]

    def task_cells(self, task: int) -> range:
        return range(self.tasks.cells[-1].stop)

    def visits(self, task: int) -> tuple[int, int]:
        return 0, 1

    def tasks_learned(self, task: int) -> int:
        return self._stream.nb_tasks

    @property
    def _sources(self) -> dict[str, Source]:
        return self._stream._sources  # not read into memory a second time


def _end_to_end(parts: list[range]) -> tuple[np.ndarray, list[int]]:
    """The places of all batches in one array, and how many each has."""
    return np.concatenate([np.arange(0), *(np.arange(each.start, each.stop) for each in parts)]), list(map(len, parts))
