"""What a study file says: its keys, their types, and what cannot stand together."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

import models  # noqa: F401  (every key of every method)
from utils.config import KeyGroup, known_keys
from utils.config import key as declared
from utils.config.file import read_config_file
from utils.config.load import allowed
from utils.config.rules import MAX_SEED, FilePath, Name, Seeds, as_list, distinct, escaped, show
from utils.errors import UserError, nearest

# Config keys that the study settles for every run (the device: its base, or --device), so that nothing in it may vary them.
_SETTLED = ("seed", "filepath", "device")
_OF_A_VARIANT = ("base", "grid")  # keys of a study that a variant may have too
_MARKS = ("base", "variants", "grid", "search", "jobs")  # keys that only a study has
_OF_SEARCHES = ("trials", "measure", "report_seed", "prune", "storage")  # without effect where nothing is searched
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,79}")
_SEEDS = f"an integer from 0 to {MAX_SEED}, or a list of different ones"

Measure = Literal["last_accuracy", "average_accuracy", "forgetting", "stored_bytes", "stored_parameters"]


class SlurmKeys(KeyGroup):
    """What a job asks Slurm for"""

    partition: Name | None = declared(None, "The partition.", unset="Slurm's own")
    minutes: int = declared(
        480, "Time limit of a job. A run that reaches it saves, and goes on in a job of its own.", ge=1)
    gpus: int = declared(1, "GPUs of a job.", ge=0)
    cpus: int = declared(4, "Processor cores of a job.", ge=1)
    memory_gb: int | None = declared(None, "Main memory of a job in GB.", unset="Slurm's own", ge=1)
    notice_seconds: int = declared(
        300, "How long before its time limit a job is told, so that its run can save.", ge=1)
    timeouts: int = declared(10, "How often a run may reach the time limit and go on. Preemptions do not count.", ge=0)
    account: Name | None = declared(None, "The account to charge.", unset="Slurm's own")
    qos: Name | None = declared(None, "The quality of service.", unset="Slurm's own")
    constraint: Name | None = declared(None, "Features that a job's machine must have.", unset="any machine")


class StudyFile(BaseModel):
    """The keys of a study file; a description says what the key may be.

    `null` for a config key in a variant or the grid stands for "as if the base did not give it": a variant of another method
    drops with it what has no effect there.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    base: FilePath = Field(..., description="the config file that the runs start from, relative to the study file")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description='an object of named changes such as {"small": {"rank": 4, "head_lr": null}}; '
                                          '"base" and "grid" among them are the variant\'s own')
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict, description='an object of lists of values such as {"rank": [4, 8]}')
    search: dict[str, Any] = Field(
        default_factory=dict, description='an object of lists and ranges such as {"rank": [4, 8], "lrate": {"low": 0.001, '
        '"high": 0.1, "log": true}}')
    trials: int | None = Field(None, ge=1, description="an integer of at least 1")
    measure: Annotated[list[Measure], BeforeValidator(as_list), Field(min_length=1, max_length=2),
                       AfterValidator(distinct)] = Field(
        ["last_accuracy"], description=f"one of {', '.join(map(show, Measure.__args__))}, or a list of two of them")
    seed: Seeds = Field(..., description=_SEEDS)
    report_seed: Seeds | None = Field(None, description=_SEEDS)
    prune: bool | None = Field(None, description="true or false")
    storage: FilePath | None = Field(None, description="a journal file or the URL of a database, as text")
    executor: Literal["local", "slurm"] = Field("local", description='"local" or "slurm"')
    slurm: SlurmKeys = Field(default_factory=SlurmKeys, description='an object such as {"partition": "gpu", "minutes": 480}')
    jobs: int | None = Field(None, ge=1, description="an integer of at least 1")
    filepath: FilePath | None = Field(None, description="the folder of the runs, as text")
    results: FilePath | None = Field(None, description="a folder of finished records, relative to the study file, as text")

    def base_of(self, variant: str) -> str:
        """The config file, relative to the study file, that runs of `variant` start from."""
        return self.variants.get(variant, {}).get("base", self.base)

    def changes_of(self, variant: str) -> dict[str, Any]:
        """The config keys that `variant` changes; none for "", the variant of a study without variants."""
        return {key: value for key, value in self.variants.get(variant, {}).items() if key not in _OF_A_VARIANT}

    def grid_of(self, variant: str) -> dict[str, list[Any]]:
        """The lists of values that runs of `variant` go through: the study's, then its own."""
        return {**self.grid, **self.variants.get(variant, {}).get("grid", {})}

    def place_of(self, key: str, variant: str) -> str:
        """Where the file varies `key` for runs of `variant`, in words."""
        return next((name for name in ("search", "grid") if key in getattr(self, name)), f"variant '{variant}'")

    def varied(self) -> Iterator[tuple[str, str]]:
        """Every config key that the file varies, with the place where it does, in words."""
        for name, variant in self.variants.items():
            yield from ((key, f"variant '{name}'") for key in [*self.changes_of(name), *variant.get("grid", {})])
        yield from ((key, "grid") for key in self.grid)
        yield from ((key, "search") for key in self.search)


def is_study(path: str | Path) -> bool:
    """Whether the file is a study and not a config; raises UserError for a file that cannot be read.

    What is no plain file, such as a shell's `<(...)`, can be read only once, and is left to the loader of configs.
    """
    return Path(path).is_file() and _marked(read_config_file(path))


def read_study_file(path: Path, changes: Mapping[str, tuple[Any, str]]) -> StudyFile:
    """The study in the file `path` with the `changes` of the command line to its own keys: key -> (value, option in words).

    Keys beginning with `_comment` are comments, in `variants`, in a variant and in `grid` too. Raises UserError.
    """
    source = escaped(str(path))
    values = {**_without_comments(read_config_file(path)), **{key: value for key, (value, _) in changes.items()}}
    for key in (key for key in values if key not in StudyFile.model_fields):
        hint = (" A change of the config goes into 'variants' or 'grid'." if key in known_keys() else
                nearest(key, StudyFile.model_fields) or f" A study has the keys {', '.join(StudyFile.model_fields)}.")
        raise UserError(f"{source}: '{escaped(key[:60])}' is not a key of a study.{hint}")
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error, values, source, changes)) from None
    for sentence in _mistakes(file):
        raise UserError(f"{source}{sentence}")
    return file


def read_base(path: Path, source: str) -> dict[str, Any]:
    """The values in the config file `path`, which the study `source` builds on."""
    try:
        values = read_config_file(path)
    except UserError as error:
        raise UserError(f"{source}: 'base' cannot be used: {error}") from None
    if _marked(values):
        raise UserError(f"{source}: 'base' cannot be used: {escaped(str(path))} is a study itself; name a config.")
    return values


def _marked(values: Mapping[str, Any]) -> bool:
    return not values.keys().isdisjoint(_MARKS)


def _without_comments(values: Any, depth: int = 3) -> Any:
    """`values` without comment keys, down to the objects inside `variants`; values of config keys are left alone."""
    if not isinstance(values, dict) or depth < 0:
        return values
    return {key: _without_comments(value, depth - 1) for key, value in values.items() if not key.startswith("_comment")}


def _sentence(error: ValidationError, values: Mapping[str, Any], source: str, changes: Mapping[str, tuple[Any, str]]) -> str:
    """The first problem in `error`."""
    problem = error.errors(include_url=False)[0]
    name, *inner = problem["loc"]
    field = StudyFile.model_fields[name]
    wanted = f"'{name}' must be {field.description}"
    if problem["type"] == "missing":
        return f"{source}: '{name}' must be given; it is {field.description}."
    origin, place = changes[name][1] if name in changes else source, f"'{name}' is {show(values[name])}"
    if inner and isinstance(values[name], dict) and inner[0] in values[name]:
        part = str(inner[0])
        place = f"'{escaped(part)}' in '{name}' is {show(values[name][part])}"
        if field.annotation is SlurmKeys:
            if part not in (fields := SlurmKeys.model_fields):
                hint = nearest(part, fields) or f" It can have {', '.join(fields)}."
                return f"{origin}: '{escaped(part[:60])}' in '{name}' is not known.{hint}"
            wanted = f"it must be {allowed(part, fields[part])}"
    return f"{origin}: {place}; {wanted}."


def _mistakes(file: StudyFile) -> Iterator[str]:
    """What the types let pass, each as the sentence that follows the file's name."""
    yield from _mistakes_of_a_search(file) if file.search else (
        f": '{name}' has no effect without 'search'; leave it out." for name in _OF_SEARCHES
        if name in file.model_fields_set)
    yield from _mistakes_of_slurm(file)
    for name, variant in file.variants.items():
        if not _NAME.fullmatch(name):
            yield (f": the variant {show(name)} is named unlike a folder; use at most 80 letters, digits and . _ + -, a "
                   "letter or digit first.")
        if "base" in variant and not (isinstance(variant["base"], str) and variant["base"]):
            wanted = StudyFile.model_fields["base"].description
            yield f", variant '{name}': 'base' is {show(variant['base'])}; it must be {wanted}."
        own = variant.get("grid", {})
        if not isinstance(own, dict) or not all(isinstance(items, list) and items for items in own.values()):
            wanted = StudyFile.model_fields["grid"].description
            yield f", variant '{name}': 'grid' is {show(own)}; it must be {wanted}."
        changed = file.changes_of(name)
        for key in [key for key in (*changed, *own) if key in file.grid] + [key for key in own if key in changed]:
            yield f": '{key}' is changed by the variant '{name}' and varied by 'grid'; leave out one of the two."
    for key, place in file.varied():
        if key in _SETTLED:
            where = "in the base, or on the command line" if key == "device" else "at the top of the study"
            yield f", {place}: '{key}' cannot vary within a study; give it {where}."
        if key not in known_keys():
            hint = nearest(key, known_keys()) or " docs/CONFIG.md lists the keys."
            yield f", {place}: '{escaped(key[:60])}' is not a key of the config.{hint}"
    grids = [("grid", file.grid), *((f"variant '{name}', grid", each.get("grid", {})) for name, each in file.variants.items())]
    for place, key, items in ((place, key, items) for place, grid in grids for key, items in grid.items()):
        same = [(isinstance(item, bool), item) for item in items]  # 1 is 1.0, but true is not 1
        for number, item in enumerate(items):
            if same[number] in same[:number]:
                yield f", {place}: '{key}' holds {show(item)} twice; leave out one of the two."


def _mistakes_of_slurm(file: StudyFile) -> Iterator[str]:
    notice, minutes = file.slurm.notice_seconds, file.slurm.minutes
    if notice >= 60 * minutes:
        yield (f": 'notice_seconds' in 'slurm' is {notice}, not less than its 'minutes' of {minutes}; a job would be told to "
               "end as it starts.")


def _mistakes_of_a_search(file: StudyFile) -> Iterator[str]:
    for name in ("variants", "grid"):
        if getattr(file, name):
            yield (f": '{name}' and 'search' cannot stand together; write the values as lists in 'search', or a study for "
                   "each variant.")
    if file.trials is None:
        yield f": 'trials' must be given with 'search'; it is {StudyFile.model_fields['trials'].description}."
    for seed in file.report_seed or []:
        if seed in file.seed:
            yield (f": {seed} is in 'seed', which selects, and in 'report_seed', which reports; a seed that has selected says "
                   "too much of what it selected.")
    if file.prune and len(file.measure) > 1:
        yield ": 'prune' is true, but of two measures none tells which trial is hopeless; leave it out, or name one measure."
