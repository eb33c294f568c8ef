"""How vLLM groups and pads the KV cache of hybrid models: our arithmetic against vLLM's own function."""

from collections import Counter
from itertools import combinations
from math import fsum

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import KVLayout, cheapest_without_padding, kv_layout

VALUES = 256  # two heads of 64, keys and values
FULL, SLIDING, SHORT = (LayerKind.parse(text, VALUES) for text in ("full", "sliding 4096", "sliding 128"))
COUNTS = [
    *[(17, 13), (13, 17), (12, 13), (13, 12), (20, 30), (10, 20), (20, 10), (5, 25), (25, 5), (9, 20), (1, 1), (1, 29)],
    *[(30, 0), (0, 30), (1, 0), (2, 3), (3, 4), (8, 11), (8, 12), (8, 13), (7, 10), (7, 11), (4, 21), (48, 16)],
]


def mixed(counts: dict[LayerKind, int]) -> list[LayerKind]:
    """Kinds in an order that deals them out, as hybrid models do."""
    places = [((number + 0.5) / count, str(kind), kind) for kind, count in counts.items() for number in range(count)]
    return [kind for *_, kind in sorted(places)]


def vllm_groups(kinds: list[LayerKind]) -> set[tuple[int, ...]]:
    """Positions of the layers in each of vLLM's groups."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("vllm.v1.core", exc_type=ImportError)
    try:
        from vllm.v1.core import kv_cache_planning as planning
    except ImportError:  # before vLLM 0.33
        from vllm.v1.core import kv_cache_utils as planning
    interface = pytest.importorskip("vllm.v1.kv_cache_interface", exc_type=ImportError)
    common = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    specs = {
        FULL: interface.FullAttentionSpec(**common),
        SLIDING: interface.SlidingWindowSpec(**common, sliding_window=4096),
        SHORT: interface.SlidingWindowSpec(**common, sliding_window=128),
    }
    groups = planning._get_kv_cache_groups_uniform_page_size({str(i): specs[kind] for i, kind in enumerate(kinds)})
    return {tuple(map(int, group.layer_names)) for group in groups}


def groups_of(kinds: list[LayerKind]) -> set[tuple[int, ...]]:
    """Positions of the layers in each of ours."""
    return {group.layers for group in kv_layout(kinds).groups}


def stored_layers(kinds: list[LayerKind]) -> int:
    """Layers' worth of memory that a token takes."""
    return int(kv_layout(kinds).token_values / VALUES)


@pytest.mark.parametrize(("full", "sliding"), COUNTS)
def test_groups_are_those_of_vllm(full, sliding):
    kinds = mixed({FULL: full, SLIDING: sliding})
    assert groups_of(kinds) == vllm_groups(kinds)


@pytest.mark.parametrize("counts", [(4, 4, 4), (3, 5, 7), (6, 7, 8), (1, 9, 12), (10, 15, 14)])
def test_three_kinds_are_grouped_as_vllm_does(counts):
    kinds = mixed(dict(zip((FULL, SLIDING, SHORT), counts, strict=True)))
    assert groups_of(kinds) == vllm_groups(kinds)


@pytest.mark.parametrize(("full", "sliding"), COUNTS)
def test_memory_per_block_is_what_vllm_allocates(full, sliding):
    """vLLM divides its memory into blocks of the largest group's pages, and a token takes a block in every group."""
    kinds = mixed({FULL: full, SLIDING: sliding})
    groups = vllm_groups(kinds)
    assert stored_layers(kinds) == max(map(len, groups)) * len(groups)


@pytest.mark.parametrize(
    ("counts", "size", "stored", "text"),
    [
        ((17, 13), 17, 34, "KV cache stored as 34 layers for 30: 4 layers (13%) of padding"),
        ((12, 13), 13, 26, "KV cache stored as 26 layers for 25: 1 layer (4%) of padding"),
        ((9, 20), 9, 36, "KV cache stored as 36 layers for 29: 7 layers (24%) of padding"),
        ((10, 20), 10, 30, "KV cache stored as 30 layers, without padding"),
        ((30, 0), 30, 30, "KV cache stored as 30 layers, without padding"),
    ],
)
def test_padding_is_said_in_words(counts, size, stored, text):
    kinds = [FULL] * counts[0] + [SLIDING] * counts[1]
    layout = kv_layout(kinds)
    assert (layout.block_values, stored_layers(kinds), layout.describe()) == (size * VALUES, stored, text)


def test_without_attention_nothing_is_stored():
    assert kv_layout([]) == KVLayout((), ())
    assert kv_layout([]).token_values == kv_layout([]).padding_share == 0


@given(st.lists(st.sampled_from([FULL, SLIDING, SHORT]), max_size=40))
def test_every_layer_is_stored_once_and_padding_is_the_rest(kinds):
    layout = kv_layout(kinds)
    assert sorted(position for group in layout.groups for position in group.layers) == list(range(len(kinds)))
    assert all({kinds[position] for position in group.layers} == {group.kind} for group in layout.groups)
    assert stored_layers(kinds) - round(layout.padding_share * len(kinds)) == len(kinds)
    assert layout.is_padded == (stored_layers(kinds) > len(kinds))
    counts = Counter(kinds)
    assert stored_layers(kinds) == stored_layers(list(counts.elements()))


@st.composite
def choices(draw):
    """(kind and cost per layer, how many of them go)."""
    kinds = draw(st.lists(st.sampled_from([FULL, SLIDING, SHORT]), min_size=2, max_size=9))
    # Sixteenths, so that sums are exact and ties do occur.
    costs = [draw(st.integers(-1, 16)) / 16 for _ in kinds]
    return list(zip(kinds, costs, strict=True)), draw(st.integers(1, len(kinds) - 1))


@settings(deadline=None)
@given(choices(), st.sampled_from([0.0, 0.125, 0.5, 10.0]))
def test_no_other_choice_within_the_tolerance_is_stored_in_fewer_layers(choice, tolerance):
    layers, count = choice
    costs = {kind: sorted(cost for k, cost in layers if k == kind) for kind, _ in layers}
    kept = Counter(kind for kind, _ in layers)

    numbers = cheapest_without_padding(costs, kept, count, tolerance)
    found = (
        stored_layers([kind for kind in kept for _ in range(kept[kind] - numbers.get(kind, 0))]),
        fsum(cost for kind, number in numbers.items() for cost in costs[kind][:number]),
    )

    every = list(combinations(range(len(layers)), count))
    cost_of = {gone: fsum(layers[i][1] for i in gone) for gone in every}
    limit = min(cost_of.values()) + tolerance * abs(min(cost_of.values()))
    stored = {gone: stored_layers([kind for i, (kind, _) in enumerate(layers) if i not in gone]) for gone in every}
    assert sum(numbers.values()) == count
    assert found == min((stored[gone], cost_of[gone]) for gone in every if cost_of[gone] <= limit)


def test_importance_below_zero_is_rounding_and_no_harm():
    """A similarity may be measured as 1.00001; a tolerance below the cheapest choice would leave nothing to choose."""
    assert cheapest_without_padding({FULL: [-1e-5], SLIDING: [0.5]}, {FULL: 2, SLIDING: 2}, 1, 0.1) == {
        FULL: 1,
        SLIDING: 0,
    }


def test_many_kinds_are_not_searched():
    """The number of ways to share drops between kinds grows with the power of their number."""
    costs = {LayerKind("sliding", 1, window): [0.1, 0.2 + window, 0.3 + window] for window in range(30)}
    kept = dict.fromkeys(costs, 3) | {LayerKind("sliding", 1, 0): 2}
    numbers = cheapest_without_padding(costs, kept, 31, 0.5)
    assert numbers == dict.fromkeys(costs, 1) | {LayerKind("sliding", 1, 0): 2}
