"""Searches: what a file may draw from, and what is wrong with one."""

import importlib.util
from pathlib import Path

import pytest

from studies.study import Study, load_study
from tests.helpers import SMALL
from tests.studies.conftest import write_search
from utils.errors import UserError

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="pip install optuna")

BAD = {
    "range and list": ({"search": {"rank": 4}}, ["search", "'rank' is 4", "list of values", "range"]),
    "empty list": ({"search": {"rank": []}}, ["'rank' is []"]),
    "unknown key": ({"search": {"rnk": [4]}}, ["search", "'rnk' is not a key", "'rank'"]),
    "twice": ({"search": {"rank": [4, 4]}}, ["'rank' holds 4 twice"]),
    "no high": ({"search": {"rank": {"low": 2}}}, ["'rank' has no 'high'"]),
    "part": ({"search": {"rank": {"low": 2, "high": 4, "lgo": True}}}, ["'lgo' is not part of a range", "log"]),
    "low text": ({"search": {"rank": {"low": "2", "high": 4}}}, ["'low' of 'rank' is \"2\"", "a number"]),
    "reversed": ({"search": {"rank": {"low": 4, "high": 2}}}, ["'low' of 'rank' is 4, not below"]),
    "whole numbers": ({"search": {"rank": {"low": 1, "high": 2.5}}}, ["'high' of 'rank' is 2.5", "integers"]),
    "log from 0": ({"search": {"init_lr": {"low": 0, "high": 1, "log": True}}}, ["'low' of 'init_lr' is 0", "above 0"]),
    "log and step": ({"search": {"init_lr": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}}, ["'step'", "'log'"]),
    "step 0": ({"search": {"init_lr": {"low": 0.1, "high": 1, "step": 0}}}, ["'step' of 'init_lr' is 0", "above 0"]),
    "step too wide": ({"search": {"rank": {"low": 1, "high": 4, "step": 5}}}, ["'step' of 'rank' is 5", "wide"]),
    "range of names": ({"search": {"gate": {"low": 1, "high": 2}}}, ["'gate' is no number"]),
    "beyond the limits": ({"search": {"init_lr": {"low": -1, "high": 1}}}, ["study.json, search", "'init_lr' is -1"]),
    "listed value": ({"search": {"rank": [4, 0]}}, ["study.json, search", "'rank' is 0"]),
    "choice": ({"search": {"gate": ["none", "nune"]}}, ["study.json, search", "nune", "'none'"]),
    "two at odds": ({"search": {"gumbel_tau_init": {"low": 0.2, "high": 5.0}, "gumbel_tau_final": {"low": 0.1, "high": 0.5}}},
                    ["study.json, search", "'gumbel_tau_final' is 0.5", "'gumbel_tau_init' of 0.2"]),
    "without effect": ({"search": {"gate": ["none"], "lambda_sparsity": [0.1, 0.2]}}, ["'lambda_sparsity' has no effect"]),
    "base without effect": ({"changes": {"prompt_length": 7}}, ["'prompt_length'", "no effect"]),
    "seeds": ({"search": {"seed": [1, 2]}}, ["'seed' cannot vary"]),
    "grid": ({"grid": {"rank": [4]}}, ["'grid' and 'search'"]),
    "variants": ({"variants": {"a": {}}}, ["'variants' and 'search'"]),
    "no trials": ({"trials": ...}, ["'trials' must be given", "at least 1"]),
    "trials 0": ({"trials": 0}, ["'trials' is 0"]),
    "trials of no search": ({"search": ...}, ["'trials' has no effect without 'search'"]),
    "measure": ({"measure": "accuracy"}, ["'measure' is \"accuracy\"", "last_accuracy"]),
    "three measures": ({"measure": ["last_accuracy", "forgetting", "stored_bytes"]}, ["'measure' is"]),
    "a measure twice": ({"measure": ["forgetting", "forgetting"]}, ["'measure' is"]),
    "pruning of two": ({"measure": ["last_accuracy", "stored_bytes"], "prune": True}, ["'prune' is true", "two measures"]),
    "selecting seed reports": ({"report_seed": [1, 2]}, ["1 is in 'seed'", "'report_seed'"]),
    "storage": ({"storage": 5}, ["'storage' is 5"]),
}


@pytest.mark.parametrize("keys, words", BAD.values(), ids=BAD)
def test_a_bad_search_is_one_sentence(keys: dict, words: list[str], tmp_path: Path) -> None:
    path = write_search(tmp_path, **keys)
    with pytest.raises(UserError) as caught:
        load_study(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert sorted(item.name for item in tmp_path.iterdir()) == ["base.json", "study.json"]


def drawn(study: Study, params: dict) -> dict:
    """What the study's space draws where Optuna draws these."""
    import optuna

    return study.space.draw(optuna.trial.FixedTrial(params))


@needs_optuna
def test_a_key_is_drawn_where_it_has_an_effect(tmp_path: Path) -> None:
    """The base's gate_lr and the drawn lambda_sparsity mean nothing without a trained gate."""
    study = load_study(write_search(tmp_path))
    params = {"init_lr": 0.123456, "gate": "none", "lambda_sparsity": 0.01}
    assert drawn(study, params) == {"gate": "none", "init_lr": 0.1235}
    config = study.run_of("trial", drawn(study, params), 1).config
    assert (config.gate, config.init_lr, hasattr(config, "gate_lr")) == ("none", 0.1235, False)
    values = drawn(study, {**params, "gate": "gumbel_sparsemax"})
    assert values == {"gate": "gumbel_sparsemax", "init_lr": 0.1235, "lambda_sparsity": 0.01}
    assert study.run_of("trial", values, 1).config.gate_lr == SMALL["gate_lr"]


@needs_optuna
def test_methods_lists_integers_and_null_are_drawn(tmp_path: Path) -> None:
    space = {"rank": {"low": 2, "high": 8, "step": 2}, "model_name": ["sdlora", "simplecil"],
             "gate": ["none", "gumbel_sparsemax"], "milestones": [[1], [1, 2], None], "scheduler": ["steplr"]}
    study = load_study(write_search(tmp_path, search=space))
    params = {"rank": 6, "model_name": "sdlora", "gate": "none", "milestones": "[1, 2]", "scheduler": "steplr"}
    values = drawn(study, params)
    assert values["milestones"] == [1, 2] and study.run_of("trial", values, 1).config.rank == 6
    assert study.run_of("trial", drawn(study, {**params, "milestones": None}), 1).config.milestones == []
    assert drawn(study, {**params, "model_name": "simplecil"}) == {"model_name": "simplecil"}
