"""The configs under exps/: the published protocol in numbers, the named method in what runs; schema and table made from
the class."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import main as command
from models import LEARNERS
from studies.study import load_study
from tests.data_files import write_cifar100, write_class_folders, write_domainnet
from tests.helpers import ROOT
from utils.config import config_warnings, load_config

EXPS = ROOT / "exps"
SHIPPED = sorted(path for path in EXPS.glob("*.json") if not path.name.endswith(".schema.json"))
STUDIES = sorted((EXPS / "studies").glob("*.json"))
PAGE = ROOT / "docs" / "GUMBEL_CL_LORA_IMPLEMENTATION.md"
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
        if not key.startswith(("_comment", "$")):
            assert getattr(config, key) == value


def test_shipped_configs_write_to_different_folders_under_their_own_label():
    configs = [load_config(path) for path in SHIPPED]
    assert len({config.filepath for config in configs}) == len(configs)
    assert len({config.prefix for config in configs}) == len(configs)


# METHOD.md, section 7.
NAMED_METHOD = {"gate": "gumbel_sparsemax", "gumbel_tau_init": 5.0, "gumbel_tau_final": 0.5, "gumbel_anneal_rate": "auto",
                "lambda_sparsity": 0.01, "growth_rule": "threshold", "growth_threshold": 0.1}
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
@pytest.mark.parametrize("suffix", ["", "_evidence", "_original"])
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
    if suffix == "_original":
        assert (config.gate, config.growth_rule, config.init_alpha) == ("none", "none", 0.8)
        assert config.alpha_scope == "task"
    elif suffix == "_evidence":
        assert (config.gate, config.growth_rule, config.growth_threshold) == ("evidence", "threshold", 0.5)
    else:
        assert NAMED_METHOD.items() <= json.loads((EXPS / f"{name}.json").read_text()).items()  # written out, not by default
        assert (config.init_alpha, config.alpha_scope) == (1.0, "layer")


def differing_from_original(name: str) -> set[str]:
    """The keys in which a config and the one of SD-LoRA to compare it with differ, of those that both have."""
    twin = name.removesuffix("_evidence").removesuffix("_routed").removesuffix("_gumbel")
    original = load_config(EXPS / f"{twin}_original.json").model_dump()
    gated = load_config(EXPS / f"{name}.json").model_dump()
    differing = {key for key in gated.keys() & original.keys() if gated[key] != original[key]}
    method = {"prefix", "filepath", "gate", "alpha_scope", "init_alpha", "growth_rule"}
    assert differing >= method
    return differing - method


@pytest.mark.parametrize("name", PUBLISHED)
def test_benchmark_configs_have_the_stream_and_optimisation_of_sdlora(name):
    assert {"optimizer", "momentum", "weight_decay", "init_lr", "lrate", "scheduler", "milestones", "init_epoch", "epochs",
            "batch_size", "rank", "head_lr"} <= load_config(EXPS / f"{name}_original.json").model_dump().keys()
    assert differing_from_original(name) == set()
    for other in ("evidence", "routed"):
        assert differing_from_original(f"{name}_{other}") == {"growth_threshold", "row_fit"}


@pytest.mark.parametrize("name", ["quickstart", "glyphs"])
def test_pairs_without_a_download_share_stream_budget_and_capacity(name):
    assert differing_from_original(f"{name}_gumbel") - {"eval_every"} == {"refit_lr"}
    for other in (name, f"{name}_evidence"):
        assert differing_from_original(other) - {"eval_every"} == {"growth_threshold", "refit_lr", "row_fit"}


def test_fashion_mnist_has_the_recipe_of_the_quick_start_and_a_twin():
    assert differing_from_original("fashion_mnist") == {"growth_threshold", "refit_lr", "row_fit"}
    quickstart, fashion = (load_config(EXPS / f"{name}.json").model_dump() for name in ("quickstart", "fashion_mnist"))
    differing = {key for key in quickstart if quickstart[key] != fashion[key]}
    assert differing == {"prefix", "dataset", "filepath", "init_epoch", "epochs", "eval_every"}


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
    for name in ("quickstart", "glyphs", "glyphs_domains", "glyphs_domains_30"):
        routed, gumbel, evidence = (load_config(EXPS / f"{name}{kind}.json") for kind in ("", "_gumbel", "_evidence"))
        assert (routed.gate, routed.inference, routed.growth_threshold) == ("gumbel_sparsemax", "routed", 0.5)
        assert (gumbel.gate, gumbel.inference, gumbel.growth_threshold) == ("gumbel_sparsemax", "global", 0.1)
        assert (evidence.gate, evidence.growth_threshold) == ("evidence", 0.5)
    assert quickstart.filepath == "./runs/quickstart/"


def test_c100_config_is_where_scripts_look_for_its_files():
    config = load_config(EXPS / "sdlora_c100.json")
    assert (config.seed, config.filepath) == ([1993], "./CF100/")


def test_c100_test_config_is_the_text_people_use():
    expected, shipped = json.loads(TEST_CONFIG), json.loads((EXPS / "sdlora_c100_test.json").read_text())
    assert list(shipped.items()) == list(expected.items())
    config = load_config(EXPS / "sdlora_c100_test.json")
    assert config.gumbel_anneal_rate == 0.999 and config.device == ["0"]


VARIANTS = {"sdlora": "none", "gumbel": "gumbel_sparsemax", "evidence": "evidence", "sparsemax": "sparsemax",
            "gumbel_softmax": "gumbel_softmax", "routed": "gumbel_sparsemax"}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_variants_are_called_as_everywhere(path):
    """docs/METHODS.md has the list; what is varied on top stands behind the name, as in `gumbel_bf16`."""
    for run in load_study(path).runs():
        if not run.variant:  # a trial of a search
            continue
        others = [name for name in LEARNERS if name not in VARIANTS and f"{run.variant}_".startswith(f"{name}_")]
        if others:
            assert [run.config.model_name] == others, run.variant
            continue
        name = max((name for name in VARIANTS if run.variant == name or run.variant.startswith(name + "_")), key=len)
        assert (run.config.model_name, run.config.gate) == ("sdlora", VARIANTS[name]), run.variant
        assert (getattr(run.config, "inference", None) == "routed") == (name == "routed"), run.variant
        if run.variant in ("sdlora_rr", "sdlora_kd"):
            shipped = load_config(EXPS / f"sdlora_c100{run.variant.removeprefix('sdlora')}.json")
            assert (run.config.rank_schedule, run.config.growth_rule) == (shipped.rank_schedule, shipped.growth_rule)


# What runs: the shipped files cut down to data and networks that fit a test, all keys of the method as they are.

TINY = {"backbone_type": "vit_glyph_tiny_patch8_32", "init_cls": 2, "increment": 2, "nb_tasks": 2, "init_epoch": 2,
        "epochs": 8, "batch_size": 4}
WRITERS: dict[str, Callable[[Path], Path]] = {
    "cifar224": lambda root: write_cifar100(root, train_per_class=4, classes=6),
    "imagenetr": lambda root: write_class_folders(root / "imagenet-r", train_per_class=4),
    "imageneta": lambda root: write_class_folders(root / "imagenet-a", train_per_class=4),
    "cub": lambda root: write_class_folders(root / "cub", train_per_class=4),
    "domainnet": lambda root: write_domainnet(root / "domainnet"),
}


def run_tiny(config: Path, data: Path, folder: Path | None = None, **changes) -> Path:
    """Runs `config`, cut down, on the files in `data`; returns the folder of the run, `filepath` where none is given."""
    folder = folder or Path(load_config(config).filepath)
    values = {**TINY, "data_path": data, "filepath": folder, **changes}
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    assert command.main(["--config", str(config), "--device", "cpu", *sets]) == 0
    return folder


def kept(folder: Path) -> list[bool]:
    return [task["kept"] for task in json.loads((folder / "results.json").read_text())["tasks"]]


def gates(folder: Path) -> torch.Tensor:
    return torch.load(folder / "beta_values_task_1.pt")["gate_logits"]


def same_rows(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "head_task_1.safetensors") for folder in (one, other))
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def tiny_cifar(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cifar")
    WRITERS["cifar224"](root)
    return root


@pytest.fixture(scope="module")
def tiny_c100(tiny_cifar, tmp_path_factory) -> Path:
    """The run of sdlora_c100.json that others are compared with."""
    return run_tiny(EXPS / "sdlora_c100.json", tiny_cifar, tmp_path_factory.mktemp("run") / "c100")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_benchmark_config_trains_a_gumbel_gate(name, tmp_path):
    WRITERS[PUBLISHED[name][0]](tmp_path)
    log = (run_tiny(EXPS / f"{name}.json", tmp_path, tmp_path / "run") / "train.log").read_text()
    assert "[Gumbel CL-LoRA] tau_init=5.0, tau_final=0.5, anneal_rate=auto, lambda_sparsity=0.01" in log
    assert len(re.findall(r"Task 1, Epoch \d/8 => Loss [0-9.]+ \(clf=[0-9.]+, sparse=0\.0[0-9]+\), tau=[0-9.]+,", log)) == 8
    assert "Current task beta: " in log and ", threshold: 0.1000" in log


@pytest.mark.parametrize("value", [0.0, 10.0])
def test_lambda_sparsity_changes_what_is_trained(value, tiny_c100, tiny_cifar, tmp_path):
    other = run_tiny(EXPS / "sdlora_c100.json", tiny_cifar, tmp_path / "run", lambda_sparsity=value)
    assert not torch.equal(gates(tiny_c100), gates(other)) and not same_rows(tiny_c100, other)


@pytest.mark.parametrize("changes", [{"growth_threshold": 0.9}, {"growth_rule": "topk", "growth_topk": 1}])
def test_threshold_and_rule_change_the_decision(changes, tiny_c100, tiny_cifar, tmp_path):
    assert kept(tiny_c100) == [True, True]
    assert kept(run_tiny(EXPS / "sdlora_c100.json", tiny_cifar, tmp_path / "run", **changes)) == [True, False]


def snippets(names: str) -> list[str]:
    """The programs of the implementation page in which `names` occurs; excerpts of the code begin with a comment."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if block.startswith(("import ", "from ")) and names in block]


def test_the_documented_baseline_and_grid_differ_from_the_config_they_start_from(tiny_c100, tiny_cifar, tmp_path, monkeypatch):
    (tmp_path / "exps").mkdir()
    shutil.copy(EXPS / "sdlora_c100.json", tmp_path / "exps")
    monkeypatch.chdir(tmp_path)
    programs = snippets("exps/sdlora_c100.json")
    assert len(programs) == 2
    for program in programs:
        exec(compile(program, str(PAGE), "exec"), {})
    baseline = load_config("exps/sdlora_c100_baseline.json")
    assert (baseline.gate, baseline.lambda_sparsity) == ("gumbel_sparsemax", 0)
    assert not same_rows(tiny_c100, run_tiny(Path("exps/sdlora_c100_baseline.json"), tiny_cifar))
    grid = {path: load_config(path) for path in sorted(Path("exps").glob("sdlora_c100_lambda_*.json"))}
    points = {(config.lambda_sparsity, config.growth_threshold): path for path, config in grid.items()}
    assert len(points) == len({config.filepath for config in grid.values()}) == 12
    sparse, dense = (run_tiny(points[point], tiny_cifar) for point in ((0.1, 0.1), (0.001, 0.1)))
    assert not same_rows(sparse, dense)


@pytest.mark.slow
def test_the_documented_readers_of_a_run_work_on_the_quick_start(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    sets = ["--set", "init_epoch=1", "--set", "epochs=1", "--set", "eval_every=0"]
    assert command.main(["--config", str(EXPS / "quickstart.json"), "--device", "cpu", *sets]) == 0
    programs = snippets("runs/quickstart")
    assert len(programs) == 2
    capsys.readouterr()
    for program in programs:
        exec(compile(program, str(PAGE), "exec"), {})
    assert capsys.readouterr().out == "torch.Size([8, 10])\n"


BASELINES = [path for path in STUDIES if path.stem.startswith("baselines_") and "tune" not in path.stem]
RATES = ("init_lr", "lrate")


def settings_of(config) -> dict:
    """What a run of a baselines study computes, but for its rates, its seed and the place of what it writes."""
    return {key: value for key, value in config.model_dump().items() if key not in (*RATES, "seed", "filepath", "prefix")}


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.stem)
def test_a_baselines_study_has_every_method_on_one_budget(path):
    runs = load_study(path).runs()
    assert {run.config.model_name for run in runs} == set(LEARNERS)
    assert {run.seed for run in runs} == {1994, 1995, 1996, 1997, 1998} and len({run.name for run in runs}) * 5 == len(runs)
    trained = [run.config for run in runs if run.variant != "finetune_head_ridge"]  # its answers are not what is trained
    epochs = {getattr(config, key) for config in trained for key in ("init_epoch", "epochs") if hasattr(config, key)}
    assert len(epochs) == 1 and {run.config.batch_size for run in runs} == {32}
    assert {run.config.backbone_type for run in runs} == {"vit_glyph_tiny_patch8_32"}


CHOSEN = [("baselines_digits", "baselines_tune_digits"), ("baselines_glyphs", "baselines_tune_glyphs"),
          ("baselines_glyphs_domains", "baselines_tune_glyphs_domains"),
          ("baselines_fashion_mnist", "baselines_tune_fashion_mnist")]


@pytest.mark.parametrize(("study", "chooses"), CHOSEN)
def test_every_method_of_the_baselines_has_three_rates_to_choose_from(study: str, chooses: str):
    tuned = {}
    for run in load_study(EXPS / "studies" / f"{chooses}.json").runs():
        method, _, rate = run.name.rpartition("_lr")
        assert run.seed == 1993 and {getattr(run.config, key) for key in RATES if hasattr(run.config, key)} == {float(rate)}
        tuned.setdefault(method, {})[float(rate)] = settings_of(run.config)
    methods = {run.name: run.config for run in load_study(EXPS / "studies" / f"{study}.json").runs()}
    on_top = {name for name in methods if name.endswith(("_ridge", "_pooled"))}  # another head at the rates of the method
    assert tuned.keys() == {name for name, config in methods.items() if hasattr(config, "init_lr")} - on_top
    assert all(methods[name].init_lr == methods[name.rpartition("_")[0]].init_lr for name in on_top)
    for name, settings in tuned.items():
        low, middle, high = sorted(settings)
        assert (middle, high) == pytest.approx((4 * low, 16 * low)), name
        assert methods[name].init_lr in settings and settings[low] == settings[high] == settings_of(methods[name]), name


@pytest.mark.parametrize(("study", "chooses"), [*CHOSEN, ("routed_30_tuned", "routed_30_tune")])
def test_the_rate_of_every_method_is_the_best_that_was_tried(study: str, chooses: str):
    """By the committed records: the best last accuracy, of equal ones the lower rate; a run that failed has no record."""
    found = {}
    for path in sorted((EXPS.parent / "docs" / "results" / chooses).glob("*/seed_1993.json")):
        method, _, rate = path.parent.name.rpartition("_lr")
        found.setdefault(method, {})[float(rate)] = json.loads(path.read_text(encoding="utf-8"))["metrics"]["last_accuracy"]
    methods = {run.name: run.config for run in load_study(EXPS / "studies" / f"{study}.json").runs()}
    assert {name: methods[name].init_lr for name in found} == {
        name: min(tried, key=lambda rate: (-tried[rate], rate)) for name, tried in found.items()}
