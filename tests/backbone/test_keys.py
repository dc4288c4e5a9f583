"""backbone/keys.py: keys against numpy, the shift against what it promises when nothing has moved, and what is stored."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor

from backbone.keys import Key, Keys, key_size, token_statistics
from tests.helpers import learner_of, small_config


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- one key


def test_a_key_is_the_mean_and_scatter_of_class_means() -> None:
    means = drawn(6, 11)
    key = Key.of(means)
    assert key.classes == 6 and np.allclose(key.mean, means.numpy().mean(0))
    assert np.allclose(key.scatter, 6 * means.numpy().var(0))


def test_joined_keys_are_the_key_of_all_classes_in_any_order() -> None:
    parts = [100 + drawn(count, 11, seed=count) for count in (2, 3, 7)]
    whole = np.concatenate([part.numpy() for part in parts])
    keys = [Key.of(part) for part in parts]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        first, second, third = (keys[index] for index in order)
        for joined in (first.joined(second).joined(third), first.joined(second.joined(third))):
            assert joined.classes == 12 and np.allclose(joined.mean, whole.mean(0), rtol=1e-12)
            assert np.allclose(joined.scatter, 12 * whole.var(0), rtol=1e-10)
    assert torch.equal(keys[0].mean, Key.of(parts[0]).mean), "joining changes neither"


# ---- the shift


def null_shifts(sizes: list[int], repeats: int = 12, statistics: int = 300) -> list[float]:
    """Mean shift from task 0 of each later task when all class means come from one Gaussian, its variances unequal."""
    stream, found = torch.Generator().manual_seed(1), []
    spread = torch.rand(statistics, generator=stream, dtype=torch.float64) * 5 + 0.1
    for _ in range(repeats):
        keys = Keys()
        found.append([])
        for task, classes in enumerate(sizes):
            new = Key.of(spread * torch.randn(classes, statistics, generator=stream, dtype=torch.float64))
            shifts = keys.shifts(new)
            found[-1].append(shifts.get(0, 1.0))
            keys.learn(task, new, None)
    return np.mean(found, 0).tolist()[1:]


@pytest.mark.parametrize(("sizes", "low", "high"), [
    ([20, 20, 20], 0.85, 1.15),
    ([10, 10, 10, 10], 0.85, 1.15),
    ([50, 2, 2, 3], 0.8, 1.2),
    ([5, 5, 5, 5], 0.9, 1.4),
    ([4, 3, 3, 3], 1.0, 1.7),
])
def test_the_shift_is_about_one_when_nothing_has_moved(sizes: list[int], low: float, high: float) -> None:
    """An estimated variance makes the ratio larger than 1 on average, the more so the fewer classes estimate it."""
    assert all(low < shift < high for shift in null_shifts(sizes)), null_shifts(sizes)


def test_with_tasks_of_two_classes_the_variance_of_earlier_tasks_helps() -> None:
    """The first pair of such tasks has two degrees of freedom, with which the mean of the ratio is that of nothing finite but
    for the floor of the variance; what each task adds to the prior brings it down."""
    shifts = null_shifts([2] * 8)
    assert shifts[0] > 2 and all(shift < 1.8 for shift in shifts[3:]), shifts


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_shift_grows_with_the_square_of_the_distance(classes: int) -> None:
    old, means = Key.of(drawn(classes, 200, seed=1)), drawn(classes, 200, seed=2)
    keys = Keys()
    keys.learn(0, old, None)
    shifts = [keys.shifts(Key.of(means + distance))[0] for distance in (0, 2, 4, 8, 400, 800)]
    assert shifts == sorted(shifts) and shifts[2] > 2 * shifts[0]
    assert shifts[5] / shifts[4] == pytest.approx(4, rel=0.02)


def test_the_shift_by_its_formula() -> None:
    first, second, third = drawn(4, 9, seed=1), 1 + drawn(3, 9, seed=2), 2 + drawn(2, 9, seed=3)
    keys = Keys()
    keys.learn(0, Key.of(first), None)
    keys.learn(1, Key.of(second), None)
    shifts = keys.shifts(Key.of(third))
    a, b, c = (part.numpy() for part in (first, second, third))
    within = (4 * a.var(0) + 3 * b.var(0) + 2 * c.var(0)) / (3 + 2 + 1)
    for task, old in ((0, a), (1, b)):
        count = len(old)
        variance = (count * old.var(0) + 2 * c.var(0) + 5 * within) / (count + 2 - 2 + 5)
        variance = variance + 0.01 * variance.mean()
        ratio = (old.mean(0) - c.mean(0)) ** 2 / (variance * (1 / count + 1 / 2))
        assert shifts[task] == pytest.approx(ratio.mean())


def test_a_statistic_that_hardly_varies_decides_nothing_alone() -> None:
    means = drawn(5, 100, seed=1)
    means[:, 0] *= 1e-9
    moved = means.clone()
    moved[:, 0] += 1e-3
    keys = Keys()
    keys.learn(0, Key.of(means), None)
    assert keys.shifts(Key.of(moved))[0] < 0.01
    blank = Key.of(torch.zeros(3, 7, dtype=torch.float64))
    keys = Keys()
    keys.learn(0, blank, None)
    assert keys.shifts(blank) == {0: 0.0}, "images without any variation at all"


def test_units_of_a_statistic_do_not_matter() -> None:
    first, second, units = drawn(5, 40, seed=1), 1 + drawn(6, 40, seed=2), 1e6
    shifts = []
    for factor in (1, units):
        keys = Keys()
        keys.learn(0, Key.of(factor * first), None)
        shifts.append(keys.shifts(Key.of(factor * second))[0])
    assert shifts[0] == pytest.approx(shifts[1])


# ---- the memory


def memory() -> Keys:
    keys = Keys()
    for task, (classes, nearest) in enumerate([(4, None), (2, None), (3, 0)]):
        keys.learn(task, Key.of(drawn(classes, 8, seed=task)), nearest)
    return keys


def test_a_refused_task_joins_the_key_it_is_told_and_counts_for_the_variance() -> None:
    keys = memory()
    parts = [drawn(classes, 8, seed=task) for task, classes in enumerate((4, 2, 3))]
    assert list(keys.of) == [0, 1] and keys.of[0].classes == 7 and keys.of[1].classes == 2
    assert torch.allclose(keys.of[0].mean, torch.cat([parts[0], parts[2]]).mean(0))
    assert keys.freedom == 3 + 1 + 2
    assert torch.allclose(keys.scatter, sum(Key.of(part).scatter for part in parts)), "within tasks, not within keys"


def test_asking_changes_nothing() -> None:
    keys, new = memory(), Key.of(drawn(3, 8, seed=9))
    before = [tensor.clone() for tensor in keys.tensors()]
    assert keys.shifts(new) == keys.shifts(new) and keys.freedom == 6
    assert all(map(torch.equal, before, keys.tensors()))


def test_state_comes_back_to_the_bit() -> None:
    file, keys, again = io.BytesIO(), memory(), Keys()
    torch.save(keys.state(), file)
    again.load(torch.load(io.BytesIO(file.getvalue()), weights_only=True), torch.device("cpu"))
    new = Key.of(drawn(3, 8, seed=9))
    assert again.freedom == keys.freedom and list(again.of) == [0, 1] and again.shifts(new) == keys.shifts(new)
    assert all(map(torch.equal, keys.tensors(), again.tensors()))
    empty = Keys()
    empty.load(Keys().state(), torch.device("cpu"))
    assert empty.shifts(new) == {} and empty.tensors() == []


def test_what_is_stored_is_counted() -> None:
    assert len(memory().tensors()) == 2 * 2 + 1 and sum(t.numel() for t in memory().tensors()) == 5 * 8
    learner = learner_of(small_config(gate="evidence", nb_tasks=2))
    before = sum(t.numel() for t in learner.stored_tensors())
    learner.begin_task(0)
    trained = sum(t.numel() for module in learner.modules() for t in [*module.parameters(), *module.buffers()])
    assert sum(t.numel() for t in learner.stored_tensors()) == trained + 3 * 18 * 128 > before
    ids = {id(tensor) for tensor in learner.stored_tensors()}
    assert {id(tensor) for tensor in learner.recipe.keys.tensors()} <= ids


# ---- statistics


@pytest.mark.parametrize(("tokens", "side"), [(16, 4), (196, 14), (64, 8), (4, 2), (9, 3), (12, None), (35, None)])
def test_statistics_are_means_over_cells_and_the_deviation(tokens: int, side: int | None) -> None:
    values = drawn(3, tokens, 5).float()
    statistics = token_statistics(values)
    x = values.double().numpy()
    if side is None:
        stretches = [x[:, tokens * cell // 16:-(-tokens * (cell + 1) // 16)].mean(1) for cell in range(16)]
        cells = np.stack(stretches, -1)  # [b, d, 16]
    else:
        image = x.reshape(3, side, side, 5)
        edges = [(side * cell // 4, -(-side * (cell + 1) // 4)) for cell in range(4)]
        cells = np.stack([image[:, top:bottom, left:right].mean((1, 2)) for top, bottom in edges for left, right in edges], -1)
    expected = np.concatenate([cells.reshape(3, -1), x.mean(1), x.std(1)], 1)
    assert statistics.dtype == torch.float64 and np.allclose(statistics, expected)
    assert statistics.shape == (3, key_size(5)) == (3, 18 * 5)


def test_statistics_of_an_image_do_not_depend_on_the_batch() -> None:
    values = drawn(6, 16, 8)
    assert torch.allclose(token_statistics(values)[2:4], token_statistics(values[2:4]), rtol=1e-14)
