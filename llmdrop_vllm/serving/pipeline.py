"""Pipeline stages for a dropped model: KV capacity is the minimum over stages, so attention must be balanced."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import kv_layout, stage_values
from llmdrop_vllm.masks.mask import DropMask


@dataclass(frozen=True)
class LayerCost:
    """Weights of one attention and one MLP sublayer, in bytes on one rank; decoding reads them once per step.

    `kinds` say what each decoder layer's attention stores, all alike where nothing is said.
    """

    attention_bytes: float
    mlp_bytes: float
    kinds: tuple[LayerKind, ...] = ()


def partition(mask: DropMask, num_stages: int, cost: LayerCost, memory_bytes: float = math.inf) -> list[int]:
    """Layers per pipeline stage: as much KV cache as possible first, then the fastest slowest stage.

    memory_bytes: what a stage has for weights and KV cache together; infinite where the KV cache has memory of its own.
    Every stage keeps at least one attention sublayer, for vLLM cannot run one without; recurrent mixers do not count.
    Raises MaskError where there are fewer attention sublayers than stages.
    """
    num_layers = mask.num_hidden_layers
    kinds = cost.kinds or (LayerKind("full"),) * num_layers
    attention = {layer for layer in mask.kept_attention if kinds[layer].values}
    if len(attention) < num_stages:
        raise MaskError(
            f"{len(attention)} attention sublayers remain for {num_stages} pipeline stages; every stage "
            f"needs one: drop less or use --pipeline-parallel-size {len(attention)} or less"
        )
    layout = kv_layout([kinds[layer] for layer in mask.kept_attention])
    stored_in = stage_values(layout, mask.kept_attention, num_layers)

    @cache
    def weights_in(start: int, end: int) -> float:
        kept_attention, kept_mlp = (len({*range(start, end)} - gone) for gone in mask.dropped)
        return kept_attention * cost.attention_bytes + kept_mlp * cost.mlp_bytes

    @cache
    def kv_cost(start: int, end: int) -> float:
        """Lower is better: the negative of the memory for each number that the stage stores per token."""
        if attention.isdisjoint(range(start, end)):
            return math.inf
        stored = stored_in(start, end)
        return stored if memory_bytes == math.inf else -(memory_bytes - weights_in(start, end)) / stored

    best_kv = max(kv_cost(start, end) for start, end in _best_split(num_layers, num_stages, kv_cost))

    def compute_cost(start: int, end: int) -> float:
        return weights_in(start, end) if kv_cost(start, end) <= best_kv else math.inf

    return [end - start for start, end in _best_split(num_layers, num_stages, compute_cost)]


def stage_attention(mask: DropMask, layers_per_stage: list[int], kinds: Sequence[LayerKind] = ()) -> list[int]:
    """How many attention sublayers each stage of a partition has; `kinds` tell which mixers are recurrent, if any."""
    attention = [layer for layer in mask.kept_attention if not kinds or kinds[layer].values]
    stages = pairwise(accumulate(layers_per_stage, initial=0))
    return [sum(start <= layer < end for layer in attention) for start, end in stages]


def _best_split(num_layers: int, num_stages: int, cost: Callable[[int, int], float]) -> tuple[tuple[int, int], ...]:
    """Contiguous stages whose largest cost is smallest; of equals, those with the smallest sum of squares."""

    @cache
    def best(count: int, end: int) -> tuple[float, float, tuple[tuple[int, int], ...]]:
        """Of the layers before `end`, in so many stages: the largest cost, the sum of squares, and the stages."""
        if count == 1:
            its = cost(0, end)
            return its, its * its, ((0, end),)
        found = []
        for begin in range(count - 1, end):
            (worst, squares, stages), its = best(count - 1, begin), cost(begin, end)
            found.append((max(worst, its), squares + its * its, (*stages, (begin, end))))
        return min(found, key=lambda candidate: candidate[:2])

    return best(num_stages, num_layers)[2]
