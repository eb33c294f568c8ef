"""How vLLM stores the KV cache of a hybrid model: in groups of equally many layers, padded where a kind falls short.

All layers take the same bytes per token here, so that sizes are counted in layers. vLLM does so for every token that no
sliding window has passed yet; with its hybrid KV cache manager off it groups, and pads, nothing.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Known hybrid models have two kinds of KV cache; the search below tries all ways to share n drops between kinds.
MAX_KINDS = 3


@dataclass(frozen=True)
class KVLayout:
    """Which attention layers vLLM stores together, by their position among the layers that have a KV cache."""

    group_size: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def layers(self) -> int:
        """Attention layers that have a KV cache."""
        return sum(map(len, self.groups))

    @property
    def stored_layers(self) -> int:
        """Layers' worth of memory that a token takes: every group takes as much as a full one."""
        return self.group_size * len(self.groups)

    @property
    def padding_layers(self) -> int:
        """Layers' worth of memory that no layer uses."""
        return self.stored_layers - self.layers

    @property
    def padding_share(self) -> float:
        """Padding as a share of what the layers need."""
        return self.padding_layers / self.layers if self.layers else 0.0

    def describe(self) -> str:
        """For people: `KV cache stored as 34 layers for 30: 4 layers (13%) of padding`."""
        if not self.padding_layers:
            return f"KV cache stored as {self.stored_layers} layers, without padding"
        layers = "1 layer" if self.padding_layers == 1 else f"{self.padding_layers} layers"
        stored = f"KV cache stored as {self.stored_layers} layers for {self.layers}"
        return f"{stored}: {layers} ({self.padding_share:.0%}) of padding"


def kv_layout(kinds: Iterable[str]) -> KVLayout:
    """The layout for attention layers of these kinds, in layer order."""
    positions: dict[str, list[int]] = {}
    for position, kind in enumerate(kinds):
        positions.setdefault(kind, []).append(position)
    size = group_size([len(layers) for layers in positions.values()])
    groups = []
    for layers in positions.values():
        # vLLM deals the layers out in turn, so that each pipeline stage has its share of every group.
        num_groups = math.ceil(len(layers) / size)
        groups += [tuple(layers[first::num_groups]) for first in range(num_groups)]
    return KVLayout(size, tuple(groups))


def group_size(counts: Collection[int]) -> int:
    """Layers per group for so many layers of each kind (vLLM 0.32, `_get_kv_cache_groups_uniform_page_size`)."""
    counts = [count for count in counts if count]
    if not counts:
        return 0
    return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)


def stored_layers(counts: Collection[int]) -> int:
    """`KVLayout.stored_layers` for so many layers of each kind."""
    size = group_size(counts)
    return sum(math.ceil(count / size) * size for count in counts if count)


def cheapest_without_padding(
    costs: Mapping[str, Sequence[float]], kept: Mapping[str, int], count: int, tolerance: float
) -> dict[str, int]:
    """How many layers of each kind to drop, `count` in all, so that what is kept is stored in the fewest layers.

    `costs`: the importance of each layer that may go, per kind, ascending; `kept`: layers of each kind that the model
    has. Only choices whose summed importance is at most `tolerance` (a share) above the cheapest one's are considered;
    of equals the cheapest wins. With more than MAX_KINDS kinds, the cheapest choice is returned, padded or not.
    """
    kinds = sorted(costs)
    ranked = sorted((cost, kind) for kind in kinds for cost in costs[kind])[:count]
    if len(kinds) > MAX_KINDS:
        cheapest = Counter(kind for _, kind in ranked)
        return {kind: cheapest[kind] for kind in kinds}
    base = math.fsum(cost for cost, _ in ranked)
    limit = base + tolerance * abs(base)

    def rank(choice: tuple[int, ...]) -> tuple[int, float, tuple[int, ...]]:
        left = Counter(kept)
        left.subtract(dict(zip(kinds, choice, strict=True)))
        return stored_layers(left.values()), summed(choice), choice

    def summed(choice: tuple[int, ...]) -> float:
        return math.fsum(cost for kind, n in zip(kinds, choice, strict=True) for cost in costs[kind][:n])

    choices = _shares([len(costs[kind]) for kind in kinds], count)
    best = min((choice for choice in choices if summed(choice) <= limit), key=rank)
    return dict(zip(kinds, best, strict=True))


def _shares(limits: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as a sum with one term for each limit."""
    if not limits:
        if total == 0:
            yield ()
        return
    for first in range(min(limits[0], total) + 1):
        for rest in _shares(limits[1:], total - first):
            yield first, *rest
