"""The records (`results.json`) of finished runs: finding, checking and grouping them into streams and methods.

A method is a set of runs that differ in their draw alone: the seeds of the run and of its class order. A stream is what makes
methods comparable: the same data, cut into the same tasks, on the same frozen backbone. Runs of one stream and one draw must
have seen the same class order.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import models  # noqa: F401  (every key of every method)
from utils.config import config_of_record, title_of
from utils.config.file import read_config_file
from utils.config.keys import DataKeys
from utils.errors import UserError
from utils.runs.files import read_sealed_json
from utils.runs.folder import NOT_COMPARED, committed_form

RECORD = "results.json"
# Committed records, as docs/results/<study>/<name>/seed_<seed>.json.
_COMMITTED = re.compile(r"seed_\d+\.json")
_SEED_FOLDER = re.compile(r"seed_\d+")
_SET_ASIDE = re.compile(r"\.old-\d+$")  # by --overwrite
_NEEDED = ("finished", "config", "seed", "hardware", "backbone", "class_order_sha256", "tasks", "metrics")

# Keys of the config that say how images are read, not which.
_NOT_THE_STREAM = frozenset({"nb_tasks", "bad_images", "normalize", "order_seed"})
_STREAM_KEYS = tuple(key for key in DataKeys.model_fields if key not in _NOT_THE_STREAM)
_NOT_THE_METHOD = NOT_COMPARED | {"seed", "order_seed", "nb_tasks", "forward_transfer", *_STREAM_KEYS}


class Draw(NamedTuple):
    """What a run drew from: its seed, and that of its class order. Runs of two methods are paired by it."""

    seed: int
    order: int

    def __str__(self) -> str:
        return str(self.seed) if self.seed == self.order else f"{self.seed} (order {self.order})"


@dataclass(frozen=True)
class Run:
    """A finished run. `path`: its record. `names`: what to call its method, from short to longer and less ambiguous.

    `labelled`: the name tells it apart from runs of the same config, as one given on the command line does.
    """

    path: Path
    names: tuple[str, ...]
    result: Mapping[str, Any]
    labelled: bool = False

    @property
    def draw(self) -> Draw:
        seed, order = self.result["seed"], self.result["config"].get("order_seed")
        return Draw(seed, seed if order is None else order)


@dataclass(frozen=True)
class Found:
    """The finished runs below some paths, and a line for every run that is not finished."""

    runs: list[Run]
    unfinished: list[str]


@dataclass(frozen=True)
class Method:
    """Runs that differ in their draw alone, ascending."""

    name: str
    runs: dict[Draw, Run]


@dataclass(frozen=True)
class Stream:
    """Methods on the same tasks and backbone. `slug` names its pictures, empty when it is the only stream.

    `domains`: the image domain of every task where the data have such, else empty.
    """

    title: str
    slug: str
    tasks: int
    domains: tuple[str, ...]
    methods: list[Method]


# ---- finding


def find_runs(paths: Sequence[Path], labels: Mapping[Path, str] | None = None) -> Found:
    """The runs named by `paths`: records, folders with records anywhere below, study files.

    `labels`: names for the runs at or below a path; the deepest path wins. A copy of a record, or its committed form, is not a
    second run. Folders that `--overwrite` set aside are passed over. Raises UserError for a path or label without a run, and
    for damaged or foreign files.
    """
    runs: dict[str, Run] = {}
    unfinished: dict[str, None] = {}
    by_place = {path.resolve(): label for path, label in (labels or {}).items()}
    for path in paths:
        entries = list(_read(path))
        if not entries:
            raise UserError(f"{path}: no run is there; name a {RECORD}, a folder with runs below it, or a study file.")
        for place, names, result, apart in entries:
            if isinstance(result, str):
                unfinished[f"{place}: {result}"] = None
            else:
                digest = hashlib.sha256(json.dumps(committed_form(result), sort_keys=True).encode()).hexdigest()
                runs.setdefault(digest, _labelled(Run(place, names, result, apart), by_place))
    for path, label in (labels or {}).items():
        if not any(run.path.resolve().is_relative_to(path.resolve()) for run in runs.values()):
            raise UserError(f"--label: no finished run to be called '{label}' is at or below '{path}'; name the run's folder.")
    return Found(list(runs.values()), list(unfinished))


class _Entry(NamedTuple):
    """A place, names for its method, and its record or, in words, how far the run is. `apart`: it is no run of the method of
    another name, however like the configs."""

    place: Path
    names: tuple[str, ...]
    result: Mapping[str, Any] | str
    apart: bool = False


def _read(path: Path) -> Iterator[_Entry]:
    if path.is_dir():
        yield from _read_folder(path)
    elif not path.exists():
        raise UserError(f"{path}: there is no such file or folder.")
    elif path.name == RECORD or _COMMITTED.fullmatch(path.name):
        yield _read_record(path)
    else:
        content = read_config_file(path)
        if "base" in content:
            yield from _read_study(path)
        elif "tasks" in content:
            yield _read_record(path)
        else:
            raise UserError(f"{path}: is neither the record of a run nor a study file (which has the key 'base').")


def _read_folder(folder: Path) -> Iterator[_Entry]:
    for path in sorted(folder.rglob("*"), key=_natural):
        if any(part.startswith(".") or _SET_ASIDE.search(part) for part in path.relative_to(folder).parts):
            continue
        if path.name == RECORD or _COMMITTED.fullmatch(path.name):
            yield _read_record(path)
        elif path.name == "train.log" and not (path.parent / RECORD).exists():
            yield _Entry(path.parent, _names(path.parent / RECORD), "no task is finished")


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sorts numbers in names as numbers: `rank=2` before `rank=10`."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", path.as_posix())]


def _read_record(path: Path) -> _Entry:
    result = read_sealed_json(path)
    missing = [key for key in _NEEDED if key not in result]
    if missing:
        raise UserError(f"{path}: is not the record of a run (it has no '{missing[0]}'); leave it out.")
    if not result["finished"]:
        return _Entry(path, _names(path), f"{len(result['tasks'])} task{'s' * (len(result['tasks']) != 1)} finished, not all")
    return _Entry(path, _names(path), result)


def _read_study(path: Path) -> Iterator[_Entry]:
    """The runs of a study, finished here or with a committed record. What a search has chosen is a method of its own on the
    seeds that report it, without those that chose it."""
    from studies.study import load_study

    for run in load_study(path).runs():
        record, own = run.record(), run.folder / RECORD
        if record is None:
            yield _Entry(run.folder, (run.name,), "not finished")
        else:
            yield _Entry(own if own.exists() else run.recorded, (run.name,), record, run.reports)


def _names(path: Path) -> tuple[str, ...]:
    """Names for the method of the record at `path`: its folder (above `seed_<seed>`), then with the folders above it."""
    parts = list(path.resolve().parent.parts[1:])
    if path.name != RECORD and not _COMMITTED.fullmatch(path.name):
        parts.append(path.stem)
    elif len(parts) > 1 and _SEED_FOLDER.fullmatch(parts[-1]):
        parts.pop()
    return tuple("/".join(parts[-depth:]) for depth in range(1, min(len(parts), 4) + 1)) or ("run",)


def _labelled(run: Run, labels: Mapping[Path, str]) -> Run:
    above = [path for path in labels if run.path.resolve().is_relative_to(path)]
    if not above:
        return run
    return Run(run.path, (labels[max(above, key=lambda path: len(path.parts))],), run.result, labelled=True)


# ---- grouping


def group_runs(runs: Iterable[Run]) -> list[Stream]:
    """Streams with their methods, both in the order in which they first occur.

    Raises UserError when two runs of one stream and seed saw different class orders, test images or weights of the
    backbone, and for two different runs of the same method, seed and name.
    """
    by_stream: dict[tuple, list[Run]] = {}
    for run in runs:
        by_stream.setdefault(_stream_key(run.result), []).append(run)
    for members in by_stream.values():
        _check_same_data(members)
    slugs = _slugs([key[0] for key in by_stream])
    return [Stream(title, slug, tasks := _tasks(members[0].result),
                   tuple((members[0].result["config"].get("task_domains") or ())[:tasks]), _methods(members))
            for members, title, slug in zip(by_stream.values(), _titles(by_stream), slugs, strict=True)]


def _stream_key(result: Mapping[str, Any]) -> tuple:
    """What must agree for two runs to be compared; random weights of a backbone follow the seed, so they are only named."""
    config, backbone = _config(result), result["backbone"]
    weights = "random" if backbone["source"] == "random" else backbone["sha256"]
    network = ".".join(part for part in (backbone["name"], backbone["tag"]) if part)
    data = tuple(json.dumps(config.get(key), sort_keys=True) for key in _STREAM_KEYS if key not in ("dataset", "data_path"))
    folder = Path(config.get("data_path", "")).as_posix()
    size = result["tasks"][-1]["seen_classes"], _tasks(result)
    return title_of(config["dataset"]), network, size, folder, weights, *data


def _check_same_data(runs: Sequence[Run]) -> None:
    first: dict[Draw, Run] = {}
    for run in runs:
        other = first.setdefault(run.draw, run)
        for what, read in (("class orders", lambda result: result["class_order_sha256"]),
                           ("numbers of test images", lambda result: sum(result["tasks"][-1]["counts"]["images"])),
                           ("weights of the backbone", lambda result: result["backbone"]["sha256"])):
            if read(run.result) != read(other.result):
                raise UserError(f"{run.path}: has seed {run.draw} of the same stream as {other.path}, but their {what} "
                                "differ; they cannot be compared, leave one out.")


def _methods(runs: Sequence[Run]) -> list[Method]:
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault((_identity(run.result), run.names[0] if run.labelled else None), []).append(run)
    methods: list[list[Run]] = []
    for members in groups.values():
        if len({run.draw for run in members}) == len(members):
            methods.append(members)
            continue
        again: dict[str, list[Run]] = {}  # the same config ran twice: by name
        for run in members:
            again.setdefault(run.names[0], []).append(run)
        methods += [_one_per_draw(same) for same in again.values()]
    names = _unique_names(methods)
    return [Method(name, {run.draw: run for run in sorted(members, key=lambda run: run.draw)})
            for name, members in zip(names, methods, strict=True)]


def settings(result: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a record's config that make its method: without its draw, its stream, and what changes no result."""
    return {key: value for key, value in _config(result).items() if key not in _NOT_THE_METHOD}


def _identity(result: Mapping[str, Any]) -> str:
    return json.dumps(settings(result), sort_keys=True)


def _config(result: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a record; keys younger than the record have their defaults. As it stands where it is no config today."""
    try:
        return config_of_record(result["config"], "config").model_dump(mode="json")
    except UserError:
        return dict(result["config"])


def _one_per_draw(runs: list[Run]) -> list[Run]:
    by_draw: dict[Draw, Run] = {}
    for run in runs:
        other = by_draw.setdefault(run.draw, run)
        if run is not other:
            raise UserError(f"{run.path}: is another run of '{run.names[0]}' with seed {run.draw} than {other.path}; leave "
                            "one out, or name one with --label PATH=NAME.")
    return runs


def _unique_names(methods: Sequence[Sequence[Run]]) -> list[str]:
    """A name per method: that of its first run, longer where two would be the same, last of all with the keys that differ."""
    firsts = [members[0] for members in methods]
    depths = [1] * len(firsts)
    while True:
        names = [run.names[depth - 1] for run, depth in zip(firsts, depths, strict=True)]
        growing = [index for index, run in enumerate(firsts)
                   if names.count(names[index]) > 1 and depths[index] < len(run.names)]
        if not growing:
            break
        for index in growing:
            depths[index] += 1
    for name in {name for name in names if names.count(name) > 1}:
        same = [index for index, other in enumerate(names) if other == name]
        configs = [json.loads(_identity(firsts[index].result)) for index in same]
        keys = sorted({key for config in configs for key in config
                       if any(other.get(key) != config[key] for other in configs)})
        for number, (index, config) in enumerate(zip(same, configs, strict=True), start=1):
            detail = ", ".join(f"{key}={config.get(key)}" for key in keys) or str(number)
            names[index] = f"{firsts[index].names[0]} ({detail})"
    return names


def _tasks(result: Mapping[str, Any]) -> int:
    """Tasks of the stream, also where the method learned them all at once."""
    return len(result["tasks"][-1]["counts"]["images"])


def _titles(streams: Mapping[tuple, Sequence[Run]]) -> list[str]:
    """A line per stream; where two would be the same, with what else tells them apart."""
    titles, details = [], []
    for key, members in streams.items():
        dataset, network, (classes, _), folder, weights, *_ = key
        config, tasks = members[0].result["config"], _tasks(members[0].result)
        first, later = config["init_cls"], config["increment"]
        sizes = f"{first} classes" if first == later or tasks == 1 else f"{first}, then {later} classes"
        domains = f", domains {' '.join(config['task_domains'])}" if config.get("task_domains") else ""
        few = "".join(f", at most {config[key]} {kind}images of a class" for key, kind in
                      (("images_per_class", ""), ("test_images_per_class", "test ")) if config.get(key))
        word = "task" if config.get("scenario", "class") == "class" else "domain"
        titles.append(f"{dataset}, {tasks} {word}{'s' * (tasks > 1)} of {sizes}{domains}{few}, {network}")
        details.append(f"{classes} classes in all, data_path {folder}, shuffle {config['shuffle']}, weights {weights[:8]}")
    return [f"{title} ({detail})" if titles.count(title) > 1 else title
            for title, detail in zip(titles, details, strict=True)]


def _slugs(datasets: Sequence[str]) -> list[str]:
    """A short word per stream for file names, none for a single stream."""
    if len(datasets) == 1:
        return [""]
    plain = [re.sub(r"[^a-z0-9]+", "_", name.lower()) for name in datasets]
    return [name if plain.count(name) == 1 else f"{name}_{1 + plain[:index].count(name)}" for index, name in enumerate(plain)]

