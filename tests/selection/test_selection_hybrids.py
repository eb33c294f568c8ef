"""Which mixers of a hybrid go: by default whichever matter least, attention or recurrent; the last attention stays."""

import pytest

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.selection.orders import Deepest
from llmdrop_vllm.selection.selection import KVBudget, Ranked, select
from tests.selection.scores import make_scores

FULL, STATE = "full", "state 512"
# The recurrent ones matter least, but for layer 4.
HYBRID = make_scores([0.9, 0.8, 0.95, 0.97, 0.1, 0.7], [0.5] * 6, [0.5] * 6, kv_groups=[STATE, FULL] * 3)


def attention_of(*methods, **options):
    return select(HYBRID, *methods, **options).mask.attention


def test_attention_and_recurrent_mixers_are_ranked_together():
    assert attention_of(Ranked("attention", 4, avoid_padding=False)) == (3, 2, 0, 1)


@pytest.mark.parametrize(("mixers", "expected"), [("attention", (3, 1)), ("recurrent", (2, 0))])
def test_only_one_kind_may_be_let_go(mixers, expected):
    selection = select(HYBRID, Ranked("attention", 2, avoid_padding=False), mixers=mixers)
    assert selection.mask.attention == expected
    assert selection.method.endswith(f", of {mixers} mixers only")


def test_the_last_attention_stays_whatever_recurrent_mixers_are_left():
    assert attention_of(Ranked("attention", 5, Deepest())) == (5, 4, 3, 2, 0)
    with pytest.raises(MaskError, match="2 attention sublayers can be dropped"):
        select(HYBRID, Ranked("attention", 3), mixers="attention")


def test_a_kv_budget_takes_attention_only():
    """The state of a recurrent mixer is as large for any number of tokens."""
    assert attention_of(KVBudget.parse("70%")) == (3,)
