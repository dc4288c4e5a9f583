"""backbone/lora.py and backbone/gates.py: the life of an adapter and the invariants of METHOD.md."""

import pytest
import timm
import torch
from torch import nn

from backbone.gated_linear import GatedQKV
from backbone.gates import OpenGate
from backbone.lora import frobenius_norm, inject
from tests.helpers import bank_on, filled_bank, images, loop_network, tiny_vit, trained
from utils.errors import UserError
from utils.rng import generator


def output(vit: nn.Module, bank) -> torch.Tensor:
    bank.merge()
    with torch.no_grad():
        return vit(images())


def test_frobenius_norm_is_that_of_the_product() -> None:
    A, B = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 8, 3)
    assert torch.allclose(frobenius_norm(A, B), torch.linalg.matrix_norm((B @ A).double()), rtol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_i2_commit_changes_no_output(count: int) -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, count)
    before = output(vit, bank)
    bank.commit()
    assert bank.current is None
    assert (output(vit, bank) - before).abs().max() < 1e-10
    stored = bank.direction(count - 1)
    unit = torch.linalg.matrix_norm(stored["blocks.1.v.B"] @ stored["blocks.1.v.A"])
    assert unit.item() == pytest.approx(1, abs=1e-10)


def test_i4_merged_and_unmerged_agree_in_float32() -> None:
    vit = tiny_vit(dtype=torch.float32)
    bank = filled_bank(vit, 5)
    bank.merge()
    x = images(dtype=torch.float32)
    with torch.no_grad():
        merged, loop = vit(x), loop_network(vit, bank, bank.gate())(x)
    assert (merged - loop).abs().max() / loop.abs().max() < 1e-5


def test_i5_a_pruned_adapter_is_gone() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 4)
    bank.commit()
    bank.keep_only([0, 2])
    assert bank.tasks == [0, 2] and bank.A.shape[2] == bank.ranks[0] + bank.ranks[1] == 6
    alone = tiny_vit()
    other = bank_on(alone)
    for task in (0, 2):
        trained(other, task, rank=3)
        other.commit()
    other.alpha.data.copy_(bank.alpha)
    other.gate.replace(bank.gate.logits)
    assert torch.allclose(output(vit, bank), output(alone, other), atol=1e-12)
    with pytest.raises(ValueError):
        bank.direction(1)


def test_pruning_the_current_adapter_frees_it() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 2)
    bank.keep_only([0])
    assert bank.current is None and bank.new_A is None and bank.alpha.shape == (1, 2, 2)
    assert bank.gate.logits.shape == (1,)


def test_i6_the_newcomers_logit_learns_from_the_classification_loss() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 3)
    bank.train_step()
    vit(images()).square().sum().backward()
    assert bank.gate.logits.grad[-1].abs() > 1e-6


def test_an_adapter_with_b_zero_learns_b_first() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 2)
    bank.commit()
    bank.add(2, 3, 1.0, 0.0, generator(0, "A"))
    bank.train_step()
    vit(images()).square().sum().backward()
    assert bank.alpha.grad[-1].abs().max() == 0 and bank.new_B.grad.abs().max() > 0


def test_i7_the_temperature_reaches_every_block_at_once() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 3)
    seen = []
    for tau in (5.0, 4.0):
        bank.gate.set_temperature(tau)
        bank.train_step()
        seen.append([layer.merged.clone() for layer in vit.modules() if isinstance(layer, GatedQKV)])
    assert len(seen[0]) == 2
    for first, second in zip(*seen, strict=True):
        width = first.shape[1]
        for rows in (slice(0, width), slice(2 * width, 3 * width)):
            assert not torch.equal(first[rows], second[rows])


def test_one_draw_of_noise_for_all_blocks_and_projections() -> None:
    """METHOD.md, section 8, mistake 3: every coefficient over its magnitude is the same beta."""
    vit = tiny_vit()
    bank = filled_bank(vit, 3)
    beta = bank.train_step(torch.tensor([0.4, -0.2, 0.1]))
    for layer in (m for m in vit.modules() if isinstance(m, GatedQKV)):
        assert layer.operands.new_c.shape == (2,)
    coefficients = torch.stack([m.operands.new_c for m in vit.modules() if isinstance(m, GatedQKV)])
    assert torch.allclose(coefficients / bank.alpha[-1], beta[-1].expand(2, 2))


def test_an_untrained_adapter_is_stored_as_zero_not_nan() -> None:
    """METHOD.md, section 8, mistake 4."""
    vit = tiny_vit()
    bank = filled_bank(vit, 1)
    bank.commit()
    before = output(vit, bank)
    for scope_task in (1, 2):
        bank.add(scope_task, 3, 1.0, bank.gate.logits.min().item(), generator(scope_task, "A"))
        bank.commit()
    assert torch.isfinite(bank.A).all() and torch.isfinite(bank.B).all() and bank.alpha[1:].abs().max() == 0
    assert bank.magnitudes()[1:].abs().max() == 0
    assert torch.isfinite(output(vit, bank)).all()
    bank.keep_only([0])
    assert torch.allclose(output(vit, bank), before)


def test_sd_lora_divides_by_the_product_of_norms_from_the_next_task_on() -> None:
    vit = tiny_vit()
    bank = bank_on(vit, gate=OpenGate, scope="task")
    trained(bank, 0)
    A, B, alpha = bank.new_A.detach().clone(), bank.new_B.detach().clone(), bank.alpha.item()
    before = output(vit, bank)
    bank.commit(keep_norm=True)
    assert torch.allclose(output(vit, bank), before, atol=1e-12), "the current adapter is evaluated as trained"
    assert torch.allclose(bank.magnitudes()[0], alpha * frobenius_norm(A, B))
    bank.reset_magnitudes(0.8)
    bank.add(1, 3, 0.8, 0.0, generator(1, "A"))
    bank.merge()
    expected = 0.8 * (B[0, 0] @ A[0, 0]) / (torch.linalg.matrix_norm(A[0, 0]) * torch.linalg.matrix_norm(B[0, 0]))
    layer = next(m for m in vit.modules() if isinstance(m, GatedQKV))
    assert torch.allclose(layer.merged[:32] - layer.weight[:32], expected, atol=1e-12)


def test_snapshot_and_restore() -> None:
    vit = tiny_vit()
    bank = filled_bank(vit, 3)
    before, state = output(vit, bank), bank.snapshot()
    bank.keep_only([0, 1])
    bank.commit() if bank.current else None
    assert not torch.allclose(output(vit, bank), before)
    bank.restore(state)
    assert torch.equal(output(vit, bank), before) and bank.current == 2


def test_injection_is_all_or_nothing() -> None:
    vit = tiny_vit()
    vit.blocks[1].attn.qkv = nn.Identity()
    with pytest.raises(UserError, match="'tiny' has no fused attn.qkv"):
        inject(vit, "tiny")
    assert isinstance(vit.blocks[0].attn.qkv, nn.Linear)
    with pytest.raises(UserError, match="resnet10t"):
        inject(timm.create_model("resnet10t"), "resnet10t")


@pytest.mark.parametrize("noise", [None, [2.0, -1.0, 0.5, 0.0]])
def test_adapters_of_weight_zero_are_left_out_of_a_step_and_nothing_changes(noise) -> None:
    results, columns = [], []
    for skip in (True, False):
        vit = tiny_vit()
        bank = filled_bank(vit, 4)
        bank.skip_silent = skip
        bank.alpha.data[1] = 0  # a magnitude of 0 is no weight of 0: its gradient stays
        bank.gate.logits.data.copy_(torch.tensor([0.1, 0.0, -3.0, 0.2]))
        beta = bank.train_step(None if noise is None else torch.tensor(noise, dtype=torch.float64))
        columns.append(bank.layers[0].operands.stored_A.shape[1])
        loss = vit(images()).square().sum()
        results.append(torch.autograd.grad(loss + beta.square().sum(), [bank.alpha, bank.gate.logits, bank.new_A, bank.new_B]))
    assert columns[0] < columns[1] == sum(bank.ranks[:-1])
    for some, every in zip(*results, strict=True):
        assert torch.allclose(some, every, rtol=1e-10, atol=1e-12)
