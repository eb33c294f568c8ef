"""Selection: the reference's order from the reference's similarities, and what each method promises on any scores."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import Deepest, LeastImportant, MostImportant, Random
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Ranked, select
from tests.selection.scores import any_scores, make_scores, most
from tests.tiny import golden

CASES = ("llama", "mistral")


def golden_scores(case):
    reference = golden(f"{case}_scores")
    return make_scores(
        reference["attn_similarity"],
        reference["mlp_similarity"],
        reference["block_similarity"],
        [[value for value in row if value is not None] for row in reference["block_similarity_consecutive"]],
    )


KINDS = ("attention", "mlp", "blocks", "joint")
ORDERS = (LeastImportant(), MostImportant(), Deepest(), Deepest(keep_last_layer=True), Random(7))


# The reference's order


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", range(1, 8))
def test_sublayers_go_in_the_order_of_the_reference_similarities(case, count):
    reference, scores = golden(f"{case}_scores"), golden_scores(case)

    def order(key):
        return tuple(sorted(range(8), key=lambda layer: reference[key][layer], reverse=True)[:count])

    attention, mlp, block = order("attn_similarity"), order("mlp_similarity"), order("block_similarity")
    assert select(scores, Ranked("attention", count)).mask == DropMask(8, attention)
    assert select(scores, Ranked("mlp", count)).mask == DropMask(8, mlp=mlp)
    assert select(scores, Ranked("blocks", count)).mask == DropMask(8, block, block)
    both = select(scores, Ranked("attention", count), Ranked("mlp", count))
    assert both.mask == DropMask(8, attention, mlp)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", range(1, 16))
def test_joint_ranks_attention_and_mlp_in_one_list(case, count):
    reference = golden(f"{case}_scores")
    ranked = sorted(
        [(value, "attention", layer) for layer, value in enumerate(reference["attn_similarity"])]
        + [(value, "mlp", layer) for layer, value in enumerate(reference["mlp_similarity"])],
        reverse=True,
    )
    # The last attention sublayer has to stay, and a later MLP takes its turn.
    last = [entry for entry in ranked if entry[1] == "attention"][-1]
    expected = [entry for entry in ranked if entry != last][:count]
    selection = select(golden_scores(case), Ranked("joint", count))
    for sublayers, name in ((selection.mask.attention, "attention"), (selection.mask.mlp, "mlp")):
        assert sublayers == tuple(layer for _, kind, layer in expected if kind == name)
    passed_over = ranked.index(last) < count
    assert selection.notes == (
        (f"attention of layer {last[2]} stays, though it was its turn: vLLM needs one",) if passed_over else ()
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", range(1, 8))
def test_consecutive_takes_the_most_similar_run(case, count):
    column = [row[count - 1] for row in golden(f"{case}_scores")["block_similarity_consecutive"]]
    start = column.index(max(value for value in column if value is not None))
    run = tuple(range(start, start + count))
    assert select(golden_scores(case), Consecutive(count)).mask == DropMask(8, run, run)


def test_a_run_of_n_blocks_is_judged_by_the_gap_n():
    """The reference read column n of its table, where the gap n + 1 stands: it judged a run of n blocks by the run of
    n + 1 from the same layer. Here it chose layers 0-1, because 0-2 are alike, although 2-3 are the best two to drop.
    """
    gaps = [[0.9, 0.80, 0.95, 0.1], [0.9, 0.85, 0.2], [0.9, 0.88], [0.9]]
    scores = make_scores([0.5] * 4, gaps=gaps)
    assert select(scores, Consecutive(2)).mask == DropMask(4, (2, 3), (2, 3))
    assert select(scores, Consecutive(3)).mask == DropMask(4, (0, 1, 2), (0, 1, 2))


# Every order and kind


@settings(deadline=None)
@given(any_scores(), st.sampled_from(KINDS), st.sampled_from(ORDERS), st.data())
def test_a_mask_is_a_prefix_of_the_next_larger_one(scores, kind, order, data):
    old = scores.dropped
    protect = data.draw(st.sets(st.integers(0, scores.num_hidden_layers - 1), max_size=3))
    limit = most(scores, kind, order, protect)
    before = old
    for count in range(1, limit + 1):
        mask = select(scores, Ranked(kind, count, order), protect=protect).mask
        assert mask.attention[: len(before.attention)] == before.attention
        assert mask.mlp[: len(before.mlp)] == before.mlp
        new = len(mask.attention) + len(mask.mlp) - len(before.attention) - len(before.mlp)
        assert new in ((1, 2) if kind == "blocks" else (1,))
        before = mask
    assert before.kept_attention, "vLLM needs one attention sublayer"
    assert not protect & (set(before.attention + before.mlp) - set(old.attention + old.mlp))
    # The limit is the true one: all that is left is protected, spared, or the last attention sublayer.
    spared = protect | ({scores.num_hidden_layers - 1} if order == Deepest(keep_last_layer=True) else set())
    if kind in ("attention", "joint"):
        assert set(before.kept_attention) <= spared or len(before.kept_attention) == 1
    if kind in ("mlp", "joint"):
        assert set(range(scores.num_hidden_layers)) - set(before.mlp) <= spared


@settings(deadline=None)
@given(any_scores())
def test_least_is_the_exact_reverse_order_ties_included(scores):
    already = scores.dropped.mlp
    limit = most(scores, "mlp")
    forwards = select(scores, Ranked("mlp", limit)).mask.mlp[len(already) :]
    backwards = select(scores, Ranked("mlp", limit, MostImportant())).mask.mlp[len(already) :]
    assert backwards == forwards[::-1]


def test_least_drops_the_most_important_first():
    scores = make_scores([0.3, 0.1, 0.4, 0.2], [0.8, 0.9, 0.6, 0.7], [0.4, 0.3, 0.2, 0.1])
    assert select(scores, Ranked("attention", 3, MostImportant())).mask.attention == (1, 3, 0)
    assert select(scores, Ranked("mlp", 4, MostImportant())).mask.mlp == (2, 3, 0, 1)
    assert select(scores, Ranked("blocks", 2, MostImportant())).mask == DropMask(4, (3, 2), (3, 2))


def test_of_equals_attention_goes_before_mlp_and_the_lower_layer_first():
    scores = make_scores([0.5, 0.9, 0.9], [0.9, 0.5, 0.5])
    assert select(scores, Ranked("joint", 2)).mask == DropMask(3, (1, 2))
    assert select(scores, Ranked("joint", 3)).mask == DropMask(3, (1, 2), (0,))


def test_last_goes_deepest_first_and_can_spare_the_very_last_layer():
    scores = make_scores([0.9, 0.1, 0.1, 0.1])
    keep = Deepest(keep_last_layer=True)
    assert select(scores, Ranked("attention", 2, Deepest())).mask.attention == (3, 2)
    assert select(scores, Ranked("attention", 2, keep)).mask.attention == (2, 1)
    assert select(scores, Ranked("mlp", 2, keep)).mask.mlp == (2, 1)
    assert select(scores, Ranked("blocks", 2, keep)).mask == DropMask(4, (2, 1), (2, 1))
    assert select(scores, Ranked("joint", 3, Deepest())).mask == DropMask(4, (3,), (3, 2))


def test_random_is_repeatable_by_its_seed_and_independent_of_what_is_protected():
    scores = make_scores([0.5] * 20)
    masks = [select(scores, Ranked("attention", 10, Random(seed))).mask.attention for seed in range(5)]
    assert masks[0] == select(scores, Ranked("attention", 10, Random(0))).mask.attention
    assert len(set(masks)) == 5
    assert masks[0] == (8, 5, 17, 4, 9, 13, 7, 0, 10, 12), "a seed means the same mask in every release"
    without = select(scores, Ranked("attention", 9, Random(0)), protect=[masks[0][4]]).mask.attention
    assert without == masks[0][:4] + masks[0][5:]


def test_random_attention_and_mlp_are_drawn_independently():
    """One shuffle with one seed would drop attention and MLP of the same layers: blocks, not sublayers."""
    scores = make_scores([0.5] * 20)
    mask = select(scores, Ranked("attention", 10, Random(0)), Ranked("mlp", 10, Random(0))).mask
    assert set(mask.attention) != set(mask.mlp)


# Models that were dropped already


def test_the_mask_extends_the_one_the_scores_were_measured_with():
    dropped = DropMask(4, (2, 1), (3,))
    scores = make_scores([0.5, None, None, 0.9], [0.5, 0.7, 0.6, None], [0.1, 0.3, 0.9, 0.2], dropped=dropped)
    selection = select(scores, Ranked("attention", 1), Ranked("mlp", 2))
    assert selection.mask == DropMask(4, (2, 1, 3), (3, 1, 2))
    assert selection.notes == (
        "extends the mask that the scores were measured with: attention dropped in 2 of 4 layers [1-2], MLP in 1 [3]",
    )
    # A block goes with what it still has.
    assert select(scores, Ranked("blocks", 2)).mask == DropMask(4, (2, 1), (3, 2, 1))
    with pytest.raises(
        MaskError, match=r"attention is 2; expected 1 to 1: 1 attention sublayers can be dropped \(.*2 of"
    ):
        select(scores, Ranked("attention", 2))


def test_consecutive_runs_have_something_to_drop_in_every_block():
    dropped = DropMask(5, (1, 3), (1,))
    scores = make_scores(
        [0.5, None, 0.5, None, 0.5],
        [0.5, None, 0.5, 0.5, 0.5],
        gaps=[[0.1, 0.99, 0.9, 0.9, 0.9], [0.9, 0.98, 0.9, 0.9], [0.1, 0.2, 0.3], [0.1, 0.3], [0.1]],
        dropped=dropped,
    )
    assert select(scores, Consecutive(2)).mask == DropMask(5, (1, 3, 4), (1, 3, 4))
    assert select(scores, Consecutive(2), protect=[4]).mask == DropMask(5, (1, 3, 2), (1, 2, 3))
    with pytest.raises(MaskError, match=r"consecutive is 4; expected 1 to 3: 3 blocks in a row can be dropped"):
        select(scores, Consecutive(4))


# What is refused, and what it is called


@pytest.mark.parametrize(
    ("method", "protect", "message"),
    [
        (
            Ranked("attention", 4),
            (),
            "attention is 4; expected 1 to 3: 3 attention sublayers can be dropped (4 layers; vLLM needs one attention "
            "sublayer)",
        ),
        (
            Ranked("attention", 3),
            (0, 2),
            "expected 1 to 2: 2 attention sublayers can be dropped (4 layers; protected: 0, 2;",
        ),
        (Ranked("mlp", 5), (), "mlp is 5; expected 1 to 4: 4 MLP sublayers can be dropped"),
        (Ranked("blocks", 4), (), "blocks is 4; expected 1 to 3: 3 blocks can be dropped"),
        (Ranked("joint", 8), (), "joint is 8; expected 1 to 7: 7 sublayers can be dropped"),
        (Ranked("attention", 0), (), "attention is 0; expected 1 to 3"),
        (Ranked("attention", -1), (), "attention is -1; expected 1 to 3"),
        (Ranked("attention", True), (), "attention is True; expected 1 to 3"),
        (Ranked("mlp", 1), (0, 1, 2, 3), "mlp is 1; but there is nothing to drop: 0 MLP sublayers"),
        (Consecutive(4), (), "consecutive is 4; expected 1 to 3: 3 blocks in a row can be dropped"),
        (Consecutive(3), (1,), "consecutive is 3; expected 1 to 2"),
        (Consecutive(0), (), "consecutive is 0; expected 1 to 3"),
        (Ranked("attention", 1), (4,), "protect names layer 4; the model's 4 layers are 0 to 3"),
        (Ranked("attention", 1), (-1,), "protect names layer -1"),
        (Ranked("attention", 1), (1, 1), "protect names layer 1 twice"),
        (KVBudget(Fraction(1, 4)), (0, 1), "kv budget is 25%; expected at least 50%: 2 attention sublayers can be"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(method, protect, message):
    with pytest.raises(MaskError, match=re.escape(message)):
        select(make_scores([0.5] * 4), method, protect=protect)


def test_asking_for_nothing_is_refused():
    with pytest.raises(MaskError, match="nothing was asked for"):
        select(make_scores([0.5] * 4))


def test_methods_are_limited_by_what_the_ones_before_them_left():
    scores = make_scores([0.5] * 4)
    assert select(scores, Ranked("attention", 2), Ranked("attention", 1)).mask.attention == (0, 1, 2)
    with pytest.raises(MaskError, match="attention is 2; expected 1 to 1"):
        select(scores, Ranked("attention", 2), Ranked("attention", 2))


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ((Ranked("attention", 2),), "attention 2 by importance"),
        ((Ranked("attention", 2), Ranked("mlp", 1)), "attention 2 by importance + mlp 1 by importance"),
        ((Ranked("blocks", 1, MostImportant()),), "blocks 1 by importance, reversed"),
        ((Ranked("attention", 1, Deepest()),), "attention 1 from the last"),
        ((Ranked("attention", 1, Deepest(keep_last_layer=True)),), "attention 1 from the last but one"),
        ((Ranked("joint", 1, Random(3)),), "joint 1 at random, seed 3"),
        ((Consecutive(2),), "consecutive 2 by block similarity"),
        ((KVBudget.parse("37.5%"),), "attention by importance until the KV cache is 37.5%"),
    ],
)
def test_methods_are_named(methods, text):
    assert select(make_scores([0.5] * 8), *methods).method == text
    assert select(make_scores([0.5] * 8), *methods, protect=[5, 0]).method == f"{text}, protecting 0, 5"
