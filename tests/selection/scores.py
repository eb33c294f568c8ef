"""Scores that say only what selection reads."""

import json
import re
from dataclasses import asdict

import pytest
from hypothesis import strategies as st

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.orders import LeastImportant
from llmdrop_vllm.selection.selection import Ranked, select

FULL, SLIDING = "full", "sliding 4096"


def make_scores(attention, mlp=None, block=None, gaps=None, kv_groups=None, dropped=None):
    """By default, all that is not given is alike, and the model is whole and of one kind."""
    depth = len(attention)
    block = block or [0.5] * depth
    nothing = [None] * depth
    sublayer = {"magnitude_ratio": nothing, "token_cosine_before": nothing, "token_cosine_after": nothing}
    return Scores.model_validate_json(
        json.dumps(
            {
                "num_hidden_layers": depth,
                "similarity": {"attention": attention, "mlp": mlp or [0.5] * depth, "block": block},
                "block_similarity_by_gap": gaps or [[block[i]] * (depth - i) for i in range(depth)],
                "gap_tokens": 1,
                "diagnostics": {
                    "attention": sublayer | {"concentration": nothing, "first_token": nothing},
                    "mlp": sublayer,
                },
                "kv_groups": kv_groups or [FULL] * depth,
                "dropped": asdict(dropped or DropMask(depth)),
                "provenance": {"model": {"path": "m", "architecture": "a", "fingerprint": "f"}},
            }
        )
    )


@st.composite
def any_scores(draw, kinds=(FULL,)):
    """Scores of 2 to 10 layers, some of them dropped already, at least one attention left; ties do occur."""
    depth = draw(st.integers(2, 10))
    value = st.one_of(st.floats(-1, 1), st.sampled_from([0.5, 0.75]))
    values = st.lists(value, min_size=depth, max_size=depth)
    some = st.lists(st.integers(0, depth - 1), unique=True, max_size=depth // 2)
    dropped = DropMask(depth, draw(some), draw(some))
    attention, mlp = (
        [None if layer in gone else number for layer, number in enumerate(draw(values))] for gone in dropped.dropped
    )
    kv_groups = draw(st.lists(st.sampled_from(kinds), min_size=depth, max_size=depth))
    return make_scores(attention, mlp, draw(values), kv_groups=kv_groups, dropped=dropped)


def most(scores, kind, order=LeastImportant(), protect=()):  # noqa: B008 - a frozen value
    """The largest number that can be dropped, as the error message says it."""
    with pytest.raises(MaskError) as caught:
        select(scores, Ranked(kind, 1000, order), protect=protect)
    return int(re.search(r"(\d+) (?:\w+ )?(?:sublayers|blocks) can be dropped", str(caught.value))[1])
