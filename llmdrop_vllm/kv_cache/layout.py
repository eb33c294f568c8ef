"""How vLLM stores the KV cache of a model: in groups of equally many layers, padded where a kind falls short.

vLLM pads for every token that no sliding window has passed yet; with its hybrid KV cache manager off it groups, and
pads, nothing.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, product

from llmdrop_vllm.kv_cache.kinds import LayerKind

BLOCK_TOKENS = 16  # vLLM hands out the KV cache of attention alone in blocks of so many tokens
# Known hybrid models have two kinds of KV cache; the search below tries all ways to share n drops between kinds.
MAX_KINDS = 3


@dataclass(frozen=True)
class KVGroup:
    """Layers that share their blocks, by position among those that have a KV cache.

    A block holds `tokens_ratio` times as many tokens as vLLM's block size says: layers that store less of a token than
    others get longer blocks, so that all blocks are of one size.
    """

    layers: tuple[int, ...]
    kind: LayerKind
    tokens_ratio: int = 1


@dataclass(frozen=True)
class KVLayout:
    """Which attention layers vLLM stores together. `kinds` are those of the layers that have a KV cache, in order."""

    kinds: tuple[LayerKind, ...]
    groups: tuple[KVGroup, ...]

    @property
    def layers(self) -> int:
        """Layers that have keys and values or a state."""
        return sum(bool(kind.values or kind.state) for kind in self.kinds)

    @property
    def recurrent_layers(self) -> int:
        """Those of them that have a state, beside keys and values or in place of them."""
        return sum(bool(kind.state) for kind in self.kinds)

    @cached_property
    def page_values(self) -> tuple[int, ...]:
        """Numbers that each layer stores per token of vLLM's block size: with several groups, all alike."""
        widest = max((kind.values for kind in self.kinds), default=0)
        return tuple(kind.values for kind in self.kinds) if len(self.groups) == 1 else (widest,) * len(self.kinds)

    @cached_property
    def block_values(self) -> int:
        """Numbers in a block, per token of vLLM's block size: every group's block takes as much as the largest."""
        return max((sum(self.page_values[layer] for layer in group.layers) for group in self.groups), default=0)

    @property
    def token_values(self) -> Fraction:
        """Numbers that a token takes in the KV cache, padding included, before any window has passed it."""
        grow = (group for group in self.groups if group.kind.values)  # a state takes as much for any number of tokens
        return sum((Fraction(self.block_values, group.tokens_ratio) for group in grow), Fraction(0))

    @property
    def padding_share(self) -> float:
        """Padding as a share of what the layers need."""
        needed = sum(kind.values for kind in self.kinds)
        return float(self.token_values / needed) - 1 if needed else 0.0

    @property
    def is_padded(self) -> bool:
        """Whether a token takes more than the layers need."""
        return self.token_values > sum(kind.values for kind in self.kinds)

    def token_bytes(self, value_bytes: int) -> int:
        """Bytes that a token takes, with so many for each number."""
        return int(self.token_values * value_bytes)

    def request_blocks(self, context: int, block_tokens: int, in_flight: int = 0) -> int:
        """Blocks that vLLM keeps ready for a request of `context` tokens, `in_flight` of which are computed together.

        A window may begin within a block, so there is one more for each group that has one.
        """
        return sum(
            group.kind.state_blocks
            if group.kind.state
            else -(-group.kind.tokens_held(context, in_flight) // (block_tokens * group.tokens_ratio))
            + group.kind.begins_anywhere
            for group in self.groups
        )

    @property
    def block_tokens(self) -> int:
        """vLLM's block size: a block must have room for a state."""
        widest = max((kind.values for kind in self.kinds), default=0)
        state = max((kind.state for kind in self.kinds), default=0)
        return BLOCK_TOKENS * max(1, -(-state // (BLOCK_TOKENS * widest))) if widest else BLOCK_TOKENS

    def request_bytes(self, context: int, in_flight: int, value_bytes: int) -> int:
        """Bytes that vLLM keeps ready for a request, as `request_blocks`, with so many for each number."""
        blocks = self.request_blocks(context, self.block_tokens, in_flight)
        return blocks * self.block_tokens * self.block_values * value_bytes

    def describe(self) -> str:
        """For people: `KV cache stored as 34 layers for 30: 4 layers (13%) of padding`."""
        if len(set(self.page_values)) > 1 or any(group.tokens_ratio > 1 for group in self.groups):
            sizes = f"KV cache of {self.layers} layers of different sizes"
            return f"{sizes}, {f'{self.padding_share:.0%} of' if self.is_padded else 'without'} padding"
        if not self.is_padded:
            return f"KV cache stored as {self.layers} layers, without padding"
        padding = round(self.padding_share * self.layers)
        layers = "1 layer" if padding == 1 else f"{padding} layers"
        stored = f"KV cache stored as {self.layers + padding} layers for {self.layers}"
        return f"{stored}: {layers} ({self.padding_share:.0%}) of padding"


def kv_layout(kinds: Sequence[LayerKind]) -> KVLayout:
    """The layout for attention layers of these kinds, in layer order (vLLM 0.32, `get_kv_cache_groups`)."""
    kinds = tuple(kinds)
    positions: dict[LayerKind, list[int]] = {}
    for position, kind in enumerate(kinds):
        for part in kind.parts:
            positions.setdefault(part, []).append(position)
    if len({*map(_slots, positions)}) < 2:
        # Layers that need room for the same tokens make one group, whatever each of them stores.
        storing = tuple(sorted(position for layers in positions.values() for position in layers))
        return KVLayout(kinds, (KVGroup(storing, kinds[storing[0]]),) if storing else ())
    widest = max(kind.values for kind in kinds)
    counts = [len(layers) for layers in positions.values()]
    # Layers per group, by vLLM's `_get_kv_cache_groups_uniform_page_size`.
    size = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for kind, layers in positions.items():
        # vLLM deals the layers out in turn, so that each pipeline stage has its share of every group.
        num_groups = math.ceil(len(layers) / size)
        # Pages that do not divide the widest one are padded up to it.
        ratio = widest // kind.values if kind.values and not widest % kind.values else 1
        groups += [KVGroup(tuple(layers[first::num_groups]), kind, ratio) for first in range(num_groups)]
    return KVLayout(kinds, tuple(groups))


def _slots(kind: LayerKind) -> tuple[str, int | None]:
    """What decides for which tokens a layer needs room."""
    if kind.state:
        return "state", kind.state
    return ("full", None) if kind.span is None else (kind.name, kind.span)


def cheapest_without_padding(
    costs: Mapping[LayerKind, Sequence[float]], kept: Mapping[LayerKind, int], count: int, tolerance: float
) -> dict[LayerKind, int]:
    """How many layers of each kind to drop, `count` in all, so that a token takes least in what is kept.

    `costs`: the importance of each layer that may go, per kind, ascending; `kept`: layers of each kind that the model
    has. Only choices whose summed importance is at most `tolerance` (a share) above the cheapest one's are considered;
    of equals the cheapest wins. With more than MAX_KINDS kinds, the cheapest choice is returned, padded or not.
    """
    kinds = sorted(costs, key=str)
    ranked = sorted((cost, str(kind), kind) for kind in kinds for cost in costs[kind])[:count]
    if len(kinds) > MAX_KINDS:
        cheapest = Counter(kind for *_, kind in ranked)
        return {kind: cheapest[kind] for kind in kinds}
    base = math.fsum(cost for cost, *_ in ranked)
    limit = base + tolerance * abs(base)

    def rank(choice: tuple[int, ...]) -> tuple[Fraction, float, tuple[int, ...]]:
        left = Counter(kept)
        left.subtract(dict(zip(kinds, choice, strict=True)))
        return kv_layout([*left.elements()]).token_values, summed(choice), choice

    def summed(choice: tuple[int, ...]) -> float:
        return math.fsum(cost for kind, n in zip(kinds, choice, strict=True) for cost in costs[kind][:n])

    choices = product(*(range(min(len(costs[kind]), count) + 1) for kind in kinds))
    best = min((choice for choice in choices if sum(choice) == count and summed(choice) <= limit), key=rank)
    return dict(zip(kinds, best, strict=True))


def stage_values(layout: KVLayout, kept: Sequence[int], num_layers: int) -> Callable[[int, int], int]:
    """Numbers in a block on a pipeline stage with the decoder layers from `start` up to `end`, per token.

    `kept` are the decoder layers of the layout's kinds, ascending. Groups are the whole model's; a stage has its own
    layers of each, and blocks as large as its largest group needs.
    """
    sums = []
    for group in layout.groups:
        values = {kept[position]: layout.page_values[position] for position in group.layers}
        sums.append([*accumulate((values.get(layer, 0) for layer in range(num_layers)), initial=0)])
    return lambda start, end: max((values[end] - values[start] for values in sums), default=0)
