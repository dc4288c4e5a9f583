"""backbone/gated_linear.py: the product form against plain tensor code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from backbone import gated_linear
from backbone.gated_linear import GatedLinear, GatedQKV, Operands
from tests.helpers import bank_on, filled_bank, images, loop_network, tiny_vit, trained
from utils.rng import generator

WIDTH = 8


def operands(stored: int, rank: int) -> Operands:
    shapes = [(2, stored), (2, stored, WIDTH), (2, WIDTH, stored), (2,), (2, rank, WIDTH), (2, WIDTH, rank)]
    drawn = [torch.randn(shape, generator=generator(i, "operands"), dtype=torch.float64) for i, shape in enumerate(shapes)]
    return Operands(*[t.requires_grad_(i not in (1, 2)) for i, t in enumerate(drawn)])


def merged(weight: Tensor, o: Operands) -> Tensor:
    deltas = [o.stored_B[p] @ torch.diag(o.stored_c[p]) @ o.stored_A[p] + o.new_c[p] * o.new_B[p] @ o.new_A[p]
              for p in (0, 1)]
    return weight + torch.cat([deltas[0], torch.zeros_like(deltas[0]), deltas[1]])


@pytest.mark.parametrize("stored, rank", [(0, 2), (2, 1), (9, 3)], ids=["first task", "low rank", "full rank"])
def test_same_output_and_gradients_as_plain_tensor_code(stored: int, rank: int) -> None:
    o = operands(stored, rank)
    x = torch.randn(2, 5, WIDTH, generator=generator(7, "x"), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3 * WIDTH, WIDTH, generator=generator(8, "w"), dtype=torch.float64)
    bias = torch.randn(3 * WIDTH, generator=generator(9, "b"), dtype=torch.float64)
    inputs = [x, o.stored_c, o.new_c, o.new_A, o.new_B]
    plain = F.linear(x, merged(weight, o), bias)
    fast = GatedLinear.apply(x, merged(weight, o).detach(), bias, *o)
    assert torch.equal(plain, fast)
    pull = torch.randn(plain.shape, generator=generator(9, "pull"), dtype=torch.float64)
    expected = torch.autograd.grad(plain, inputs, pull)
    for want, got in zip(expected, torch.autograd.grad(fast, inputs, pull), strict=True):
        assert torch.allclose(want, got, atol=1e-10, rtol=0)


def test_both_ways_of_the_backward_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_low_rank", "_full_rank"):
        original = getattr(gated_linear, name)
        monkeypatch.setattr(gated_linear, name, lambda *a, name=name, original=original: (taken.append(name), original(*a))[1])
    for stored in (2, 3):
        o = operands(stored, 2)
        x = torch.ones(1, WIDTH, dtype=torch.float64)
        GatedLinear.apply(x, torch.ones(3 * WIDTH, WIDTH, dtype=torch.float64), None, *o).sum().backward()
    assert taken == ["_low_rank", "_full_rank"]


def test_merge_writes_q_and_v_and_leaves_k() -> None:
    layer = GatedQKV(torch.nn.Linear(WIDTH, 3 * WIDTH).double())
    o = operands(4, 2)
    layer.merge(o)
    assert torch.allclose(layer.merged, merged(layer.weight, o).detach(), atol=1e-12)
    assert torch.equal(layer.merged[WIDTH:2 * WIDTH], layer.weight[WIDTH:2 * WIDTH])
    first = layer.merged.clone()
    layer.merge(o)
    assert torch.equal(layer.merged, first), "merging twice must be the same as once"
    layer.merge(None)
    assert torch.equal(layer.merged, layer.weight)


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("scope", ["layer", "task"])
def test_network_gradients_equal_the_per_adapter_loop(count: int, scope: str) -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, count, scope=scope)
    parameters = [bank.alpha, bank.gate.logits, bank.new_A, bank.new_B]
    bank.gate.set_temperature(3.0)
    noise = torch.linspace(-0.3, 0.3, count, dtype=torch.float64)

    def gradients(forward) -> list[Tensor]:
        loss = (forward(images()) ** 2).sum()
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    beta = bank.train_step(noise)
    fast = gradients(vit)
    loop = gradients(loop_network(vit, bank, bank.gate(noise)))
    assert torch.allclose(beta, bank.gate(noise))
    for want, got in zip(loop, fast, strict=True):
        assert torch.allclose(want, got, rtol=1e-10, atol=1e-10)
    assert count == 1 or all(g.abs().max() > 1e-6 for g in fast)


def test_under_autocast_gradients_stay_float32_and_close() -> None:
    vit = tiny_vit(dtype=torch.float32)
    bank = filled_bank(vit, 3)
    parameters = [bank.alpha, bank.new_A, bank.new_B]
    results = []
    for enabled in (False, True):
        bank.train_step()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = vit(images(dtype=torch.float32)).float().square().mean()
        results.append(torch.autograd.grad(loss, parameters))
    for full, half in zip(*results, strict=True):
        assert half.dtype == torch.float32
        assert (full - half).norm() < 0.1 * full.norm()


@pytest.mark.slow
def test_compiled_gradients_are_the_same() -> None:
    """Traced by torch.compile as it is; the backend that generates code is torch's business and takes a compiler."""
    torch.compiler.reset()
    vit = tiny_vit()
    bank = filled_bank(vit, 3)
    parameters = [bank.alpha, bank.gate.logits, bank.new_A, bank.new_B]
    compiled = torch.compile(vit, backend="aot_eager")
    results = []
    for network in (vit, compiled):
        bank.train_step()
        results.append(torch.autograd.grad(network(images()).square().sum(), parameters))
        bank.merge()
        with torch.no_grad():
            results[-1] += (network(images()),)
    for plain, traced in zip(*results, strict=True):
        assert torch.allclose(plain, traced, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_what_is_compiled_serves_every_later_task() -> None:
    """The stack of stored adapters grows from task to task; past 8 graphs torch would silently stop compiling."""
    torch.compiler.reset()
    counter = CompileCounter()
    vit = tiny_vit()
    bank = bank_on(vit)
    bank.skip_silent = False  # as with `compile`
    network = torch.compile(vit, backend=counter)
    graphs = []
    for task in range(9):  # from task 5 on, R + r = 18 is above d / 2 = 16
        if bank.current is not None:
            bank.commit()
        trained(bank, task)
        for count in (4, 3):  # whole batches and an epoch's last one
            bank.train_step()
            network(images(count)).sum().backward()
            bank.merge()
            with torch.no_grad():
                network(images(count))
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[4] and graphs[5] == graphs[8] <= 7, graphs
