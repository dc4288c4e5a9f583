"""Refused values, contradictions, unknown keys: one sentence each, with the key and what is allowed."""

import pytest

from models import LEARNERS
from utils.config import config_from_dict, known_keys
from utils.config.components import chosen, config_class
from utils.config.load import allowed
from utils.errors import UserError

MINIMAL = {"dataset": "digits", "init_cls": 2}


def refusal(values: dict) -> str:
    with pytest.raises(UserError) as caught:
        config_from_dict(values, "x.json")
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "ending"),
    [
        ("rank", 0, "is 0; it must be an integer of at least 1."),
        ("epochs", -3, "is -3; it must be an integer of at least 1."),
        ("epochs", 1000.0, "is 1000.0, a decimal number; write the integer 1000."),
        ("epochs", 0.0, "is 0.0; it must be an integer of at least 1."),
        ("epochs", 2.5, "is 2.5; it must be an integer of at least 1."),
        ("rank", True, "is true; it must be an integer of at least 1."),
        ("init_lr", False, "is false; it must be a number above 0."),
        ("shuffle", 1, "is 1; it must be true or false."),
        ("batch_size", "32", 'is the text "32"; write the number 32.'),
        ("batch_size", "0", 'is the text "0"; it must be an integer of at least 1.'),
        ("batch_size", "many", 'is the text "many"; it must be an integer of at least 1.'),
        ("shuffle", "true", 'is the text "true"; write true without quotes.'),
        ("init_lr", 0, "is 0; it must be a number above 0."),
        ("init_lr", [0.1], "is [0.1]; it must be a number above 0."),
        ("dataset", None, "is null; it must be a name, or a list of different names."),
        ("dataset", "", 'is ""; it must be text that is not empty.'),
        ("filepath", "a\0b", 'is "a\\u0000b"; it must be text without control characters.'),
        ("filepath", "a\ud800", 'is "a\\ud800"; it must be text without control characters.'),
        ("filepath", "", 'is ""; it must be text that is not empty.'),
        ("prefix", ["a"], 'is ["a"]; it must be text.'),
        ("momentum", 1, "is 1; it must be a number of at least 0 and below 1."),
        ("growth_threshold", 1.5, "is 1.5; it must be a number from 0 to 1."),
        ("val_fraction", 0.6, "is 0.6; it must be a number above 0 and at most 0.5."),
        ("gate", "Gumbel_Sparsemax", "Did you mean 'gumbel_sparsemax'?"),
        ("gate", 3, 'is 3; it must be one of "gumbel_sparsemax", "sparsemax", "gumbel_softmax", "evidence", "none".'),
        ("head", "nearest", 'is "nearest"; it must be one of "linear", "cosine", "aligned", "ridge".'),
        ("gumbel_anneal_rate", 1.2, 'is 1.2; it must be a number above 0 and at most 1, or "auto".'),
        ("gumbel_anneal_rate", "0.99", 'is the text "0.99"; write the number 0.99.'),
        ("gumbel_anneal_rate", "fast", 'is "fast"; it must be a number above 0 and at most 1, or "auto".'),
        ("seed", [], "is []; it must be an integer from 0 to 4294967295, or a list of different ones."),
        (
            "seed",
            [1, 1],
            "is [1, 1]; it must be an integer from 0 to 4294967295, or a list of different ones.",
        ),
        ("seed", 2**32, "or a list of different ones."),
        ("seed", [True], "is [true]; it must be an integer"),
        ("seed", "1993,1994", 'is the text "1993,1994"; write [1993, 1994] without quotes.'),
        (
            "device",
            ["cpu", "0"],
            'is ["cpu", "0"]; it must be "auto", "cpu", or a list of different CUDA devices',
        ),
        ("device", ["0", "cuda:0"], 'is ["0", "cuda:0"]; it must be "auto"'),
        ("device", ["auto", "auto"], '"cpu" may be repeated.'),
        ("device", -1, "is -1; it must be"),
        ("milestones", [5, 5], "is [5, 5]; it must be a list of ascending integers of at least 1."),
        ("milestones", [[1], [2]], "is [[1], [2]]; it must be a list of ascending integers of at least 1."),
        ("milestones", 5, "is 5; it must be a list of ascending integers of at least 1."),
        ("rank_schedule", [[1, 10]], "tasks ascending from 0 and ranks of at least 1."),
        ("rank_schedule", [[0, 10], [4]], "is [[0, 10], [4]]; it must be a list of pairs"),
        ("rank_schedule", [[0, 0]], "is [[0, 0]]; it must be a list of pairs"),
        ("rank_schedule", [[0, 4], [0, 2]], "is [[0, 4], [0, 2]]; it must be a list of pairs"),
        ("rank_schedule", [], "is []; it must be a list of pairs"),
        ("memory_size", 2000, "is 2000; it must be 0."),
        ("fixed_memory", True, "is true; it must be false."),
        ("precision", "fp16", 'is "fp16"; it must be one of "fp32", "bf16".'),
        ("task_domains", "plain", 'is the text "plain"; it must be a list of domains, one per task.'),
        ("task_domains", ["a\nb"], 'is ["a\\nb"]; it must be a list of domains, one per task.'),
        ("gate_price", 0, "is 0; it must be a number above 0."),
        ("head_lr", 0, "is 0; it must be a number above 0."),
        ("refit_lr", -1, "is -1; it must be a number above 0."),
        ("prefix", {"a": "b" * 100}, "...; it must be text."),
    ],
)
def test_values_that_are_refused(key, value, ending):
    message = refusal({**MINIMAL, **({"gate": "evidence"} if key == "gate_price" else {}), key: value})
    assert message.startswith(f"x.json: '{key}' is ") and ending in message
    assert len(message) < 250


def test_every_key_refuses_a_wrong_value_in_a_sentence_of_its_own():
    choices = [{"inference": "routed"}] + [{"gate": gate} for gate in ("gumbel_softmax", "evidence", "none")] + [
        {"head": head} for head in ("cosine", "aligned", "ridge")] + [{"model_name": name} for name in LEARNERS]
    asked = set()
    for choice in choices:
        for key, field in config_class(chosen(choice)).model_fields.items():
            if key not in choice:
                message = refusal({**MINIMAL, **choice, key: {"not": "this"}})
                assert message == f'x.json: \'{key}\' is {{"not": "this"}}; it must be {allowed(key, field)}.'
                asked.add(key)
    assert asked == known_keys().keys()


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        ({"pretrained": False, "backbone_weights": "w.npz"}, ("pretrained", "backbone_weights"), "leave out"),
        ({"rank": 4, "rank_schedule": [[0, 10]]}, ("rank", "rank_schedule"), "is 4 but"),
        ({"min_lr": 0.02}, ("min_lr", "init_lr"), "above 'init_lr' of 0.01"),
        ({"min_lr": 0.02, "init_lr": 0.1}, ("min_lr", "lrate"), "above 'lrate' of 0.01"),
        ({"gumbel_tau_final": 6}, ("gumbel_tau_final", "gumbel_tau_init"), "is 6.0, above"),
        ({"gumbel_tau_init": 0.1}, ("gumbel_tau_final", "gumbel_tau_init"), "of 0.1;"),
        ({"batch_size": 4, "grad_accum": 5}, ("grad_accum", "batch_size"), "is 5, above"),
        ({"growth_rule": "val_loss", "refit_epochs": 0}, ("growth_rule", "refit_epochs"), "is 0"),
        ({"gate": "none", "growth_rule": "topk"}, ("growth_rule", "gate"), "the rule needs trained weights of older"),
        ({"growth_rule": "kd"}, ("growth_rule", "gate"), "the rule needs magnitudes that no gate ties"),
        ({"gate": "evidence", "growth_rule": "val_loss"}, ("growth_rule", "gate"), "a newcomer that has been trained"),
    ],
)
def test_contradictions_name_both_keys(change, keys, words):
    message = refusal({**MINIMAL, **change})
    assert message.startswith("x.json: '") and words in message
    assert all(f"'{key}'" in message for key in keys)


@pytest.mark.parametrize(
    "change",
    [
        {"min_lr": 0.02, "scheduler": "constant"},
        {"scheduler": "cosine", "milestones": [3], "lrate_decay": 0},
        {"growth_rule": "none", "growth_topk": 3, "growth_threshold": 0.5},
        {"rank": 4, "rank_schedule": [[0, 4], [1, 2]]},
        {"gate": "none", "growth_rule": "kd"},
        {"gate": "evidence", "growth_rule": "first_k", "gate_price": 2.0, "gumbel_tau_final": 0.4},
        {"gumbel_tau_init": 0.5},
        {"pretrained": False},
        {
            "tuned_epoch": 100,
            "alpha_lr": 0,
            "gate_lr": 0,
            "refit_epochs": 0,
            "eval_every": 0,
            "num_workers": 0,
        },
    ],
)
def test_inactive_keys_and_limits_are_accepted(change):
    config = config_from_dict({**MINIMAL, **change})
    for key, value in change.items():
        assert getattr(config, key) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {**MINIMAL, "batchsize": 3},
            "x.json: 'batchsize' is not a key of the config. Did you mean 'batch_size'?",
        ),
        ({"epoch": 3}, "x.json: 'epoch' is not a key of the config. Did you mean 'epochs'?"),
        (
            {**MINIMAL, "zzz\n": 3},
            "x.json: 'zzz\\u000a' is not a key of the config. docs/CONFIG.md lists the keys.",
        ),
        ({}, "x.json: 'dataset' and 'init_cls' must be given (docs/CONFIG.md describes the keys)."),
        ({"dataset": "digits"}, "x.json: 'init_cls' must be given (docs/CONFIG.md describes the keys)."),
    ],
)
def test_unknown_and_missing_keys(content, message):
    assert refusal(content) == message
