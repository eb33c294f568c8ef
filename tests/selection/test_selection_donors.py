"""Attention whose keys and values other layers read stays while one of them does, whichever way layers are chosen."""

from dataclasses import replace

import numpy as np
import pytest

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import Space
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.selection import Consecutive, KVBudget, Ranked, select
from tests.selection.scores import make_scores

FULL, WINDOW = "full", "sliding 512"
# Layers 2 and 3 would go first.
SCORES = make_scores(
    [0.2, 0.3, 0.99, 0.98, 0.7, 0.6],
    [0.5] * 6,
    [0.5, 0.5, 0.9, 0.9, 0.6, 0.7],
    kv_groups=[WINDOW, FULL, WINDOW, FULL, "shared 2", "shared 3"],
)
SCORES = SCORES.model_copy(update={"kv_values": (1, 1, 1, 1, 0, 0)})
DONORS = {2, 3}


def picked(*methods, **options):
    return select(SCORES, *methods, **options).mask


def test_it_is_not_ranked():
    assert picked(Ranked("attention", 4)).attention == (4, 5, 1, 0)
    assert picked(Ranked("blocks", 2)).attention == (5, 4)
    assert DONORS.isdisjoint(picked(Ranked("joint", 8, avoid_padding=False)).attention)
    assert DONORS.isdisjoint(picked(Consecutive(2)).attention)
    with pytest.raises(MaskError, match=r"4 attention sublayers can be dropped \(6 layers; read by other layers: 2-3;"):
        picked(Ranked("attention", 5))


def test_a_kv_budget_takes_what_stores_something():
    assert picked(KVBudget.parse("75%")).attention == (1,)


def test_it_may_go_once_nothing_reads_it():
    candidates = Candidates(SCORES, DropMask(6, attention=(4,)))
    assert candidates.donors == {3}
    assert 2 in {unit.layer for unit in candidates.units("attention")}


def test_a_search_does_not_look_at_masks_without_it():
    space = Space(DropMask(6), attention=2, donors=frozenset(DONORS))
    assert {mask.attention for mask in space.extended(DropMask(6))} == {(0,), (1,), (4,), (5,)}
    assert [*space.free(DropMask(6), "mlp")] == [0, 1, 2, 3, 4, 5]
    mask, rng = DropMask(6, attention=(0, 4)), np.random.default_rng(0)
    for _ in range(50):
        mask = space.swapped(mask, rng)
        assert DONORS.isdisjoint(mask.attention)
    with pytest.raises(MaskError, match="5 attention sublayers asked; 4 can go"):
        replace(space, attention=5)
