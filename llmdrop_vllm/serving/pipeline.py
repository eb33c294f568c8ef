"""Pipeline stages for a dropped model: KV capacity is the minimum over stages, so attention must be balanced."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import kv_layout, stage_values
from llmdrop_vllm.masks.mask import DropMask

StageCost = Callable[[int, int], float]


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
    layers = range(mask.num_hidden_layers)
    kinds = cost.kinds or (LayerKind("full"),) * len(layers)
    attention = [layer for layer in mask.kept_attention if kinds[layer].values]
    if len(attention) < num_stages:
        raise MaskError(
            f"{len(attention)} attention sublayers remain for {num_stages} pipeline stages; every stage "
            f"needs one: drop less or use --pipeline-parallel-size {len(attention)} or less"
        )
    no_attention, no_mlp = mask.dropped
    with_keys = [*accumulate((layer in attention for layer in layers), initial=0)]
    kept_attention = [*accumulate((layer not in no_attention for layer in layers), initial=0)]
    kept_mlp = [*accumulate((layer not in no_mlp for layer in layers), initial=0)]
    layout = kv_layout([kinds[layer] for layer in mask.kept_attention])
    stored_in = stage_values(layout, mask.kept_attention, len(layers))

    def attention_in(start: int, end: int) -> int:
        return kept_attention[end] - kept_attention[start]

    def weights_in(start: int, end: int) -> float:
        return attention_in(start, end) * cost.attention_bytes + (kept_mlp[end] - kept_mlp[start]) * cost.mlp_bytes

    def kv_cost(start: int, end: int) -> float:
        """Lower is better: the negative of the memory for each number that the stage stores per token."""
        stored = stored_in(start, end)
        if with_keys[end] == with_keys[start]:
            return math.inf
        return stored if memory_bytes == math.inf else -(memory_bytes - weights_in(start, end)) / stored

    best_kv = max(kv_cost(start, end) for start, end in _best_split(len(layers), num_stages, kv_cost))

    def compute_cost(start: int, end: int) -> float:
        return weights_in(start, end) if kv_cost(start, end) <= best_kv else math.inf

    return [end - start for start, end in _best_split(len(layers), num_stages, compute_cost)]


def stage_attention(mask: DropMask, layers_per_stage: list[int], kinds: Sequence[LayerKind] = ()) -> list[int]:
    """How many attention sublayers each stage of a partition has; `kinds` tell which mixers are recurrent, if any."""
    counts, start = [], 0
    for size in layers_per_stage:
        in_stage = (layer for layer in mask.kept_attention if start <= layer < start + size)
        counts.append(sum(not kinds or kinds[layer].values > 0 for layer in in_stage))
        start += size
    return counts


def _best_split(num_layers: int, num_stages: int, cost: StageCost) -> list[tuple[int, int]]:
    """Contiguous stages whose largest cost is smallest; of equals, those with the smallest sum of squares."""
    best: dict[int, tuple[tuple[float, float], list[tuple[int, int]]]] = {0: ((-math.inf, 0.0), [])}
    for stage in range(1, num_stages + 1):
        extended = {}
        for end in range(stage, num_layers - (num_stages - stage) + 1):
            extended[end] = min(
                (
                    ((max(worst, its), squares + its * its), [*stages, (begin, end)])
                    for begin, ((worst, squares), stages) in best.items()
                    if begin < end
                    for its in (cost(begin, end),)
                ),
                key=lambda candidate: candidate[0],
            )
        best = extended
    return best[num_layers][1]
