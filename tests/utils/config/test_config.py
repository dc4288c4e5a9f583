"""utils/config: resolved defaults, the keys of what a config chooses, SD-LoRA's files, and records of older versions."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from models import LEARNERS
from models.growth import RULES, KeepAll
from models.recipes import GATES
from models.recipes.open import Open
from utils.config import KeyGroup, config_from_dict, config_of_record, config_warnings, key, known_keys, load_config
from utils.config.describe import config_schema, config_table
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


def refusal(values: dict) -> str:
    """The message with which a config is refused."""
    with pytest.raises(UserError) as caught:
        config_from_dict(values, "x.json")
    assert "\n" not in str(caught.value) and str(caught.value).endswith((".", "?"))
    return str(caught.value)


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
    assert config_from_dict({**MINIMAL, "gate": "none", "growth_rule": "threshold"}).growth_rule == "threshold"
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
        "nb_tasks", "task_domains", "backbone_weights", "backbone_block", "image_size", "rank_schedule", "alpha_lr", "gate_lr",
        "head_lr", "refit_lr", "tuned_epoch", "checkpoint_steps", "num_workers", "max_grad_norm", "row_epochs", "order_seed",
        "images_per_class", "test_images_per_class"}


def test_null_is_the_default(tmp_path):
    derived = {
        key: None for key in ("increment", "rank", "filepath", "num_workers", "gate_lr")
    }
    path = write(tmp_path, {**MINIMAL, **derived})
    assert load_config(path) == load_config(write(tmp_path, MINIMAL))


def test_null_for_a_choice_is_its_default():
    config = config_from_dict({**MINIMAL, "gate": None, "growth_rule": None, "head": None})
    assert config == config_from_dict(MINIMAL)


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


# Components own their keys


class ToyGate(Open):
    """A gate of the test. With more to say than its first sentence."""

    class Keys(Open.Keys):
        """A toy"""

        toy_strength: float = key(2.0, "What the toy does.", ge=0)


class ToyRule(KeepAll):
    """A rule of the test."""

    name = "toy_rule"

    class Keys(KeyGroup):
        """A toy rule"""

        toy_margin: int = key(3, "How much.", ge=1)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "toy", ToyGate)
    monkeypatch.setitem(RULES, "toy_rule", ToyRule)


def test_a_component_brings_its_keys_wherever_keys_are_known(toys) -> None:
    config = config_from_dict({**MINIMAL, "gate": "toy", "toy_strength": 0.5, "growth_rule": "toy_rule", "toy_margin": 1})
    assert (config.toy_strength, config.toy_margin) == (0.5, 1) and config_from_dict(config.model_dump()) == config
    assert config_from_dict({**MINIMAL, "gate": "toy"}).toy_strength == 2.0
    table = config_table()
    assert "### A toy\n\nWith `gate` `\"toy\"`.\n" in table
    assert "| `toy_strength` | a number of at least 0 | `2.0` | What the toy does. |" in table
    assert '`"toy"`: A gate of the test. With more' in table and '"toy_rule"' in table
    schema = config_schema()["properties"]
    assert schema["toy_strength"] == {"default": 2.0, "minimum": 0, "type": "number", "description": "What the toy does."}
    assert "toy" in schema["gate"]["enum"] and "toy_rule" in schema["growth_rule"]["enum"]


def test_its_keys_are_refused_where_it_is_not_chosen(toys) -> None:
    message = refusal({**MINIMAL, "toy_strength": 0.5})
    assert message == ("x.json: 'toy_strength' is 0.5, but it has no effect for gate \"gumbel_sparsemax\"; leave it out or "
                       "make it null.")
    assert config_from_dict({**MINIMAL, "toy_strength": 2}) == config_from_dict(MINIMAL), "a default asks for nothing"
    assert "Did you mean 'toy_strength'?" in refusal({**MINIMAL, "gate": "toy", "toy_strenght": 1})
    assert "for model_name \"simplecil\"" in refusal({**MINIMAL, "model_name": "simplecil", "toy_strength": 1})
    assert config_from_dict({**MINIMAL, "toy_margin": 5}).toy_margin == 5, "keys of any rule may wait for it"
    message = refusal({**MINIMAL, "gate": "toy", "toy_strength": -1})
    assert message == "x.json: 'toy_strength' is -1; it must be a number of at least 0."


def test_a_component_that_is_gone_is_unknown() -> None:
    assert "'gate' is \"toy\"; it must be one of" in refusal({**MINIMAL, "gate": "toy"})
    assert "'toy_strength' is not a key of the config" in refusal({**MINIMAL, "toy_strength": 1})


@pytest.mark.parametrize("name, value, choice", [
    ("lambda_sparsity", 0.5, {"gate": "none"}), ("gate_noise", 0.5, {"gate": "sparsemax"}), ("gate_price", 2.0, {}),
    ("gumbel_tau_init", 4.0, {"gate": "evidence"}), ("cosine_scale", 2.0, {"head": "linear"}),
    ("ridge_dim", 8, {"head": "aligned"}), ("gate", "none", {"model_name": "joint"}),
    ("epochs", 3, {"model_name": "joint"}), ("growth_rule", "none", {"model_name": "joint"}),
    ("lrate", 0.005, {"model_name": "joint"}), ("lambda_sparsity", 0.035, {"gate": "none"}),  # defaults of others
    ("rank", 3, {"model_name": "finetune_head"}),
    ("init_lr", 0.5, {"model_name": "simplecil"}), ("head", "ridge", {"model_name": "simplecil"})])
def test_a_key_without_effect_is_refused_unless_it_asks_for_nothing(name: str, value: object, choice: dict) -> None:
    message = refusal({**MINIMAL, **choice, name: value})
    assert f"'{name}' is {json.dumps(value)}, but it has no effect for" in message
    assert all(f'"{chosen}"' in message for chosen in choice.values())
    config_from_dict({**MINIMAL, **choice, name: None})


def test_a_default_asks_for_nothing() -> None:
    for choice, name, value in (({"gate": "none"}, "lambda_sparsity", 0.01), ({"gate": "none"}, "lambda_sparsity", 0),
                                ({"model_name": "joint"}, "growth_rule", "threshold"),
                                ({"model_name": "joint"}, "lrate", 0.01),
                                ({"model_name": "finetune_head"}, "growth_threshold", 0.1)):
        assert config_from_dict({**MINIMAL, **choice, name: value}) == config_from_dict({**MINIMAL, **choice}), name


def test_all_keys_without_effect_are_named_at_once() -> None:
    message = refusal({**MINIMAL, "gate": "none", "gate_lr": 0.1, "gate_noise": 1, "lambda_sparsity": 0.5})
    assert message == ("x.json: 'gate_lr' is 0.1, but it has no effect for gate \"none\"; leave it out or make it null; "
                       "likewise 'lambda_sparsity'.")


def test_a_record_of_an_older_version_has_every_key_and_is_read() -> None:
    everything = {name: field.default for name, field in known_keys().items()}
    everything["prompt_length"] = 6  # L2P's default is none of CODA-Prompt's, which wants an even number
    for choice in ({"gate": gate} for gate in GATES), ({"model_name": name} for name in LEARNERS):
        for values in choice:
            config = config_of_record({**everything, **MINIMAL, "alpha_scope": "layer", "lambda_sparsity": 0.7, **values}, "x")
            assert getattr(config, next(iter(values))) == next(iter(values.values()))
    with pytest.raises(UserError, match="x: 'gate' is \"lost\"; it must be one of"):
        config_of_record({**MINIMAL, "gate": "lost"}, "x")


# Files of SD-LoRA


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_official_files_load_as_they_are(name, tmp_path):
    values = OFFICIAL_FILES[name]
    config = load_config(write(tmp_path, values))
    for known, value in values.items():
        assert getattr(config, known) == value
    ignored = {
        "memory_size",
        "memory_per_class",
        "fixed_memory",
        "optimizer",
        "scheduler",
        "min_lr",
        "tuned_epoch",
    }
    ignored = (ignored | {"weight_decay", "init_weight_decay"}) & set(values)
    (warning,) = config_warnings(config)
    listed = warning.split(". It always")[0]
    for each in known_keys():
        words = listed.replace(",", " ").replace(":", " ").split()
        assert (each in words) == (each in ignored), each


def test_files_of_this_project_get_no_warning():
    values = {**MINIMAL, "optimizer": "adam", "weight_decay": 0.1, "tuned_epoch": 5}
    assert config_warnings(config_from_dict(values)) == []
    (warning,) = config_warnings(config_from_dict({**values, "init_weight_decay": 0.1}))
    assert "optimizer, tuned_epoch, weight_decay, init_weight_decay (honoured here)" in warning
    (warning,) = config_warnings(config_from_dict({**MINIMAL, "memory_size": 0}))
    assert "memory_size (no meaning here" in warning and "honoured" not in warning
