"""Selection by what the KV cache takes: budgets, and hybrid models whose cache vLLM would pad."""

import re
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import kv_layout
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import Deepest, MostImportant, Random
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Ranked, select
from tests.selection.scores import FULL, SLIDING, any_scores, make_scores, most


@pytest.mark.parametrize(
    ("text", "count"),
    [("50%", 4), ("0.5", 4), ("50 %", 4), ("49.9%", 5), ("100%", 0), ("1.0", 0), (".25", 6), ("12.5%", 7)],
)
def test_a_kv_budget_takes_as_many_attention_sublayers_as_it_needs(text, count):
    scores = make_scores([0.2, 0.4, 0.1, 0.8, 0.3, 0.7, 0.5, 0.6])
    selection = select(scores, KVBudget.parse(text))
    assert selection.mask.attention == (select(scores, Ranked("attention", count)).mask.attention if count else ())
    assert f"KV cache stored as {8 - count} of the full model's 8 layers ({(8 - count) * 12.5:g}%)" in selection.notes


def test_a_budget_is_exact():
    """0.29 * 100 is less than 29 in floating point, and one layer too many would go."""
    scores = make_scores([0.5] * 100)
    assert len(select(scores, KVBudget.parse("29%")).mask.attention) == 71
    assert len(select(scores, KVBudget.parse("0.29")).mask.attention) == 71


@pytest.mark.parametrize(
    "text",
    ["0%", "0.0", "100.1%", "1.5", "50", "1", "-50%", "half", "", "%", "5e1%", "50%%", "nan", "50  %", " 50%", "٥٠%"],
)
def test_a_budget_that_is_no_share_is_refused(text):
    with pytest.raises(
        MaskError, match=f"kv budget is {re.escape(repr(text))}; expected a share .* such as 50% or 0.5"
    ):
        KVBudget.parse(text)


@pytest.mark.parametrize("share", [Fraction(0), Fraction(3, 2)])
def test_a_budget_made_of_a_number_is_checked_too(share):
    with pytest.raises(MaskError, match="expected a share of the full model's KV cache"):
        KVBudget(share)


def test_a_budget_that_cannot_be_met_names_the_least_one_that_can():
    scores = make_scores([0.5] * 30)
    with pytest.raises(
        MaskError, match=r"kv budget is 3%; expected at least 3.34%: 29 attention sublayers can be dropped"
    ):
        select(scores, KVBudget.parse("3%"))
    assert len(select(scores, KVBudget.parse("3.34%")).mask.attention) == 29


def test_a_budget_is_of_the_full_model_not_of_what_is_left():
    scores = make_scores([None, 0.5, 0.6, 0.7], dropped=DropMask(4, (0,)))
    assert select(scores, KVBudget.parse("75%")).mask.attention == (0,)
    assert select(scores, KVBudget.parse("50%")).mask.attention == (0, 3)


def hybrid_scores(full_importance, sliding_importance, pairs=6):
    """Full and sliding layers in turn; within a kind, each layer is a little more important than the one before."""
    attention = []
    for pair in range(pairs):
        attention += [1 - full_importance - pair / 1000, 1 - sliding_importance - pair / 1000]
    return make_scores(attention, kv_groups=[FULL, SLIDING] * pairs)


def test_a_budget_of_a_hybrid_model_counts_padding():
    """With 2 of 6 full layers gone, 4 full and 6 sliding layers are stored as 4 + 8: nothing saved so far."""
    scores = hybrid_scores(0.1, 0.5)
    selection = select(scores, KVBudget.parse("90%"))
    assert selection.mask.attention == (0, 2, 4)
    assert selection.notes == ("KV cache stored as 9 of the full model's 12 layers (75%)",)
    # Where sliding layers cost little more, two are enough.
    assert select(hybrid_scores(0.1, 0.105), KVBudget.parse("90%")).mask.attention == (0, 1)
    assert select(hybrid_scores(0.1, 0.105), KVBudget.parse("90%", avoid_padding=False)).mask.attention == (0, 2, 4)


def test_a_budget_that_cannot_be_met_counts_that_dropping_can_store_more():
    """5 full and 10 sliding layers are stored as 15; 4 and 10 as 4 + 12."""
    scores = make_scores([0.5] * 15, kv_groups=[FULL] * 5 + [SLIDING] * 10)
    with pytest.raises(
        MaskError, match="kv budget is 99%; expected at least 100%: 1 attention sublayers can be dropped"
    ):
        select(scores, KVBudget.parse("99%"), protect=range(1, 15))


def test_a_swap_that_removes_padding_at_little_cost_is_made_and_told():
    selection = select(hybrid_scores(0.1, 0.105), Ranked("attention", 2))
    assert selection.mask.attention == (0, 1)
    assert selection.notes == (
        "to avoid padding, attention is dropped in layers [1] instead of [2] (importance 0.2050 instead of 0.2010 in "
        "all): KV cache stored as 10 layers instead of 12",
    )


@pytest.mark.parametrize(
    "method", [Ranked("attention", 2, avoid_padding=False), Ranked("attention", 2, padding_tolerance=0.01)]
)
def test_a_swap_that_is_not_wanted_or_too_dear_leaves_padding_that_is_told(method):
    selection = select(hybrid_scores(0.1, 0.105), method)
    assert selection.mask.attention == (0, 2)
    assert selection.notes == ("KV cache stored as 12 layers for 10: 2 layers (20%) of padding",)


@pytest.mark.parametrize(("order", "layers"), [(MostImportant(), (10, 8)), (Random(1), (1, 3))])
def test_controls_are_never_swapped(order, layers):
    selection = select(hybrid_scores(0.105, 0.1), Ranked("attention", 2, order, padding_tolerance=10))
    assert selection.mask.attention == layers
    assert selection.notes == ("KV cache stored as 12 layers for 10: 2 layers (20%) of padding",)


@pytest.mark.parametrize(
    "method",
    [
        Ranked("blocks", 2, Deepest()),
        Ranked("attention", 1, Deepest()),
        Ranked("joint", 1),
        Consecutive(1),
        Ranked("attention", 1, Random(0)),
    ],
)
def test_every_method_tells_what_padding_costs(method):
    selection = select(hybrid_scores(0.1, 0.3), method)
    layout = kv_layout([LayerKind.parse((FULL, SLIDING)[layer % 2]) for layer in selection.mask.kept_attention])
    assert selection.notes == ((layout.describe(),) if layout.is_padded else ())


@settings(deadline=None)
@given(any_scores(kinds=(FULL, SLIDING)), st.sampled_from([0.0, 0.1, 1.0]), st.data())
def test_no_mask_of_as_many_within_the_tolerance_is_stored_in_fewer_layers(scores, tolerance, data):
    protect = data.draw(st.sets(st.integers(0, scores.num_hidden_layers - 1), max_size=2))
    limit = most(scores, "attention", protect=protect)
    if not limit:
        return
    count = data.draw(st.integers(1, limit))
    plain = select(scores, Ranked("attention", count, avoid_padding=False), protect=protect).mask
    chosen = select(scores, Ranked("attention", count, padding_tolerance=tolerance), protect=protect).mask
    old = scores.dropped.attention

    def new(mask):
        return mask.attention[len(old) :]

    def stored(gone):
        kept = (layer for layer in range(scores.num_hidden_layers) if layer not in {*old, *gone})
        return kv_layout([LayerKind.parse(scores.kv_groups[layer]) for layer in kept]).token_values

    def cost(gone):
        return sum(1 - scores.similarity.attention[layer] for layer in gone)

    free = [layer for layer in range(scores.num_hidden_layers) if layer not in {*old, *protect}]
    # Room for rounding on either side of the limit.
    bound = cost(new(plain)) + tolerance * abs(cost(new(plain)))
    assert not protect & set(new(chosen))
    assert cost(new(chosen)) <= bound + 1e-9
    best = min(
        stored(gone) for gone in combinations(free, count) if cost(gone) <= bound - 1e-9 or set(gone) == {*new(plain)}
    )
    assert stored(new(chosen)) <= best
    assert sorted(new(chosen), key=lambda layer: -scores.similarity.attention[layer]) == list(new(chosen))
    if stored(new(plain)) == stored(new(chosen)):
        assert chosen == plain, "a swap that saves nothing is not made"
