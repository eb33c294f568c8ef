"""The loss of training."""

import pytest
import torch

from llmdrop_vllm.healing import targets


@pytest.mark.parametrize("at_once", [1, 7 * 50, 2**20])
def test_the_divergence_and_its_gradient_are_those_of_the_outcomes_that_are_kept(at_once, monkeypatch):
    monkeypatch.setattr(targets, "LOGITS_AT_ONCE", {"cpu": at_once})
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 50, generator=generator)
    top = torch.randn(20, 50, generator=generator).log_softmax(-1).topk(8)

    own = logits.clone().requires_grad_()
    values = targets.divergence(own, top.indices, top.values)
    values.mean().backward()

    # Nine outcomes: eight tokens, and whatever else.
    exact = logits.double().requires_grad_()
    kept = exact.softmax(-1).gather(-1, top.indices)
    student = torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)
    mass = top.values.double().exp()
    teacher = torch.cat([mass, 1 - mass.sum(-1, keepdim=True)], -1)
    expected = torch.nn.functional.kl_div(student.log(), teacher, reduction="none").sum(-1)
    expected.mean().backward()
    torch.testing.assert_close(values, expected.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(own.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
