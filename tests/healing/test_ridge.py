"""The closed form is the naive one, and tokens that were held out choose lambda."""

import pytest
import torch

from llmdrop_vllm.healing import ridge
from llmdrop_vllm.healing.ridge import RIDGES, Sums, fit

CPU = torch.device("cpu")


def sums(z, e):
    found = Sums(z.shape[1], e.shape[1], CPU)
    for rows in torch.arange(len(z)).chunk(3):
        found.add(z[rows], e[rows])
    return found


def problem(rows, columns, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(columns, 3, generator=torch.Generator().manual_seed(9))
    z = torch.randn(rows, columns, generator=generator)
    return z, z @ truth + noise * torch.randn(rows, 3, generator=generator)


@pytest.mark.parametrize("block", [3, 4, 2048])
def test_it_is_the_naive_solution_and_its_error_the_naive_error(block, monkeypatch):
    monkeypatch.setattr(ridge, "BLOCK", block)
    (z, e), (other_z, other_e) = problem(200, 8, 0.5), problem(60, 8, 0.5, seed=1)
    found = fit(sums(z, e), sums(other_z, other_e))
    t = (z.T @ z).diagonal().mean()
    naive = torch.linalg.solve(z.T @ z + found.ridge * t * torch.eye(8), z.T @ e)
    torch.testing.assert_close(found.delta, naive, rtol=1e-4, atol=1e-5)
    left = (other_z @ naive - other_e).square().sum() / other_e.square().sum()
    assert found.error_left == pytest.approx(left.item(), rel=1e-4)


def test_scarce_and_noisy_tokens_get_a_larger_lambda():
    few = fit(sums(*problem(40, 32, 3.0)), sums(*problem(200, 32, 3.0, seed=1)))
    many = fit(sums(*problem(4000, 32, 0.01)), sums(*problem(200, 32, 0.01, seed=1)))
    assert RIDGES[0] >= few.ridge > many.ridge


def test_where_nothing_can_be_learnt_nothing_is_changed():
    z, _ = problem(40, 32, 0.0)
    generator = torch.Generator().manual_seed(5)
    learnt, held_out = (sums(z, torch.randn(40, 3, generator=generator) * 9) for _ in range(2))
    held_out.ze.neg_()
    learnt.ze.copy_(-held_out.ze)  # what helps the one hurts the other
    assert fit(learnt, held_out) is None
