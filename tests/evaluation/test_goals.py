"""Masks that meet a goal, against all masks that importance leads to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.evaluation.goals import Wanted, mixes
from llmdrop_vllm.kv_cache.layout import kv_layout
from llmdrop_vllm.selection.candidates import Candidates
from llmdrop_vllm.selection.selection import Ranked, select
from tests.selection.scores import FULL, SLIDING, any_scores


def stored_at_most(scores, share):
    """Of KV cache and of MLPs together, as if an MLP were as large as an attention's cache."""
    full = kv_layout(scores.kinds).token_values

    def value(mask):
        kept = kv_layout([scores.kinds[layer] for layer in mask.kept_attention]).token_values
        return kept / full - len(mask.mlp) / scores.num_hidden_layers

    return Wanted(value, share, "{:.0%}", more_is_better=False)


def whole_masks(scores, stages):
    """For each number of MLPs and of attentions, what importance would drop beside what is gone."""
    mask = scores.dropped
    for mlps in range(mask.num_hidden_layers - len(mask.mlp) + 1):
        for attentions in range(len(mask.kept_attention) - stages + 1):
            asked = [Ranked(kind, count) for kind, count in (("mlp", mlps), ("attention", attentions)) if count]
            yield select(scores, *asked).mask if asked else mask


@given(any_scores(kinds=(FULL, SLIDING)), st.floats(-1, 1), st.data())
def test_the_fewest_attentions_by_number_of_mlps(scores, share, data):
    stages = data.draw(st.integers(1, len(scores.dropped.kept_attention)))
    goal = stored_at_most(scores, share)
    met = {}
    for mask in whole_masks(scores, stages):
        if goal(mask):
            met.setdefault(len(mask.mlp), mask)
    expected = []
    for mask in met.values():  # each with fewer attentions gone than the one before
        if not expected or len(mask.attention) < len(expected[-1].attention):
            expected.append(mask)
    candidates = Candidates(scores, scores.dropped)
    if expected:
        assert mixes(candidates, goal, stages) == expected
    else:
        least = min(map(goal.value, whole_masks(scores, stages)))
        with pytest.raises(MaskError, match=f"at best {least:.0%}, with"):
            mixes(candidates, goal, stages)
