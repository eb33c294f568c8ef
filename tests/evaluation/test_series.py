import pytest

from llmdrop_vllm import DropMask
from llmdrop_vllm.errors import InputError
from llmdrop_vllm.evaluation.records import mask_id
from llmdrop_vllm.evaluation.series import DEFAULT_SERIES, default_counts, make_series
from llmdrop_vllm.selection.orders import Deepest, Random
from llmdrop_vllm.selection.selection import Consecutive, Ranked, select
from tests.selection.scores import make_scores

ATTENTION = [0.90, 0.91, 0.95, 0.99, 0.98, 0.97, 0.96, 0.92]
MLP = [0.5, 0.6, 0.7, 0.94, 0.93, 0.8, 0.81, 0.4]
SCORES = make_scores(ATTENTION, MLP)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("attention", Ranked("attention", 3)),
        ("joint", Ranked("joint", 3)),
        ("consecutive", Consecutive(3)),
        ("last-but-one", Ranked("attention", 3, Deepest(keep_last_layer=True))),
        ("last/blocks", Ranked("blocks", 3, Deepest())),
    ],
)
def test_a_series_has_the_masks_that_select_chooses(name, method):
    (series,), masks = make_series(SCORES, [name], [1, 3])
    assert series.counts == (1, 3)
    assert masks[series.masks[1]] == select(SCORES, method).mask


def test_random_gives_one_series_per_seed():
    series, masks = make_series(SCORES, ["random:2"], [2])
    assert [each.name for each in series] == ["random 0", "random 1"]
    for seed, each in enumerate(series):
        assert masks[each.masks[0]] == select(SCORES, Ranked("attention", 2, Random(seed))).mask


def test_masks_that_two_series_reach_are_one():
    # The least important attention is also the first that the joint list drops.
    series, masks = make_series(SCORES, ["attention", "joint"], [1, 2])
    assert series[0].masks == series[1].masks
    assert len(masks) == 2


def test_every_mask_is_under_its_id():
    series, masks = make_series(SCORES, DEFAULT_SERIES)
    assert all(mask_id(mask) == name for name, mask in masks.items())
    assert {name for each in series for name in each.masks} == masks.keys()
    assert len({each.name for each in series}) == len(series)


def test_counts_that_a_series_cannot_reach_are_left_out():
    (series,), _ = make_series(SCORES, ["attention"], [6, 7, 8])
    assert series.counts == (6, 7)  # vLLM needs one attention


def test_a_series_goes_by_ascending_counts_and_is_there_once():
    (series,), masks = make_series(SCORES, ["attention", "attention"], [3, 1, 3])
    assert series.counts == (1, 3)
    assert [len(masks[name].attention) for name in series.masks] == [1, 3]


def test_default_counts_are_shares_of_the_depth():
    assert default_counts(12) == (1, 2, 3, 4, 6, 8)
    assert default_counts(80) == (7, 13, 20, 27, 40, 53)
    assert default_counts(2) == (1,)


def test_a_model_that_came_with_a_mask_is_dropped_further():
    scores = make_scores([None, *ATTENTION[1:]], MLP, dropped=DropMask(8, attention=(0,)))
    (series,), masks = make_series(scores, ["attention"], [1])
    assert masks[series.masks[0]] == DropMask(8, attention=(0, 3))


@pytest.mark.parametrize(
    ("names", "counts", "message"),
    [
        (["atention"], [1], "atention is unknown; expected attention, mlp"),
        (["last/layers"], [1], "layers is not one of attention"),
        (["random:many"], [1], "random:many is unknown"),
        (["random:0"], [1], "random:0 is unknown"),
        (["mlp"], [9], "none of 9 can be dropped"),
    ],
)
def test_what_cannot_be_made_is_refused(names, counts, message):
    with pytest.raises(InputError, match=message):
        make_series(SCORES, names, counts)
