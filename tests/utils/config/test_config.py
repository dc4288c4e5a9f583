"""Config values: resolved defaults, SD-LoRA's files, and the sentence for everything that is refused."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from utils.config import (
    Config,
    config_from_dict,
    config_warnings,
    load_config,
    non_default,
    refuse_inactive,
)
from utils.errors import UserError

MINIMAL = {"dataset": "digits", "init_cls": 2}

# What the four official SD-LoRA files hold, by the names of the files.
_OFFICIAL = {
    "prefix": "reproduce",
    "memory_size": 0,
    "memory_per_class": 0,
    "fixed_memory": False,
    "shuffle": True,
    "model_name": "sdlora",
    "backbone_type": "vit_base_patch16_224",
    "device": ["0"],
    "seed": [1993],
    "init_epoch": 20,
    "epochs": 20,
    "batch_size": 128,
    "init_weight_decay": 0.0005,
    "weight_decay": 2e-4,
}
_ADAM = {"optimizer": "adam", "scheduler": "constant"}
OFFICIAL_FILES = {
    "sdlora_c100": {
        **_OFFICIAL,
        **{"dataset": "cifar224", "init_cls": 10, "increment": 10, "filepath": "./CF100/"},
        **{"scheduler": "cosine", "min_lr": 5e-3, "tuned_epoch": 20, "init_lr": 8e-3, "lrate": 8e-3},
        **{"init_milestones": [60, 120, 170], "init_lr_decay": 0.1, "milestones": [40, 70], "lrate_decay": 0},
    },
    "sdlora_inr": {
        **_OFFICIAL,
        **_ADAM,
        **{
            "dataset": "imagenetr",
            "init_cls": 20,
            "increment": 20,
            "filepath": "./ImageNetR3/",
            "seed": [1995],
        },
        **{"init_lr": 1e-2, "init_milestones": [10000], "init_lr_decay": 0},
        **{"lrate": 1e-2, "milestones": [10000], "lrate_decay": 0},
    },
    "sdlora_ina": {
        **_OFFICIAL,
        **_ADAM,
        **{"dataset": "imageneta", "init_cls": 20, "increment": 20, "filepath": "./ImageNetA/"},
        **{"init_lr": 1e-2, "init_milestones": [10, 15], "init_lr_decay": 0.05},
        **{"lrate": 5e-3, "milestones": [10, 15], "lrate_decay": 0.05, "weight_decay": 5e-4},
    },
    "sdlora_dom": {
        **_OFFICIAL,
        **{"dataset": "domainnet", "init_cls": 69, "increment": 69, "filepath": "./domainnet-verify/"},
        **{"device": ["0", "1"], "optimizer": "adam", "scheduler": "steplr", "init_epoch": 10, "epochs": 10},
        **{
            "init_lr": 0.02,
            "init_milestones": [4, 6, 8, 10000],
            "init_lr_decay": 0.005,
            "init_weight_decay": 0.0,
        },
        **{"lrate": 0.02, "milestones": [4, 6, 8, 10000], "lrate_decay": 0.005, "weight_decay": 0.0},
    },
}


def write(folder: Path, content: object, name: str = "x.json") -> Path:
    """`content` in a file: text and bytes as they are, anything else as JSON."""
    path = folder / name
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    path.write_bytes(content)
    return path


def refusal(folder: Path, content: object, *arguments: object, **values: object) -> str:
    """The message with which a config is refused, the folder taken out."""
    with pytest.raises(UserError) as caught:
        load_config(write(folder, content), *arguments, **values)
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "?")) and "pydantic" not in message
    return message.replace(f"{folder}/", "")


# Resolved defaults


def test_defaults_for_a_gated_config():
    config = config_from_dict(MINIMAL)
    assert (config.gate, config.increment, config.rank, config.init_alpha) == ("gumbel_sparsemax", 2, 10, 1.0)
    assert (config.alpha_scope, config.growth_rule, config.growth_threshold) == ("layer", "threshold", 0.1)
    assert (config.gumbel_tau_init, config.gumbel_tau_final, config.gumbel_anneal_rate) == (5.0, 0.5, "auto")
    assert (config.lambda_sparsity, config.optimizer, config.momentum, config.weight_decay) == (
        0.01,
        "sgd",
        0.9,
        0,
    )
    assert (config.model_name, config.backbone_type, config.pretrained) == (
        "sdlora",
        "vit_base_patch16_224",
        True,
    )
    assert (config.seed, config.device, config.scheduler) == ([1993], ["auto"], "cosine")


def test_defaults_for_sdlora():
    config = config_from_dict({**MINIMAL, "gate": "none"})
    assert (config.init_alpha, config.alpha_scope, config.growth_rule, config.rank) == (
        0.8,
        "task",
        "none",
        10,
    )
    assert config_from_dict({**MINIMAL, "gate": "none", "growth_rule": "threshold"}).growth_rule == "none"
    assert config_from_dict({**MINIMAL, "gate": "none", "lambda_sparsity": 0}).lambda_sparsity == 0
    assert config_from_dict({**MINIMAL, "gate": "none", "init_alpha": 1.5}).init_alpha == 1.5


def test_defaults_that_follow_other_keys():
    steps = {"milestones": [5, 8], "lrate_decay": 0.3, "weight_decay": 0.1}
    config = config_from_dict({**MINIMAL, "rank_schedule": [[0, 6], [3, 4]], **steps})
    assert (config.rank, config.init_milestones, config.init_lr_decay, config.init_weight_decay) == (
        6,
        [5, 8],
        0.3,
        0.1,
    )
    config = config_from_dict(
        {**MINIMAL, **steps, "init_milestones": [], "init_lr_decay": 0.0, "init_weight_decay": 0}
    )
    assert (config.init_milestones, config.init_lr_decay, config.init_weight_decay) == ([], 0, 0)


def test_only_what_the_trainer_resolves_stays_null():
    open_keys = {key for key, value in config_from_dict(MINIMAL).model_dump().items() if value is None}
    assert open_keys == {
        "nb_tasks", "task_domains", "backbone_weights", "rank_schedule", "alpha_lr", "gate_lr", "head_lr", "refit_lr",
        "tuned_epoch", "checkpoint_steps", "ridge_dim", "num_workers"}


def test_null_is_the_default(tmp_path):
    derived = {
        key: None for key in ("increment", "rank", "growth_rule", "init_alpha", "filepath", "num_workers")
    }
    path = write(tmp_path, {**MINIMAL, **derived})
    assert load_config(path) == load_config(write(tmp_path, MINIMAL))


def test_filepath_defaults_to_the_name_of_the_file(tmp_path):
    assert load_config(write(tmp_path, MINIMAL, "my.run.json")).filepath == "./runs/my.run/"
    config = load_config(write(tmp_path, MINIMAL, "a\nb.json"))
    assert config_from_dict(config.model_dump()).filepath == "./runs/a_b/"


def test_paths_in_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = config_from_dict({**MINIMAL, "data_path": "~/data", "filepath": "./~/"})
    assert (config.data_path, config.filepath) == ("/home/someone/data", "./~/")


@pytest.mark.parametrize(
    ("given_device", "device"),
    [
        ("cpu", ["cpu"]),
        (0, ["0"]),
        ([0, 1], ["0", "1"]),
        ("cuda:1", ["1"]),
        ("cuda", ["0"]),
        (["auto"], ["auto"]),
        (["cpu", "cpu"], ["cpu", "cpu"]),
    ],
)
def test_one_device_or_several(given_device, device):
    assert config_from_dict({**MINIMAL, "device": given_device}).device == device


def test_one_seed_or_several():
    assert config_from_dict({**MINIMAL, "seed": 7}).seed == [7]
    assert config_from_dict({**MINIMAL, "seed": [3, 0, 4294967295]}).seed == [3, 0, 4294967295]


SAMPLES = [
    MINIMAL,
    {
        **MINIMAL,
        "gate": "none",
        "growth_rule": "kd",
        "kd_residual": 1e-3,
        "seed": [1, 2],
        "device": ["0", "1"],
    },
    {**MINIMAL, "gate": "none", "rank_schedule": [[0, 10], [4, 8]], "growth_rule": "val_loss"},
    {**MINIMAL, "gate": "sparsemax", "scheduler": "steplr", "milestones": [1, 3], "gumbel_anneal_rate": 0.5},
    {
        **MINIMAL,
        "gate": "gumbel_softmax",
        "growth_rule": "topk",
        "alpha_lr": 0,
        "weight_decay": 1,
        "prefix": "é",
    },
    *OFFICIAL_FILES.values(),
]


@pytest.mark.parametrize("values", SAMPLES)
def test_the_dump_of_a_config_is_that_config(values, tmp_path):
    config = config_from_dict(values)
    dump = config.model_dump(mode="json")
    reloaded = load_config(write(tmp_path, dump))
    assert reloaded == config
    assert reloaded.model_dump(mode="json") == dump
    assert config_warnings(reloaded) == []


def test_a_config_cannot_be_changed():
    config = config_from_dict(MINIMAL)
    with pytest.raises(ValidationError):
        config.rank = 3
    assert config.rank == 10


# Keys that a method does not use


def test_non_default_lists_what_was_changed():
    config = config_from_dict(
        {**MINIMAL, "increment": 2, "rank": 4, "gate": "none", "init_alpha": 0.8, "momentum": 0.9}
    )
    assert non_default(config) == {"dataset": "digits", "init_cls": 2, "rank": 4, "gate": "none"}
    reloaded = config_from_dict(config.model_dump())
    assert set(non_default(reloaded)) - {"filepath"} == set(non_default(config))


def test_a_key_without_effect_is_refused_unless_default():
    config = config_from_dict({**MINIMAL, "increment": 5, "lambda_sparsity": 0.5, "gumbel_tau_init": 5.0})
    refuse_inactive(config, "simplecil", ["gumbel_tau_init", "rank", "init_alpha", "growth_rule"])
    with pytest.raises(UserError, match=r"'lambda_sparsity' is 0\.5.*'simplecil'.*default, 0\.01"):
        refuse_inactive(config, "simplecil", ["rank", "lambda_sparsity"])
    with pytest.raises(UserError, match=r"'increment' is 5.*default, 2\."):
        refuse_inactive(config, "joint", ["increment"])


# Files of SD-LoRA


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_official_files_load_as_they_are(name, tmp_path):
    values = OFFICIAL_FILES[name]
    config = load_config(write(tmp_path, values))
    for key, value in values.items():
        assert getattr(config, key) == value
    ignored = {
        "memory_size",
        "memory_per_class",
        "fixed_memory",
        "optimizer",
        "scheduler",
        "min_lr",
        "tuned_epoch", "checkpoint_steps",
    }
    ignored = (ignored | {"weight_decay", "init_weight_decay"}) & set(values)
    (warning,) = config_warnings(config)
    listed = warning.split(". It always")[0]
    for key in {*Config.model_fields, "min_lr", "scheduler"}:
        words = listed.replace(",", " ").replace(":", " ").split()
        assert (key in words) == (key in ignored), key


def test_files_of_this_project_get_no_warning():
    values = {**MINIMAL, "optimizer": "adam", "weight_decay": 0.1, "tuned_epoch": 5}
    assert config_warnings(config_from_dict(values)) == []
    (warning,) = config_warnings(config_from_dict({**values, "init_weight_decay": 0.1}))
    assert "optimizer, tuned_epoch, weight_decay, init_weight_decay (honoured here)" in warning
    (warning,) = config_warnings(config_from_dict({**MINIMAL, "memory_size": 0}))
    assert "memory_size (no meaning here" in warning and "honoured" not in warning


# Anything at all is a config or one sentence

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["none", "auto", "cpu", "0", "1e3", "[1]", "NaN", "adam", "steplr", "topk", "kd", 0.5, 1, 0]
    ),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
_KEYS = st.sampled_from(sorted(Config.model_fields))


def loads_or_refuses(content: bytes, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), content)
        try:
            config = load_config(path, overrides)
        except UserError as error:
            message = str(error).replace(folder, "")
            assert message and len(message.splitlines()) == 1 and len(message) < 400
        else:
            assert config_from_dict(config.model_dump(mode="json")) == config
            assert len(config_warnings(config)) <= 1


_MUTATIONS = st.one_of(
    st.tuples(st.just("change"), _KEYS, st.sampled_from([1, 5, 0.5, True, "none", [1, 2], None])),
    st.tuples(st.just("change"), _KEYS, _VALUES),
    st.tuples(st.just("change"), st.text(max_size=10), _SCALARS),
    st.tuples(st.just("drop"), _KEYS, st.none()),
    st.tuples(st.just("set"), _KEYS, _SCALARS),
    st.tuples(st.just("set"), st.text(max_size=10), _SCALARS),
)


@settings(max_examples=300, deadline=None)
@given(base=st.sampled_from(SAMPLES), mutations=st.lists(_MUTATIONS, max_size=2))
def test_mutated_values_load_or_are_refused(base, mutations):
    values, overrides = dict(base), []
    for kind, key, value in mutations:
        if kind == "change":
            values[key] = value
        elif kind == "drop":
            values.pop(key, None)
        else:
            overrides.append(f"{key}={value}")
    loads_or_refuses(json.dumps(values).encode(), overrides)


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, 5000),
    cut=st.integers(0, 3),
    put=st.binary(max_size=2) | st.sampled_from([b'"', b"}", b"//", b","]),
)
def test_mutated_text_loads_or_is_refused(at, cut, put):
    text = json.dumps(SAMPLES[5], indent=1).encode()
    loads_or_refuses(text[: at % len(text)] + put + text[at % len(text) + cut :], [])
