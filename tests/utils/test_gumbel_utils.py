"""utils/gumbel_utils.py against independent implementations and worked numbers."""

import math

import entmax
import pytest
import torch
from scipy.optimize import minimize

from utils.gumbel_utils import (
    TemperatureScheduler,
    gumbel_softmax,
    gumbel_sparsemax,
    sample_gumbel,
    sparsemax,
    sparsity_loss,
)
from utils.rng import generator


def test_sparsemax_is_the_projection_onto_the_simplex() -> None:
    z = torch.tensor([0.9, 0.3, -0.4, 0.8], dtype=torch.float64)
    solution = minimize(lambda p: ((p - z.numpy()) ** 2).sum(), x0=[0.25] * 4, bounds=[(0, 1)] * 4, tol=1e-14,
                        constraints={"type": "eq", "fun": lambda p: p.sum() - 1})
    assert torch.allclose(sparsemax(z), torch.tensor(solution.x), atol=1e-6)


def test_sparsemax_worked_by_hand() -> None:
    assert sparsemax(torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.5]
    assert sparsemax(torch.tensor([3.0, 1.0])).tolist() == [1.0, 0.0]
    assert torch.allclose(sparsemax(torch.tensor([0.5, 0.2, -2.0])), torch.tensor([0.65, 0.35, 0.0]))
    assert sparsemax(torch.tensor([7.0])).tolist() == [1.0]
    assert sparsemax(torch.tensor([0.0, float("-inf")])).tolist() == [1.0, 0.0]
    assert sparsemax(torch.tensor([1e30, -1e30, 0.0])).tolist() == [1.0, 0.0, 0.0]


def test_sparsemax_along_any_dimension() -> None:
    z = torch.randn(3, 5, 4, generator=generator(0, "test"))
    expected = torch.stack([sparsemax(row) for row in z.transpose(1, 2).reshape(-1, 5)])
    assert torch.allclose(sparsemax(z, dim=1), expected.reshape(3, 4, 5).transpose(1, 2))
    assert torch.allclose(sparsemax(z, dim=1).sum(1), torch.ones(3, 4))


def test_sparsemax_jacobian_is_exact() -> None:
    z = torch.randn(6, 5, dtype=torch.float64, generator=generator(1, "test")).requires_grad_()
    assert torch.autograd.gradcheck(sparsemax, (z,))
    single = torch.tensor([0.3, 0.2, -0.1, -3.0], dtype=torch.float64)
    support = (sparsemax(single) > 0).double()
    expected = torch.diag(support) - torch.outer(support, support) / support.sum()
    assert torch.allclose(torch.autograd.functional.jacobian(sparsemax, single), expected)


@pytest.mark.parametrize("gate", [gumbel_sparsemax, gumbel_softmax])
def test_temperature_and_noise_enter_the_gate(gate) -> None:
    logits = torch.tensor([0.4, 0.1, 0.0], dtype=torch.float64)
    noise = sample_gumbel((3,), generator(3, "gate"), torch.float64)
    plain = sparsemax if gate is gumbel_sparsemax else (lambda z: torch.softmax(z, -1))
    assert torch.equal(gate(logits, 0.7, noise=noise), plain((logits + noise) / 0.7))
    assert torch.equal(gate(logits, 0.7, training=False), plain(logits / 0.7))
    assert torch.autograd.gradcheck(lambda x: gate(x, 0.7, noise=noise), (logits.requires_grad_(),))


def test_sample_gumbel_has_the_moments_of_gumbel() -> None:
    noise = sample_gumbel((200_000,), generator(0, "moments"), torch.float64)
    assert abs(noise.mean().item() - 0.57722) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03
    assert torch.equal(noise[:5], sample_gumbel((200_000,), generator(0, "moments"), torch.float64)[:5])


def test_sparsity_loss_worked_by_hand() -> None:
    assert sparsity_loss(torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2), abs=1e-6)
    assert sparsity_loss(torch.tensor([1.0, 0.0])).item() == pytest.approx(0, abs=1e-6)
    assert sparsity_loss(torch.ones(1, dtype=torch.float64)).item() == 0
    assert sparsity_loss(torch.tensor([0.5, 0.5], dtype=torch.bfloat16)).dtype == torch.float32
    assert sparsity_loss(torch.tensor([0.5, 0.5], dtype=torch.float64)).dtype == torch.float64


def test_temperature_follows_the_equation() -> None:
    schedule = TemperatureScheduler(5.0, 0.5, 0.999, 800)
    assert schedule.at(0) == 5.0
    assert schedule.at(799) == pytest.approx(0.5 + 4.5 * 0.999**799)
    assert round(schedule.at(799), 2) == 2.52
    assert "2.52" in schedule.warning() and f"{schedule.arriving_rate():.4f}" in schedule.warning()


@pytest.mark.parametrize("steps", [2, 7, 800, 100_000])
def test_auto_rate_arrives_within_one_percent(steps: int) -> None:
    schedule = TemperatureScheduler(5.0, 0.5, "auto", steps)
    assert schedule.at(steps - 1) == pytest.approx(0.505)
    assert schedule.at(steps - 2) > 0.505
    assert schedule.warning() is None


def test_nothing_to_anneal() -> None:
    assert TemperatureScheduler(0.5, 0.5, "auto", 10).at(9) == 0.5
    assert TemperatureScheduler(5.0, 0.5, "auto", 1).at(0) == 5.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sparsemax_agrees_with_entmax(dtype: torch.dtype) -> None:
    z = (3 * torch.randn(40, 7, 5, generator=generator(5, "entmax"), dtype=torch.float64)).to(dtype)
    for dim in (0, 1, 2, -1):
        got = sparsemax(z, dim)
        assert got.dtype == dtype
        assert torch.equal(got, entmax.sparsemax(z.float() if dtype.itemsize < 4 else z, dim).to(dtype)) or torch.allclose(
            got, entmax.sparsemax(z.double(), dim).to(dtype), atol=4 * torch.finfo(dtype).eps)
    wide = z.double().requires_grad_()
    pull = torch.randn(z.shape, generator=generator(6, "pull"), dtype=torch.float64)
    ours, = torch.autograd.grad(sparsemax(wide), wide, pull)
    theirs, = torch.autograd.grad(entmax.sparsemax(wide, -1), wide, pull)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_sparsemax_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="-inf"):
        sparsemax(torch.full((2, 3), float("-inf")))
    with pytest.raises(ValueError, match="-inf"):
        sparsemax(torch.tensor([[1.0, float("-inf")], [2.0, float("-inf")]]), dim=0)


def test_hard_gates_are_one_hot_with_the_soft_gradient() -> None:
    logits = torch.tensor([0.3, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    hard = gumbel_sparsemax(logits, 2.0, hard=True, training=False)
    soft = gumbel_sparsemax(logits, 2.0, training=False)
    assert hard.tolist() == [0, 1, 0]
    assert torch.equal(torch.autograd.grad((hard * weights).sum(), logits)[0],
                       torch.autograd.grad((soft * weights).sum(), logits)[0])


def test_training_draws_from_the_generator_it_is_given() -> None:
    logits = torch.zeros(6)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first, second = (gumbel_sparsemax(logits, 1.0, generator=generator(1, "gate")) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, gumbel_sparsemax(logits, 1.0, generator=generator(2, "gate")))
    assert torch.equal(before, torch.random.get_rng_state())
    assert gumbel_sparsemax(logits, 1.0, training=False).tolist() == pytest.approx([1 / 6] * 6)
    with pytest.raises(ValueError, match="tau"):
        gumbel_sparsemax(logits, 0.0)


def test_scheduler_steps_and_resets() -> None:
    schedule = TemperatureScheduler(5.0, 0.5, 0.9)
    assert schedule.get_temperature() == 5.0
    assert schedule.step() == schedule.get_temperature() == pytest.approx(0.5 + 4.5 * 0.9)
    schedule.step()
    assert schedule.get_temperature() == pytest.approx(0.5 + 4.5 * 0.81)
    schedule.reset()
    assert schedule.get_temperature() == 5.0
