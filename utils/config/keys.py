"""The config of a run: how a key is declared, and the keys that every run has.

Each key is documented where it is declared; those of a method, gate, head or growth rule stand in its own file
(utils/config/components.py). `python -m tools.config` makes the tables of `docs/CONFIG.md` and the schema in
`exps/config.schema.json` from the declarations.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from utils.config.rules import (
    MAX_SEED,
    Devices,
    FilePath,
    Name,
    NameOrNames,
    NoFixedMemory,
    NoMemory,
    OneSeed,
    Seeds,
    Text,
    Trackers,
)


class KeyGroup(BaseModel):
    """Keys that belong together. The docstring of a group is its title where the keys are described.

    Types are strict: no text for a number, no 1000.0 for an integer.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def key(default: Any, meaning: str, *, unset: str = "", allowed: str = "", derive: Callable[[Any], Any] | None = None,
        idle: Any = ..., **limits: Any) -> Any:
    """A key of a `KeyGroup`.

    unset: what a default of null means, in words; `derive` gives that value from the config where it follows from other
    keys. allowed: what the type leaves unsaid. idle: a value that asks for nothing, and so may stand where the key has no
    effect. limits: pydantic's, such as `ge=1`.
    """
    told = _Told(unset, allowed, derive, idle)
    return Field(default, description=meaning, json_schema_extra=told, **limits)


class _Told(NamedTuple):
    """What a key's declaration says besides pydantic's own; as pydantic wants it, a function that leaves a schema alone."""

    unset: str
    allowed: str
    derive: Callable[[Any], Any] | None
    idle: Any

    def __call__(self, schema: dict[str, Any]) -> None:
        pass


def told(field: FieldInfo, what: str) -> Any:
    """What `key` was given as `unset`, `allowed`, `derive` or `idle`."""
    return getattr(field.json_schema_extra, what)


class RunKeys(KeyGroup):
    """Run"""

    prefix: Text = key("", "A label of your own, kept with the run and its results; it changes nothing else.")
    model_name: Name = key("sdlora", "The class-incremental method.")
    device: Devices = key(
        ["auto"],
        'Where to run: `"auto"` is the first CUDA device if there is one, else the CPU. A CUDA device that '
        "is not there is replaced by the CPU with a warning. A single device may stand without the list. Several "
        'start a process each, which share every batch; `["cpu", "cpu"]` is two processes on the CPU. See '
        "docs/DISTRIBUTED.md.",
        allowed='"auto", "cpu", or a list of different CUDA devices such as "0" or "cuda:0"; "cpu" may be repeated')
    seed: Seeds = key(
        [1993],
        "Seeds of the class order, the initial weights and every other draw; each is a run of its own. A "
        "single number may stand without the list. SD-LoRA was published with 1993 to 1997.",
        allowed=f"an integer from 0 to {MAX_SEED}, or a list of different ones")
    filepath: FilePath | None = key(
        None,
        "Folder for everything that the run writes; with more than one seed each run gets its subfolder `seed_<seed>`.",
        unset="`./runs/<name of the config file>/`")
    checkpoint_minutes: float = key(
        10.0, "Write a checkpoint within a task every so many minutes; one is written after every task too.", gt=0)
    checkpoint_steps: int | None = key(
        None, "Write one every so many optimizer steps as well.", unset="by time alone", ge=1)
    trackers: Trackers = key(
        [],
        "Experiment trackers that get the run's figures besides its own files, each a package of its own: "
        "`tensorboard`, `wandb`, `mlflow`. A single name may stand without the list. See docs/TRACKERS.md.",
        allowed='a list of different ones of "tensorboard", "wandb", "mlflow"')
    forward_transfer: bool = key(
        False,
        "Measure forward transfer: after every task the network and a copy of the frozen one look once at all images of the "
        "task to come. It changes no other result; beside a training of 20 epochs it takes about 4 % more time.")
    deterministic: bool = key(
        False, "Only deterministic algorithms, also on CUDA (slower); the CPU always gives the same bits.")


class DataKeys(KeyGroup):
    """Data"""

    dataset: NameOrNames = key(
        ...,
        "The data set, a name in `utils/data`; a wrong name is answered with the known ones. A list of names is a stream of "
        "several: the tasks of each follow those of the one before, with its own class order, sizes and test transform, and "
        "none mixes two.",
        allowed="a name, or a list of different names")
    data_path: FilePath = key(
        "./data", "Folder in which the data sets lie. `~` is your home folder, in every path.")
    scenario: Literal["class", "domain"] = key(
        "class",
        'What a task brings: `"class"`, new classes, or `"domain"`, the same `init_cls` classes as every other task in '
        "another domain of images. The domains are those of `task_domains`, by default all that the data set has of its own, "
        "in its order. docs/METHODS.md says what this means to a method, and which ones take it.")
    init_cls: int = key(..., "Number of classes in the first task.", ge=1)
    increment: int | None = key(
        None,
        "Number of classes in every later task; the last one takes what is left, of several data sets the last one of each.",
        unset="`init_cls`", derive=lambda config: config.init_cls, ge=1)
    nb_tasks: int | None = key(
        None, "Stop after so many tasks: a short trial on the same stream.", unset="all tasks", ge=1)
    images_per_class: int | None = key(
        None,
        "Learn from at most so many training images of every class, of a class that comes back in every task: few-shot "
        "comparisons, and short trials of a large data set. The seed draws them, those of a smaller number among those of a "
        "larger one.",
        unset="all", ge=1)
    test_images_per_class: int | None = key(
        None,
        "Test on at most so many test images of every class, of a class that comes back in every task, drawn likewise: "
        "short trials, long streams (every task ends with all test images so far), data sets of unlike sizes in one stream.",
        unset="all", ge=1)
    bad_images: Literal["stop", "skip"] = key(
        "stop",
        'Image files that cannot be decoded: `"stop"` at the first one, or `"skip"` them, for which every file is decoded '
        "once before training; `results.json` lists them.")
    task_domains: list[Name] | None = key(
        None,
        "Image domain of every task, for a data set without files (`glyphs`, `digits`): the same classes seen through another "
        "lens, so that it is known which tasks need an adapter. utils/data/domains.py has them; `\"rotated+grating\"` is one "
        "after the other. A data set with domains of its own (`emoji`) shows a task by the images of its domain instead.",
        unset="images as they are", allowed="a list of domains, one per task")
    shuffle: bool = key(
        True, "Draw the class order from the seed, as PILOT does; false keeps the data set's own order.")
    order_seed: OneSeed | None = key(
        None, "Seed of the class order alone; `seed` then draws everything else.", unset="the run's seed",
        allowed=f"an integer from 0 to {MAX_SEED}")
    normalize: Literal["none", "backbone"] = key(
        "none",
        'Image normalisation: `"none"` feeds values in 0..1 as SD-LoRA does, `"backbone"` applies the mean '
        "and standard deviation that the backbone was pretrained with.")


class ReadingKeys(KeyGroup):
    """Batches and where images are held"""

    batch_size: int = key(
        128, "Images per optimizer step, in all processes of a run together: at least one for each of them.", ge=1)
    data_placement: Literal["auto", "memory", "lazy"] = key(
        "auto",
        'Hold all images decoded (`"memory"`: on the device if they take at most a quarter of what is free there, else in '
        'main memory), read them when needed (`"lazy"`), or hold what fits (`"auto"`). All are augmented on the device.')
    num_workers: int | None = key(
        None, "Processes that read images that are not held on the device; 0 reads in the main process.",
        unset="picked from the machine", ge=0)


class BackboneKeys(KeyGroup):
    """Backbone"""

    backbone_type: Name = key(
        "vit_base_patch16_224",
        "The frozen vision transformer: the embedded `vit_glyph_tiny_patch8_32`, or any timm name or tag "
        "with a fused `attn.qkv` layer. `vit_base_patch16_224` means "
        "`vit_base_patch16_224.augreg2_in21k_ft_in1k`. `pixels` is no network but the images themselves, 32 pixels wide if "
        "`image_size` does not say otherwise: a floor, for methods that only train a head.")
    pretrained: bool = key(True, "Load pretrained weights; false starts from random ones, which only tests want.")
    backbone_weights: FilePath | None = key(
        None, "Local file with the backbone's weights (`.safetensors`, `.pth` or `.npz`), for machines without the hub.",
        unset="the hub or its cache")
    backbone_block: int | None = key(
        None, "The block after which the class token is read, through the network's last norm; the later ones are left out.",
        unset="the last", ge=1)
    image_size: int | None = key(
        None, "Pixels of the square input, a multiple of the patches' size; the position embedding is resized to it.",
        unset="what the backbone was pretrained with", ge=1)
    precision: Literal["fp32", "bf16"] = key(
        "fp32", '`"bf16"` computes in bfloat16 by autocast; what is trained stays in float32.')
    compile: bool = key(False, "Compile the network with torch.compile: slower to start, faster per step.")


class CompatibilityKeys(KeyGroup):
    """Compatibility with SD-LoRA files"""

    memory_size: NoMemory = key(
        0, "Rehearsal memory of SD-LoRA's files. Nothing is rehearsed here, so it can only be 0.", allowed="0")
    memory_per_class: NoMemory = key(0, "As `memory_size`.", allowed="0")
    fixed_memory: NoFixedMemory = key(False, "As `memory_size`.", allowed="false")


class Config(RunKeys, DataKeys, ReadingKeys, BackboneKeys, CompatibilityKeys):
    """The resolved configuration of a run: these keys and those of the components that it chose, which make it a class of its
    own (`utils.config.components.config_class`).

    After construction every key whose default follows from other keys holds a value; a key stays null only where its
    `unset` names something that is known later (a task's learning rate, the machine). Loading the dump of a config gives an
    equal config. Raises pydantic's ValidationError; the functions of utils/config/load.py raise a UserError.
    """

    components: ClassVar[tuple[type, ...]] = ()

    @model_validator(mode="after")
    def _resolve(self, info: ValidationInfo) -> "Config":
        # A frozen model refuses assignment; a key written here does not count as given either.
        values = self.__dict__
        values["filepath"] = values["filepath"] or f"./runs/{(info.context or {}).get('name', 'run')}/"
        for name, field in type(self).model_fields.items():
            if values[name] is None and told(field, "derive"):
                values[name] = told(field, "derive")(self)
        for part in (type(self), *self.components):
            for sentence in (*part.objections(self), *part.contradictions(self)):
                raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence})
        return self

    @classmethod
    def objections(cls, config: "Config") -> Iterator[str]:
        """As `Component.objections`: none."""
        return iter(())

    @classmethod
    def contradictions(cls, config: "Config") -> list[str]:
        """Those among the keys of every run; as `Component.contradictions`."""
        if config.backbone_weights is not None and not config.pretrained:
            return ["'pretrained' is false although 'backbone_weights' names a file; leave out one of the two"]
        if config.task_domains is not None and isinstance(config.dataset, list):
            return ["'task_domains' shows one data set in several domains but 'dataset' names several, each of which is a "
                    "domain already; leave out 'task_domains' or name one data set"]
        return list(cls._domain_contradictions(config)) if config.scenario == "domain" else []

    @classmethod
    def _domain_contradictions(cls, config: "Config") -> Iterator[str]:
        if isinstance(config.dataset, list):
            yield ("'scenario' is \"domain\" but 'dataset' names several sets, whose classes are not the same; name one that "
                   "has domains")
        if config.increment != config.init_cls:
            yield (f"'increment' is {config.increment} but 'scenario' is \"domain\", in which every task has the "
                   f"{config.init_cls} classes of 'init_cls'; leave out 'increment'")


def title_of(dataset: str | list[str]) -> str:
    """What the key `dataset` names, in a line."""
    return dataset if isinstance(dataset, str) else " + ".join(dataset)
