"""The configuration of a run: every key, what it means, what it may be, and its default.

Each key is documented where it is declared. `utils/config.py` makes the table in `docs/CONFIG.md` and the
schema in `exps/config.schema.json` from these declarations, loads files, and puts mistakes into words.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from utils.config.rules import (
    DERIVED,
    MAX_SEED,
    Devices,
    Epochs,
    FilePath,
    Name,
    NoFixedMemory,
    NoMemory,
    RankSteps,
    Seeds,
    Text,
    contradictions,
    default_value,
)

GROUPS = {
    "run": "Run",
    "data": "Data",
    "backbone": "Backbone",
    "adapters": "Adapters",
    "optimisation": "Optimisation",
    "head": "Head",
    "gate": "Gate",
    "growth": "Growth",
    "speed": "Speed",
    "compatibility": "Compatibility with SD-LoRA files",
}


def _key(
    group: str, default: Any, description: str, *, unset: str = "", allowed: str = "", **limits: Any
) -> Any:
    """A key of `group`; `unset` says what a default of null means, `allowed` what the type leaves unsaid."""
    extra = {"group": group, "unset": unset, "allowed": allowed}
    return Field(default, description=description, json_schema_extra=extra, **limits)


_run, _data, _backbone, _adapters, _optim, _head, _gate, _growth, _speed, _compat = (
    partial(_key, group) for group in GROUPS
)


class Config(BaseModel):
    """The resolved configuration of a run.

    Types are strict: no text for a number, no 1000.0 for an integer. After construction every key whose
    default follows from other keys holds a value; a key stays null only where its `unset` names something
    that is known later (a task's learning rate or epochs, the machine). Loading the dump of a config gives an
    equal config.

    Raises pydantic's ValidationError; `load_config` and `config_from_dict` in `utils/config.py` raise a
    UserError.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )

    prefix: Text = _run(
        "", "A label of your own, kept with the run and its results; it changes nothing else."
    )
    model_name: Name = _run("sdlora", "The class-incremental method, a name in `models/__init__.py`.")
    device: Devices = _run(
        ["auto"],
        'Where to run: `"auto"` is the first CUDA device if there is one, else the CPU. A CUDA device that '
        "is not there is replaced by the CPU with a warning. A single device may stand without the list. Several "
        'start a process each, which share every batch; `["cpu", "cpu"]` is two processes on the CPU. See '
        "docs/DISTRIBUTED.md.",
        allowed='"auto", "cpu", or a list of different CUDA devices such as "0" or "cuda:0"; "cpu" may be repeated',
    )
    seed: Seeds = _run(
        [1993],
        "Seeds of the class order, the initial weights and every other draw; each is a run of its own. A "
        "single number may stand without the list. SD-LoRA was published with 1993 to 1997.",
        allowed=f"an integer from 0 to {MAX_SEED}, or a list of different ones",
    )
    filepath: FilePath | None = _run(
        None,
        "Folder for everything that the run writes; with more than one seed each run gets its subfolder "
        "`seed_<seed>`.",
        unset="`./runs/<name of the config file>/`",
    )
    eval_every: int = _run(
        1,
        "Evaluate every so many epochs within a task and in its last one; 0 only after it. Costs time and changes no "
        "training result.",
        ge=0,
    )

    checkpoint_minutes: float = _run(
        10.0, "Write a checkpoint within a task every so many minutes; one is written after every task too.", gt=0
    )
    checkpoint_steps: int | None = _run(
        None, "Write one every so many optimizer steps as well.", unset="by time alone", ge=1
    )

    nan_policy: Literal["stop", "skip"] = _run(
        "stop",
        'What to do when loss, gradient or gate is not finite: `"stop"` the run, or `"skip"` that optimizer step, which '
        "has the processor wait for the device in every step.",
    )
    nan_limit: int = _run(10, 'Steps of one task that `"skip"` leaves out before it stops the run after all.', ge=0)
    deterministic: bool = _run(
        False, "Only deterministic algorithms, also on CUDA (slower); the CPU always gives the same bits."
    )

    dataset: Name = _data(
        ..., "The data set, a name in `utils/data.py`; a wrong name is answered with the known ones."
    )
    data_path: FilePath = _data(
        "./data", "Folder in which the data sets lie. `~` is your home folder, in every path."
    )
    init_cls: int = _data(..., "Number of classes in the first task.", ge=1)
    increment: int | None = _data(
        None,
        "Number of classes in every later task; the last one takes what is left.",
        unset="`init_cls`",
        ge=1,
    )
    nb_tasks: int | None = _data(
        None, "Stop after so many tasks: a short trial on the same stream.", unset="all tasks", ge=1
    )
    bad_images: Literal["stop", "skip"] = _data(
        "stop",
        'Image files that cannot be decoded: `"stop"` at the first one, or `"skip"` them, for which every file is decoded '
        "once before training; `results.json` lists them.",
    )
    task_domains: list[Name] | None = _data(
        None,
        "Image domain of every task, for data sets without files (`glyphs`, `digits`): the same classes seen through another "
        "lens, so that it is known which tasks need an adapter. utils/data/domains.py has them; `\"rotated+grating\"` is one "
        "after the other.",
        unset="images as they are",
        allowed="a list of domains, one per task",
    )
    shuffle: bool = _data(
        True, "Draw the class order from the seed, as PILOT does; false keeps the data set's own order."
    )
    normalize: Literal["none", "backbone"] = _data(
        "none",
        'Image normalisation: `"none"` feeds values in 0..1 as SD-LoRA does, `"backbone"` applies the mean '
        "and standard deviation that the backbone was pretrained with.",
    )

    backbone_type: Name = _backbone(
        "vit_base_patch16_224",
        "The frozen vision transformer: the embedded `vit_glyph_tiny_patch8_32`, or any timm name or tag "
        "with a fused `attn.qkv` layer. `vit_base_patch16_224` means "
        "`vit_base_patch16_224.augreg2_in21k_ft_in1k`.",
    )
    pretrained: bool = _backbone(
        True, "Load pretrained weights; false starts from random ones, which only tests want."
    )
    backbone_weights: FilePath | None = _backbone(
        None,
        "Local file with the backbone's weights (`.safetensors`, `.pth` or `.npz`), for machines without the "
        "hub.",
        unset="the hub or its cache",
    )

    rank: int | None = _adapters(
        None,
        "Rank of every LoRA adapter, at most the backbone's width. Parameters per adapter grow in "
        "proportion.",
        unset="10, or the first rank of `rank_schedule`",
        ge=1,
    )
    rank_schedule: RankSteps | None = _adapters(
        None,
        "Ranks that change along the stream, as pairs [first task, rank]; SD-LoRA-RR is `[[0, 10], [4, 8], "
        "[8, 6]]`.",
        unset="`rank` in every task",
        allowed="a list of pairs [first task, rank], tasks ascending from 0 and ranks of at least 1",
    )
    alpha_scope: Literal["layer", "task"] | None = _adapters(
        None,
        'One magnitude per block and projection (`"layer"`) or one per adapter (`"task"`, as SD-LoRA has '
        "it).",
        unset='`"layer"`; `"task"` for gate `"none"`',
    )
    init_alpha: float | None = _adapters(
        None, "Magnitude that a new adapter starts with.", unset='1.0; 0.8 for gate `"none"`', gt=0
    )

    init_epoch: int = _optim(20, "Epochs of training in the first task.", ge=1)
    epochs: int = _optim(20, "Epochs of training in every later task.", ge=1)
    batch_size: int = _optim(
        128, "Images per optimizer step, in all processes of a run together: at least one for each of them.", ge=1
    )
    init_lr: float = _optim(0.01, "Learning rate in the first task.", gt=0)
    lrate: float = _optim(0.01, "Learning rate in every later task.", gt=0)
    head_lr: float | None = _optim(
        None,
        "Learning rate of the head's new rows while an adapter is trained with them. A higher one than the adapter's lets the "
        "adapter learn from rows that mean something.",
        unset="the task's learning rate",
        gt=0,
    )
    refit_lr: float | None = _optim(
        None,
        "Learning rate of SGD (with `momentum`) for head rows that are fitted to a network that stays as it is: after an "
        'adapter was pruned, and in every task of gate `"evidence"`.',
        unset="the optimizer and learning rate of the task",
        gt=0,
    )
    alpha_lr: float | None = _optim(
        None, "Learning rate of the magnitudes; 0 freezes them.", unset="the task's learning rate", ge=0
    )
    gate_lr: float | None = _optim(
        None,
        "Learning rate of the gate's logits; 0 freezes them.",
        unset="the task's learning rate",
        ge=0,
    )
    optimizer: Literal["sgd", "adam", "adamw"] = _optim(
        "sgd", "The optimizer; SD-LoRA's code always trains with SGD."
    )
    momentum: float = _optim(0.9, "Momentum of SGD; the other optimizers do not use it.", ge=0, lt=1)
    weight_decay: float = _optim(0.0, "Weight decay of all that is trained; SD-LoRA's code uses none.", ge=0)
    init_weight_decay: float | None = _optim(
        None, "Weight decay in the first task.", unset="`weight_decay`", ge=0
    )
    scheduler: Literal["cosine", "steplr", "constant"] = _optim(
        "cosine",
        'The learning rate within a task, set once per epoch: `"cosine"` falls to `min_lr`, `"steplr"` is '
        'multiplied by `lrate_decay` at each of the `milestones`, `"constant"` stays.',
    )
    min_lr: float = _optim(0.0, 'Learning rate at which `"cosine"` ends.', ge=0)
    tuned_epoch: int | None = _optim(
        None, 'Epochs in which `"cosine"` falls to `min_lr`.', unset="the task's epochs", ge=1
    )
    milestones: Epochs = _optim(
        [],
        'Epochs after which `"steplr"` multiplies the learning rate; those past the end of the task never '
        "come.",
        allowed="a list of ascending integers of at least 1",
    )
    lrate_decay: float = _optim(0.1, 'Factor of `"steplr"` at each milestone.', ge=0, le=1)
    init_milestones: Epochs | None = _optim(
        None,
        "The `milestones` of the first task.",
        unset="`milestones`",
        allowed="a list of ascending integers of at least 1",
    )
    init_lr_decay: float | None = _optim(
        None, "The `lrate_decay` of the first task.", unset="`lrate_decay`", ge=0, le=1
    )

    head: Literal["linear", "cosine", "aligned", "ridge"] = _head(
        "linear",
        'The classifier: `"linear"` (as SD-LoRA), `"cosine"` (angles only), `"aligned"` (linear, trained again after each '
        'task on samples from stored class means and covariances, as SLCA), `"ridge"` (closed-form ridge on a random '
        "projection, as RanPAC). All of them train the adapters through the rows of the task's classes.",
    )
    cosine_scale: float = _head(
        8.0, 'Factor on the cosines of `"cosine"` at the start; trained with the first task, then fixed.', gt=0
    )
    align_epochs: int = _head(5, 'Epochs in which `"aligned"` trains the whole head after each task.', ge=1)
    align_samples: int = _head(256, 'Features that `"aligned"` draws per class and epoch.', ge=1)
    align_lr: float = _head(0.01, 'Learning rate with which `"aligned"` starts; it falls along a cosine.', gt=0)
    ridge_dim: int | None = _head(
        None, 'Random features of `"ridge"`; memory grows with its square.', unset="8 times the width of the backbone", ge=1
    )
    ridge_lambda: Annotated[float, Field(gt=0)] | Literal["auto"] = _head(
        "auto",
        'Penalty of `"ridge"` relative to the mean square of a random feature; `"auto"` takes the one with the smallest '
        "error on every fifth image of the task, fitted on the others.",
        allowed='a number above 0, or "auto"',
    )

    gate: Literal["gumbel_sparsemax", "sparsemax", "gumbel_softmax", "evidence", "none"] = _gate(
        "gumbel_sparsemax",
        'How the adapters are weighted. `"sparsemax"` draws no noise, `"gumbel_softmax"` has no exact zeros, `"evidence"` '
        'decides before a task is trained, from what its images look like, `"none"` is SD-LoRA: every adapter active.',
    )
    gate_price: float = _gate(
        3.0,
        'Gate `"evidence"`: how far images must have moved (an F ratio, about 1 for none) for a new adapter to weigh as much '
        "as the nearest old one.",
        gt=0,
    )
    gate_compensation: bool = _gate(
        True,
        "Rescale the old magnitudes when a task begins, so that the newcomer's share of the gate moves no "
        "output.",
    )
    gate_noise: float = _gate(1.0, "Factor on the Gumbel noise in training; 0 trains without noise.", ge=0)
    gumbel_tau_init: float = _gate(
        5.0, "Temperature in the first step of a task; high is close to uniform.", gt=0
    )
    gumbel_tau_final: float = _gate(
        0.5,
        "Temperature that a task anneals to and growth is decided at, at most `gumbel_tau_init`; low is "
        "sparse.",
        gt=0,
    )
    gumbel_anneal_rate: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = _gate(
        "auto",
        'Factor per optimizer step on the distance to `gumbel_tau_final`; `"auto"` takes the one that is '
        "within 1 % of it in the task's last step.",
        allowed='a number above 0 and at most 1, or "auto"',
    )
    lambda_sparsity: float = _gate(
        0.01,
        "Weight of the sparsity loss (the entropy of the gate). Lower it when too many adapters are pruned.",
        ge=0,
    )

    growth_rule: Literal["threshold", "topk", "val_loss", "kd", "random", "first_k", "none"] | None = _growth(
        None,
        'Which adapters stay: `"threshold"` (gate weight above `growth_threshold`), `"topk"` (the '
        '`growth_topk` largest gate weights), `"val_loss"` (held-out loss gains from it), `"kd"` '
        '(SD-LoRA-KD, with gate `"none"` only), `"none"` (all); controls are `"random"` (`growth_topk` tasks drawn from the '
        'seed, the first among them) and `"first_k"` (the first `growth_topk` tasks).',
        unset='`"threshold"`; `"none"` for gate `"none"`',
    )
    growth_threshold: float = _growth(
        0.1, 'Gate weight that `"threshold"` wants exceeded; high prunes more.', ge=0, le=1
    )
    growth_topk: int = _growth(
        5, 'Adapters that `"topk"`, `"random"` and `"first_k"` keep, the first task\'s included.', ge=1
    )
    growth_margin: float = _growth(
        0.05, 'Relative gain in held-out loss that `"val_loss"` wants exceeded: 0.05 is 5 %.'
    )
    val_fraction: float = _growth(
        0.1,
        'Share of a task\'s training images that `"val_loss"` holds out, per class; the other rules hold '
        "out none.",
        gt=0,
        le=0.5,
    )
    kd_residual: float = _growth(
        9e-4,
        'Squared Frobenius residual up to which `"kd"` takes a direction for a combination of earlier ones.',
        gt=0,
    )
    refit_epochs: int = _growth(
        2, "Epochs of refitting the new rows of the head after an adapter was pruned; 0 leaves them.", ge=0
    )

    precision: Literal["fp32", "bf16"] = _speed(
        "fp32", '`"bf16"` computes in bfloat16 by autocast; adapters, gate and head stay in float32.'
    )
    compile: bool = _speed(False, "Compile the network with torch.compile: slower to start, faster per step.")
    grad_accum: int = _speed(
        1,
        "Compute every batch in so many parts: the same result up to rounding with less memory. At most `batch_size`.",
        ge=1,
    )
    data_placement: Literal["auto", "memory", "lazy"] = _speed(
        "auto",
        'Hold all images decoded (`"memory"`: on the device if they take at most a quarter of what is free there, else in '
        'main memory), read them when needed (`"lazy"`), or hold what fits (`"auto"`). All are augmented on the device.',
    )
    num_workers: int | None = _speed(
        None,
        'Processes that read images that are not held on the device; 0 reads in the main process.',
        unset="picked from the machine",
        ge=0,
    )

    memory_size: NoMemory = _compat(
        0, "Rehearsal memory of SD-LoRA's files. Nothing is rehearsed here, so it can only be 0.", allowed="0"
    )
    memory_per_class: NoMemory = _compat(0, "As `memory_size`.", allowed="0")
    fixed_memory: NoFixedMemory = _compat(False, "As `memory_size`.", allowed="false")

    @model_validator(mode="after")
    def _resolve(self, info: ValidationInfo) -> "Config":
        # A frozen model refuses assignment; a key written here does not count as given either.
        values = self.__dict__
        values["filepath"] = values["filepath"] or f"./runs/{(info.context or {}).get('name', 'run')}/"
        for key in DERIVED:
            if values[key] is None:
                values[key] = default_value(self, key)
        if self.gate == "none" and self.growth_rule == "threshold":
            values["growth_rule"] = "none"
        for sentence in contradictions(self):
            raise PydanticCustomError("contradiction", "{sentence}", {"sentence": sentence})
        return self
