"""Pipeline stages by remaining attention: KV cache first, compute second, never a stage without attention."""

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.distributed.utils import get_pp_indices

from llmdrop_vllm import DropMask, MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import kv_layout, stage_values
from llmdrop_vllm.serving.pipeline import LayerCost, partition, stage_attention

# Llama-2-70B in bf16: 64 heads and 8 key/value heads of 128, hidden 8192, FFN 28672.
LLAMA_2_70B = LayerCost(2 * 8192 * (2 * 64 + 2 * 8) * 128, 2 * 3 * 8192 * 28672)
PUBLISHED_70B = DropMask(80, (22, 30, 32, 36, 43, *range(45, 80)))
KV_BYTES_PER_SUBLAYER = 2 * 8 * 128 * 2
GIB = 2**30


def tokens_per_gib(mask, sizes):
    return GIB // (max(stage_attention(mask, sizes)) * KV_BYTES_PER_SUBLAYER)


def default_split(num_layers, num_stages):
    bounds = [get_pp_indices(num_layers, rank, num_stages) for rank in range(num_stages)]
    return [end - start for start, end in bounds]


# (stages, tokens per GiB of KV memory on each rank: vLLM's equal split, ours)
@pytest.mark.parametrize(("num_stages", "equal", "ours"), [(2, 7281, 13107), (4, 13107, 26214), (8, 26214, 52428)])
def test_published_llama_2_70b_mask(num_stages, equal, ours):
    """With equal halves, 36 of the 40 attention sublayers that remain sit on the first stage."""
    sizes = partition(PUBLISHED_70B, num_stages, LLAMA_2_70B)
    assert sum(sizes) == 80
    assert stage_attention(PUBLISHED_70B, sizes) == [40 // num_stages] * num_stages
    assert tokens_per_gib(PUBLISHED_70B, default_split(80, num_stages)) == equal
    assert tokens_per_gib(PUBLISHED_70B, sizes) == ours


def test_weights_count_where_they_share_the_memory():
    """40 MLPs without attention on the last stage leave its 80 GiB no room: the KV-only split would not even load."""
    memory = 0.92 * 80 * GIB
    blind, sizes = (partition(PUBLISHED_70B, 2, LLAMA_2_70B, memory_bytes) for memory_bytes in (math.inf, memory))

    def kv_tokens(sizes):
        free = []
        for start, size in ((0, sizes[0]), (sizes[0], sizes[1])):
            attention = sum(start <= layer < start + size for layer in PUBLISHED_70B.kept_attention)
            weights = attention * LLAMA_2_70B.attention_bytes + size * LLAMA_2_70B.mlp_bytes
            free.append((memory - weights) / (attention * KV_BYTES_PER_SUBLAYER))
        return min(free)

    assert kv_tokens(blind) < 0
    assert kv_tokens(sizes) == max(kv_tokens([first, 80 - first]) for first in range(1, 44))


def test_layers_that_store_more_count_for_more():
    """Three wide layers come first: by number the halves would be alike, by bytes the first stage holds the most."""
    kinds = tuple(LayerKind("full", 1024 if layer < 3 else 128) for layer in range(8))
    cost = LayerCost(1, 1, kinds)
    assert partition(DropMask(8), 2, cost) == [2, 6]
    assert partition(DropMask(8), 2, LayerCost(1, 1)) == [4, 4]


def test_a_stage_is_as_full_as_its_largest_group():
    """Windows and full attention are stored in groups of their own, which share the stage's blocks."""
    kinds = tuple(LayerKind("sliding", 64, 512) if layer % 2 else LayerKind("full", 64) for layer in range(8))
    values = stage_values(kv_layout(kinds), range(8), 8)
    assert [values(start, end) for start, end in ((0, 8), (0, 4), (0, 1), (1, 3), (4, 4))] == [256, 128, 64, 64, 0]


@st.composite
def problems(draw):
    num_layers = draw(st.integers(2, 9))
    num_stages = draw(st.integers(1, 4))
    gone = st.lists(st.integers(0, num_layers - 1), unique=True, max_size=num_layers)
    memory = draw(st.one_of(st.just(math.inf), st.floats(50, 500)))
    cost = LayerCost(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    return DropMask(num_layers, tuple(draw(gone)), tuple(draw(gone))), num_stages, cost, memory


@settings(deadline=None)
@given(problems())
def test_no_other_partition_is_better(problem):
    """Against every partition there is: none leaves more KV cache, and of those that leave as much none is faster."""
    mask, num_stages, cost, memory = problem
    if len(mask.kept_attention) < num_stages:
        with pytest.raises(MaskError, match=f"remain for {num_stages} pipeline stages"):
            partition(*problem)
        return

    def judge(sizes):
        kv, compute, start = [], [], 0
        for size in sizes:
            layers = range(start, start + size)
            attention = sum(layer not in mask.attention for layer in layers)
            weights = attention * cost.attention_bytes + sum(layer not in mask.mlp for layer in layers) * cost.mlp_bytes
            free = 1 if memory == math.inf else memory - weights
            kv.append(-free / attention if attention else math.inf)
            compute.append(weights)
            start += size
        return max(kv), max(compute)

    every = [
        [end - start for start, end in zip((0, *cuts), (*cuts, mask.num_hidden_layers), strict=True)]
        for cuts in combinations(range(1, mask.num_hidden_layers), num_stages - 1)
    ]
    ours = judge(partition(*problem))
    best = min(judge(sizes) for sizes in every)
    assert ours == pytest.approx(best)
    assert ours[0] < math.inf


def test_a_stage_of_recurrent_mixers_alone_is_not_made():
    """vLLM would leave the blocks of its states unaligned."""
    full, state = LayerKind("full", 64), LayerKind("none", 0, state=512)
    kinds = (full, state, state, state, state, state, full, state)
    sizes = partition(DropMask(8), 2, LayerCost(1, 3, kinds))
    assert stage_attention(DropMask(8), sizes, kinds) == [1, 1]
    with pytest.raises(MaskError, match="1 attention sublayers remain for 2 pipeline stages"):
        partition(DropMask(8, attention=(6,)), 2, LayerCost(1, 3, kinds))
