"""Selection that scores anew after each drop: what is asked of the model, and what is chosen from the answers."""

import pytest

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.selection import Ranked, iterative, select
from tests.selection.scores import FULL, SLIDING, make_scores


class FakeModel:
    """Similarities that depend on what is gone; remembers what it was asked."""

    def __init__(self, rescored):
        self.rescored, self.asked = rescored, []

    def __call__(self, mask):
        self.asked.append(mask)
        return self.rescored[len(self.asked) - 1]


def test_iterative_picks_by_the_scores_of_the_mask_so_far():
    first = make_scores([0.1, 0.2, 0.9, 0.8])
    second = make_scores([0.7, 0.2, None, 0.3], dropped=DropMask(4, (2,)))
    third = make_scores([None, 0.6, None, 0.5], dropped=DropMask(4, (0, 2)))
    model = FakeModel([second, third])
    selection = iterative(first, model, Ranked("attention", 3))
    assert selection.mask == DropMask(4, (2, 0, 1))
    assert model.asked == [DropMask(4, (2,)), DropMask(4, (2, 0))]
    assert selection.method == "attention 3 by importance, scored anew after each drop"
    assert selection.notes == ()


@pytest.mark.parametrize(
    ("method", "mask"),
    [
        (Ranked("mlp", 2), DropMask(3, (), (0, 1))),
        (Ranked("blocks", 2), DropMask(3, (2, 0), (2, 0))),
        (Ranked("joint", 2), DropMask(3, (1,), (0,))),
    ],
)
def test_iterative_drops_mlps_blocks_and_both(method, mask):
    first = make_scores([0.2, 0.3, 0.1], [0.8, 0.5, 0.3], [0.2, 0.1, 0.3])
    second = make_scores([0.2, 0.9, 0.1], [0.4, 0.6, 0.5], [0.3, 0.2, 0.9])
    assert iterative(first, FakeModel([second]), method).mask == mask


def test_iterative_respects_protect_and_goes_through_methods_in_turn():
    scores = make_scores([0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9])
    model = FakeModel([scores] * 3)
    selection = iterative(scores, model, Ranked("attention", 2), Ranked("mlp", 2), protect=(layer for layer in (3, 0)))
    assert selection.mask == DropMask(4, (1, 2), (2, 1))
    assert len(model.asked) == 3
    assert selection.method == (
        "attention 2 by importance + mlp 2 by importance, scored anew after each drop, protecting 0, 3"
    )


def test_iterative_refuses_before_the_first_pass():
    model = FakeModel([])
    with pytest.raises(MaskError, match="attention is 4; expected 1 to 3"):
        iterative(make_scores([0.5] * 4), model, Ranked("attention", 4))
    assert model.asked == []


def test_iterative_tells_padding_but_drops_by_importance():
    """7 full and 6 sliding layers: dropping a full one would remove all padding, at no cost."""
    scores = make_scores([0.9] * 13, kv_groups=[SLIDING] * 6 + [FULL] * 7)
    selection = iterative(scores, FakeModel([]), Ranked("attention", 1))
    assert selection.mask.attention == (0,)
    assert selection.notes == ("KV cache stored as 14 layers for 12: 2 layers (17%) of padding",)
    assert select(scores, Ranked("attention", 1)).mask.attention == (6,)


def test_iterative_tells_once_that_the_last_attention_stays():
    scores = make_scores([0.9] * 3)
    selection = iterative(scores, FakeModel([scores] * 3), Ranked("joint", 4))
    assert selection.mask == DropMask(3, (0, 1), (0, 1))
    assert selection.notes == ("attention of layer 2 stays, though it was its turn: vLLM needs one",)
