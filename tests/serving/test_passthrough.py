"""What stands in for a dropped sublayer keeps the residual stream as it was."""

import pytest
import torch

from llmdrop_vllm.serving.passthrough import AddingNorm, DroppedNorm, DroppedPostNorm, DroppedSublayer, ZeroSublayer

X, RESIDUAL = torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0, 7.0]])


def test_sublayer_hands_on_hidden_states_wherever_they_are_among_the_arguments():
    positions = torch.tensor([0])
    sublayer = DroppedSublayer()
    assert sublayer(X) is X
    assert sublayer(positions, X) is X
    assert sublayer(positions=positions, hidden_states=X) is X


def test_sublayer_without_hidden_states_is_our_bug():
    with pytest.raises(TypeError, match="called without hidden states"):
        DroppedSublayer()(torch.tensor([0]))


def test_norm_keeps_the_pair_whose_sum_is_the_stream():
    x, residual = DroppedNorm()(X, RESIDUAL)
    assert x is X
    assert residual is RESIDUAL


def test_first_norm_adds_nothing_to_a_residual_that_already_holds_the_stream():
    assert torch.equal(DroppedNorm()(X), torch.zeros_like(X))


@pytest.mark.parametrize("length", [0, 2])
def test_a_sublayer_behind_a_norm_that_stays_adds_nothing(length):
    returned = ZeroSublayer(length)(positions=torch.tensor([0]), hidden_states=X)
    first, *rest = returned if length else (returned,)
    assert torch.equal(first, torch.zeros_like(X))
    assert rest == [None] * (length - 1)


def test_a_norm_before_something_that_is_multiplied_settles_the_sum():
    x, residual = AddingNorm()(X, RESIDUAL)
    assert torch.equal(x, torch.zeros_like(X))
    assert torch.equal(residual, X + RESIDUAL)
    assert torch.equal(AddingNorm()(X), torch.zeros_like(X))


def test_a_norm_after_a_sublayer_hands_on_what_it_got():
    assert DroppedPostNorm()(X) is X
