"""models/recipes/routed.py: when a newcomer is decided on, what each key's network is and stays, and where images go.

The stream: digits light on dark (task 0), as they are (task 1), and light on dark again (task 2). The right answer is keep,
keep, drop.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import trainer
from models import load_network
from models.base import BaseLearner
from models.recipes.routed import among_classes, merge_for
from tests.helpers import Interrupted, Watch, in_float64, learn, learner_of, resumed, same, test_images, tiny_config
from utils.errors import UserError

STREAM = {"inference": "routed", "gate_lr": 0.0, "init_cls": 4, "increment": 3, "batch_size": 64, "init_epoch": 2, "epochs": 2,
          "task_domains": ["negative", "plain", "negative"], "head_lr": 0.02, "refit_lr": 0.02, "eval_every": 0}


def config_of(folder: Path | str = "./unused/", **changes):
    return tiny_config(folder, **{**STREAM, **changes})


def features(learner: BaseLearner, key: int, images: Tensor) -> Tensor:
    """Those of the network of a key."""
    merge_for(learner.bank, learner.recipe.betas[key])
    return learner.embed(images).detach()


@pytest.fixture(scope="module")
def whole() -> tuple[BaseLearner, list[dict]]:
    """A learner that has been through the stream undisturbed, and its state before each of the tasks."""
    learner, states = learner_of(config_of()), []
    for task in range(3):
        states.append(copy.deepcopy(learner.state()) if task else {})
        learn(learner, range(task, task + 1))
    return learner, states


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routed") / "run"
    trainer.run(config_of(folder))
    return folder


def test_each_new_domain_founds_a_key_and_an_old_one_joins_its_own(whole: tuple) -> None:
    learner = whole[0]
    assert learner.bank.tasks == [0, 1] and learner.recipe.route == [0, 1, 0]
    assert learner.recipe.router.tasks == [0, 1] and sorted(learner.recipe.betas) == [0, 1]
    trained = sum(learner.data.train_size(task) for task in (0, 2))
    assert learner.recipe.router.moments[0].count == trained, "the key is known from the images of both tasks"


def test_the_logits_start_at_minus_the_log_of_the_shift_and_of_the_price(whole: tuple) -> None:
    learner = learner_of(config_of(gate_price=2.0))
    learner.load_state(copy.deepcopy(whole[1][2]))
    shifts = {task: key for task, key in learner.recipe.keys.of.items()}
    learner.begin_task(2)
    new = learner.recipe._new
    reference = learner_of(config_of())
    reference.load_state(copy.deepcopy(whole[1][2]))
    expected = reference.recipe.keys.shifts(new)
    assert set(shifts) == {0, 1}
    wanted = -torch.tensor([expected[0], expected[1], 2.0]).log()
    assert torch.allclose(learner.gate.logits, wanted) and expected[0] < 2 < expected[1]
    assert learner.recipe.numbers() == {"price": 2.0, "shift_0": expected[0], "shift_1": expected[1]}


def test_the_price_is_in_the_record_only_where_it_was_asked(run: Path) -> None:
    numbers = [entry["numbers"] for entry in json.loads((run / "results.json").read_text())["tasks"]]
    assert [list(each) for each in numbers] == [["price", *names, "threshold"] for names in (
        [], ["shift_0"], ["shift_0", "shift_1"])]
    assert numbers[2]["shift_0"] < 3.0 < numbers[1]["shift_0"] and numbers[2]["price"] == 3.0
    learner = learn(learner_of(config_of(gate_prior="none")), range(1))
    learner.begin_task(1)
    assert list(learner.recipe.numbers()) == ["shift_0"]


def test_a_refused_newcomer_is_trained_for_the_gates_phase_alone(whole: tuple) -> None:
    learner = learner_of(config_of(gate_phase=0.25))
    learner.load_state(copy.deepcopy(whole[1][2]))
    learner.begin_task(2)
    steps = 2 * learner.data.steps_per_epoch(2, 64)
    learner.train()
    assert learner.steps_done() == -(-steps // 4) and learner.bank.current is None
    assert not learner.end_task().kept


def test_a_kept_newcomer_trains_on_at_the_final_temperature_without_noise(whole: tuple) -> None:
    learner = learner_of(config_of(), Watch())
    learner.load_state(copy.deepcopy(whole[1][1]))
    learner.begin_task(1)
    half, steps = learner.recipe.annealed_steps(), learner.recipe.task_steps()
    seen = []
    plain = learner.bank.train_step
    learner.bank.train_step = lambda noise=None: (seen.append((noise is not None, learner.gate.tau.item())), plain(noise))[1]
    learner.train()
    assert len(seen) == steps and [noisy for noisy, _ in seen] == [True] * half + [False] * (steps - half)
    assert seen[0][1] == 5.0 and all(tau == 0.5 for _, tau in seen[half:])


def test_i11_learning_a_task_changes_no_older_keys_network(whole: tuple) -> None:
    learner = learner_of(config_of())
    learn(learner, range(1))
    images = test_images(learner)
    before, frozen = features(learner, 0, images), learner.recipe.router.moments[0]
    learn(learner, range(1, 2))
    assert torch.equal(features(learner, 0, images), before)
    assert learner.recipe.router.moments[0] is frozen, "another domain's images are not in its key"
    learner.begin_task(2)
    assert torch.equal(features(learner, 0, images), before), "nor does a newcomer that has only begun"
    learner.train()
    assert torch.equal(features(learner, 0, images), before)


def test_i2_commit_changes_no_output() -> None:
    learner = learn(learner_of(config_of()), range(2), end_last=False)
    images = test_images(learner).double()
    in_float64(learner)
    learner.bank.merge()
    before = learner.embed(images).detach()
    learner.settle()
    assert (features(learner, 1, images) - before).abs().max() < 1e-10


def images_of_both(learner: BaseLearner) -> Tensor:
    """Eight test images of task 0, then eight of task 1."""
    parts = [learner.data.eval_batches("test", learner.data.task_classes(task), 8) for task in (0, 1)]
    return torch.cat([next(iter(part))[0] for part in parts])


def test_i12_predictions_do_not_depend_on_the_rest_of_the_batch(whole: tuple) -> None:
    learner = whole[0]
    images = images_of_both(learner)
    together = learner.predict(images)
    apart = torch.cat([learner.predict(images[:8]), learner.predict(images[8:])])
    assert torch.allclose(together, apart, atol=1e-4) and torch.equal(together.argmax(1), apart.argmax(1))


def test_i3_and_equation_1_the_files_give_the_network_of_every_key(run: Path) -> None:
    record = torch.load(run / "beta_values_task_2.pt")
    assert record["route"].tolist() == [0, 1, 0] and record["gate_scale"] == 1.0
    assert record["route_betas"].shape == (3, 3) and torch.equal(record["route_betas"][2], torch.zeros(3))
    assert torch.equal(record["beta_after"], record["route_betas"][0]), "task 2 belongs to key 0"
    assert sorted(load_file(run / "keys_task_2.safetensors")) == ["factors", "means", "tasks"]
    network = load_network(run, 2)
    learner = learner_of(config_of())
    learn(learner, range(3))
    images = images_of_both(learner)
    assert torch.equal(network(images), learner.predict(images))
    assert (network.keys[:8] == 0).float().mean() > 0.5 < (network.keys[8:] == 1).float().mean()


def test_i5_a_refused_adapter_is_in_no_file(run: Path) -> None:
    assert not (run / "adapter_task_2.safetensors").exists()
    assert json.loads((run / "results.json").read_text())["tasks"][2]["pruning_mask"] == [1, 1, 0]


@pytest.mark.parametrize("task, steps", [(1, 3), (1, 9), (2, 2)])
def test_i9_an_interrupted_task_ends_to_the_bit(whole: tuple, task: int, steps: int) -> None:
    learner = learner_of(config_of())
    learner.load_state(copy.deepcopy(whole[1][task]))
    learner.begin_task(task)
    learner.session = Watch(stop_at=steps)
    with pytest.raises(Interrupted):
        learner.train()
    other = resumed(learner)
    other.train()
    other.end_task()
    learn(other, range(task + 1, 3))
    assert same(other, whole[0])
    assert other.recipe.betas == whole[0].recipe.betas and other.recipe.route == whole[0].recipe.route
    assert other.recipe.numbers() == whole[0].recipe.numbers()


def test_only_classes_of_the_key_compete_if_asked() -> None:
    logits, keys = torch.zeros(2, 5), torch.tensor([0, 1])
    masked = among_classes(logits, keys, tasks=[0, 2], route=[0, 0, 2], classes=[range(2), range(2, 3), range(3, 5)])
    assert torch.isinf(masked).tolist() == [[False, False, False, True, True], [True, True, True, False, False]]


@pytest.mark.parametrize("changes, named", [
    ({"gate": "none"}, "'inference'"), ({"gate": "sparsemax"}, "'inference'"), ({"row_fit": "with_adapter"}, "'row_fit'"),
    ({"gate_compensation": False}, "'gate_compensation'"), ({"alpha_lr": 0.1}, "'alpha_lr'"),
    ({"growth_rule": "topk"}, "'growth_rule' is .topk. but 'inference' is .routed."),
    ({"gate_phase": 0.0}, "'gate_phase'"), ({"inference": "global", "gate_phase": 0.3}, "'gate_phase'")])
def test_what_has_no_place_in_it_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        config_of(**{"gate_lr": None, **changes} if "gate" in changes else changes)
