"""The configs under exps/: the published protocol in numbers; schema and table made from the class."""

import json

import pytest

from tests.helpers import ROOT
from utils.config import (
    Config,
    config_warnings,
    load_config,
)

EXPS = ROOT / "exps"
SHIPPED = sorted(path for path in EXPS.glob("*.json") if not path.name.endswith(".schema.json"))
MINIMAL = {"dataset": "digits", "init_cls": 2}

TEST_CONFIG = """
    {"prefix": "test", "dataset": "cifar224", "init_cls": 10, "increment": 10, "model_name": "sdlora",
     "backbone_type": "vit_base_patch16_224", "device": ["0"], "seed": [1993], "filepath": "./CF100_test/",
     "init_epoch": 2, "epochs": 2, "batch_size": 32, "init_lr": 8e-3, "lrate": 8e-3, "scheduler": "cosine",
     "min_lr": 5e-3, "gumbel_tau_init": 5.0, "gumbel_tau_final": 0.5, "gumbel_anneal_rate": 0.999,
     "lambda_sparsity": 0.01, "growth_threshold": 0.1}
"""


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_is_strict_json(path):
    values = json.loads(path.read_text(), parse_constant=pytest.fail)
    config = load_config(path)
    assert config_warnings(config) == []
    for key, value in values.items():
        if key in Config.model_fields:
            assert getattr(config, key) == value


def test_shipped_configs_write_to_different_folders_under_their_own_label():
    configs = [load_config(path) for path in SHIPPED]
    assert len({config.filepath for config in configs}) == len(configs)
    assert len({config.prefix for config in configs}) == len(configs)


# METHOD.md, section 4: classes per task, epochs, learning rates (task 0, later), milestones, factor.
PUBLISHED = {
    "sdlora_c100": ("cifar224", 10, 20, 0.008, 0.008, [], None),
    "sdlora_inr_5": ("imagenetr", 40, 20, 0.01, 0.01, [], None),
    "sdlora_inr": ("imagenetr", 20, 20, 0.01, 0.01, [], None),
    "sdlora_inr_20": ("imagenetr", 10, 20, 0.01, 0.01, [], None),
    "sdlora_ina": ("imageneta", 20, 20, 0.01, 0.005, [10, 15], 0.05),
    "sdlora_dom": ("domainnet", 69, 10, 0.02, 0.02, [4, 6, 8], 0.005),
    "sdlora_cub": ("cub", 20, 20, 0.01, 0.01, [], None),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_original"])
def test_benchmark_configs_follow_the_published_protocol(name, suffix):
    dataset, classes, epochs, init_lr, lrate, milestones, factor = PUBLISHED[name]
    config = load_config(EXPS / f"{name}{suffix}.json")
    assert (config.dataset, config.init_cls, config.increment) == (dataset, classes, classes)
    assert (config.init_epoch, config.epochs, config.init_lr, config.lrate) == (
        epochs,
        epochs,
        init_lr,
        lrate,
    )
    assert config.scheduler == ("steplr" if milestones else "constant")
    assert config.milestones == config.init_milestones == milestones
    if milestones:
        assert config.lrate_decay == config.init_lr_decay == factor
    assert (config.optimizer, config.momentum, config.weight_decay, config.init_weight_decay) == (
        "sgd",
        0.9,
        0,
        0,
    )
    assert (config.rank, config.batch_size, config.normalize, config.seed) == (10, 128, "none", [1993])
    assert (config.backbone_type, config.shuffle, config.eval_every) == ("vit_base_patch16_224", True, 5)
    if suffix:
        assert (config.gate, config.growth_rule, config.init_alpha) == ("none", "none", 0.8)
        assert config.alpha_scope == "task"
    else:
        assert (config.gate, config.growth_rule, config.growth_threshold) == (
            "evidence",
            "threshold",
            0.5,
        )
        assert (config.gumbel_tau_init, config.gumbel_tau_final, config.gumbel_anneal_rate) == (
            5.0,
            0.5,
            "auto",
        )
        assert (config.lambda_sparsity, config.init_alpha, config.alpha_scope) == (0.01, 1.0, "layer")


def differing_from_original(name):
    """The keys in which a config and the one of SD-LoRA to compare it with differ, beside those that every such pair has."""
    gumbel, original = (load_config(EXPS / f"{name}{suffix}.json") for suffix in ("", "_original"))
    differing = {key for key in Config.model_fields if getattr(gumbel, key) != getattr(original, key)}
    method = {"prefix", "filepath", "gate", "alpha_scope", "init_alpha", "growth_rule"}
    assert differing >= method
    return differing - method


@pytest.mark.parametrize("name", PUBLISHED)
def test_gumbel_and_original_configs_differ_in_the_gate_alone(name):
    assert differing_from_original(name) <= {"gate_lr", "growth_threshold"}


@pytest.mark.parametrize("name", ["quickstart", "glyphs"])
def test_pairs_without_a_download_share_stream_budget_and_capacity(name):
    """Each method has the optimizer and the learning rates that suit it."""
    assert differing_from_original(name) <= {
        "growth_threshold", "optimizer", "init_lr", "lrate", "alpha_lr", "head_lr", "refit_lr", "eval_every"}


def test_variants_of_sdlora_differ_in_what_they_are_named_for():
    base = load_config(EXPS / "sdlora_c100_original.json").model_dump()
    rr, kd = (load_config(EXPS / f"sdlora_c100_{name}.json").model_dump() for name in ("rr", "kd"))
    assert {key for key in base if base[key] != rr[key]} == {"prefix", "filepath", "rank_schedule"}
    assert {key for key in base if base[key] != kd[key]} == {"prefix", "filepath", "growth_rule"}
    assert rr["rank_schedule"] == [[0, 10], [4, 8], [8, 6]] and kd["growth_rule"] == "kd"


def test_quickstart_and_glyphs_need_no_download_and_name_their_streams():
    quickstart, glyphs = load_config(EXPS / "quickstart.json"), load_config(EXPS / "glyphs.json")
    assert (quickstart.dataset, quickstart.init_cls, quickstart.increment) == ("digits", 2, 2)
    assert (glyphs.dataset, glyphs.init_cls, glyphs.increment) == ("glyphs", 10, 10)
    assert quickstart.backbone_type == glyphs.backbone_type == "vit_glyph_tiny_patch8_32"
    assert quickstart.gate == glyphs.gate == "evidence"
    assert quickstart.filepath == "./runs/quickstart/"


def test_c100_config_is_where_scripts_look_for_its_files():
    config = load_config(EXPS / "sdlora_c100.json")
    assert (config.seed, config.filepath) == ([1993], "./CF100/")


def test_c100_test_config_is_the_text_people_use():
    expected, shipped = json.loads(TEST_CONFIG), json.loads((EXPS / "sdlora_c100_test.json").read_text())
    assert list(shipped.items()) == list(expected.items())
    config = load_config(EXPS / "sdlora_c100_test.json")
    assert config.gumbel_anneal_rate == 0.999 and config.device == ["0"]
