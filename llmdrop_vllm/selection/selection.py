"""Which sublayers to drop: from scores to a mask in rank order.

A method is a value that picks from what may still go; `select` applies one or several in turn. Counts are of *new*
drops: where the scores come from a model that was dropped already, the mask extends the old one, which comes first.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol, Self

from llmdrop_vllm.artifacts import Scores
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.kv_cache.kinds import LayerKind
from llmdrop_vllm.kv_cache.layout import cheapest_without_padding, kv_layout
from llmdrop_vllm.masks.dialects import check_indices
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.selection.candidates import Candidates, Kind, Mixers, Unit
from llmdrop_vllm.selection.orders import LeastImportant, Order
from llmdrop_vllm.shares import parse_share

Rescoring = Callable[[DropMask], Scores]
SHARES = "expected a share of the full model's KV cache, above 0% and at most 100%, such as 50% or 0.5"


@dataclass(frozen=True)
class Selection:
    """A mask, how it was chosen (for `MaskFile.method`) and what its user should know."""

    mask: DropMask
    method: str
    notes: tuple[str, ...] = ()


class Method(Protocol):
    """One way to choose; `str()` of it says which, for people and for the mask file."""

    def pick(self, candidates: Candidates) -> Candidates:
        """What is left of them. Raises MaskError where there is not enough to choose from."""


@dataclass(frozen=True)
class Ranked:
    """The first `count` attention sublayers, MLP sublayers, blocks, or sublayers of both kinds in one list ("joint").

    `avoid_padding`: where vLLM would pad the KV cache of what stays, attention by importance is chosen by how many of
    each kind of KV cache go instead: the choice that is stored in the fewest layers, as long as the summed importance
    of what goes is at most `padding_tolerance` (a share) above the plain ranking's. Models of one kind never notice.
    """

    kind: Kind
    count: int
    order: Order = LeastImportant()
    avoid_padding: bool = True
    padding_tolerance: float = 0.1

    def __str__(self) -> str:
        return f"{self.kind} {self.count} {self.order}"

    def pick(self, candidates: Candidates) -> Candidates:
        """Without the first `count` in order."""
        units = self.order.arrange(candidates.units(self.kind), candidates.mask.num_hidden_layers)
        candidates.check_count(self.kind, self.count, candidates.available(units))
        picked = candidates.take(units, self.count)
        if self.avoid_padding and self.kind == "attention" and self.order == LeastImportant():
            return _unpadded(candidates, units, picked, self.padding_tolerance)
        passed_over = [unit.layer for unit in units[: len(picked)] if unit not in picked]
        notes = (f"attention of layer {layer} stays, though it was its turn: vLLM needs one" for layer in passed_over)
        return candidates.without(picked, *notes)


@dataclass(frozen=True)
class Consecutive:
    """The `count` blocks in a row over which the residual stream changes least; of equal runs the first one.

    A prefix of the mask is a shorter run from the same start.
    """

    count: int

    def __str__(self) -> str:
        return f"consecutive {self.count} by block similarity"

    def pick(self, candidates: Candidates) -> Candidates:
        """Among the runs in which every block has something to drop."""
        depth = candidates.mask.num_hidden_layers
        longest = max((count for count in range(1, depth + 1) if _runs(candidates, count)), default=0)
        candidates.check_count("consecutive", self.count, longest)
        # Gap g stands in column g - 1: a run of n blocks is the gap n from its first layer.
        similarity = candidates.scores.block_similarity_by_gap
        best = max(_runs(candidates, self.count), key=lambda run: similarity[run[0].layer][self.count - 1])
        return candidates.without(best)


@dataclass(frozen=True)
class KVBudget:
    """As many attention sublayers, by importance, as it takes for the KV cache to be at most `share` of the full one.

    Sizes are what vLLM stores, padding included, for a token that no sliding window has passed.
    """

    share: Fraction
    avoid_padding: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise MaskError(f"kv budget is {_percent(self.share)}; {SHARES}")

    @classmethod
    def parse(cls, text: str, avoid_padding: bool = True) -> Self:
        """From `50%` or `0.5`; a bare `50` or `1` could mean either and is refused."""
        share = parse_share(text)
        if share is None or not 0 < share <= 1:
            raise MaskError(f"kv budget is {text!r}; {SHARES}")
        return cls(share, avoid_padding)

    def __str__(self) -> str:
        return f"attention by importance until the KV cache is {_percent(self.share)}"

    def pick(self, candidates: Candidates) -> Candidates:
        """The smallest number of drops that meets the budget: more of them may be stored in more layers. What stores
        nothing of a token stays: recurrent mixers, and attention that reads another layer's keys and values.
        """
        kinds = candidates.scores.kinds
        readers = {layer for layer, kind in enumerate(kinds) if kind.donor is not None}
        storing = replace(candidates, mixers="attention", protect=candidates.protect | readers)
        smallest = full = kv_layout(kinds).token_values
        most = storing.available(storing.units("attention"))
        for count in range(most + 1):
            ranked = Ranked("attention", count, avoid_padding=self.avoid_padding)
            left = ranked.pick(storing) if count else storing
            stored = left.kv_layout.token_values
            smallest = min(smallest, stored)
            if stored <= self.share * full:
                size = f"KV cache stored as {_in_layers(stored, kinds)} of the full model's {_in_layers(full, kinds)}"
                notes = (*left.notes, f"{size} layers ({_percent(stored / full)})")
                return replace(candidates, mask=left.mask, notes=notes)
        # Rounded up, so that the share it names can be met.
        least = _percent(Fraction(math.ceil(10_000 * smallest / full), 10_000))
        limits = storing.limits("attention", most)
        raise MaskError(f"kv budget is {_percent(self.share)}; expected at least {least}: {limits}")


def select(scores: Scores, *methods: Method, protect: Iterable[int] = (), mixers: Mixers = "all") -> Selection:
    """Apply the methods in turn, each to what the ones before it left; layers of `protect` keep what they have, and of
    a hybrid's mixers only those named may go.
    """
    candidates = _candidates(scores, protect, mixers)
    if not methods:
        raise MaskError("nothing was asked for; expected a number of sublayers or blocks, or a kv budget")
    return _chosen(candidates, methods, " + ".join(map(str, methods)))


def iterative(
    scores: Scores, rescore: Rescoring, *methods: Ranked, protect: Iterable[int] = (), mixers: Mixers = "all"
) -> Selection:
    """Drop one sublayer or block at a time; `rescore` measures the model under the mask so far between two drops.

    Methods follow one another. KV padding is only reported: one drop at a time cannot choose numbers per kind.
    """
    protect = tuple(protect)
    # What cannot be done is refused before the first slow pass.
    select(scores, *methods, protect=protect, mixers=mixers)
    steps = [replace(method, count=1, avoid_padding=False) for method in methods for _ in range(method.count)]
    named = f"{' + '.join(map(str, methods))}, scored anew after each drop"
    return _chosen(_candidates(scores, protect, mixers), steps, named, rescore)


def _unpadded(candidates: Candidates, ranked: Sequence[Unit], plain: Sequence[Unit], tolerance: float) -> Candidates:
    """Without the plain choice, or one of as many layers that vLLM stores in less, with what it costs."""
    before = candidates.without(plain)
    if not before.kv_layout.is_padded:
        return before
    kinds = candidates.scores.kinds
    alike: dict[LayerKind, list[Unit]] = defaultdict(list)
    for unit in ranked:
        alike[kinds[unit.layer]].append(unit)
    costs = {kind: [unit.importance for unit in units] for kind, units in alike.items()}
    numbers = cheapest_without_padding(costs, Counter(candidates.kinds), len(plain), tolerance)
    going = {unit for kind, number in numbers.items() for unit in alike[kind][:number]}
    chosen = [unit for unit in ranked if unit in going]
    after = candidates.without(chosen)
    sizes = [each.kv_layout.token_values for each in (after, before)]
    if sizes[0] == sizes[1]:
        return before
    swap = f"attention is dropped in layers [{_layers(chosen, plain)}] instead of [{_layers(plain, chosen)}]"
    cost = f"importance {_importance(chosen):.4f} instead of {_importance(plain):.4f} in all"
    stored = f"KV cache stored as {' layers instead of '.join(_in_layers(size, kinds) for size in sizes)}"
    return after.without((), f"to avoid padding, {swap} ({cost}): {stored}")


def _in_layers(values: Fraction, kinds: Iterable[LayerKind]) -> str:
    """Numbers per token, in layers that store as much as the widest of the model."""
    return f"{float(values / max(kind.values for kind in kinds)):.4g}"


def _layers(units: Iterable[Unit], others: Sequence[Unit]) -> str:
    return ", ".join(str(unit.layer) for unit in units if unit not in others)


def _importance(units: Iterable[Unit]) -> float:
    return sum(unit.importance for unit in units)


def _runs(candidates: Candidates, count: int) -> list[tuple[Unit, ...]]:
    """Every run of `count` blocks that can go together."""
    blocks = {unit.layer: unit for unit in candidates.units("blocks")}
    starts = (layer for layer in blocks if all(layer + step in blocks for step in range(count)))
    runs = (tuple(blocks[layer + step] for step in range(count)) for layer in starts)
    return [run for run in runs if candidates.available(run) == count]


def _candidates(scores: Scores, protect: Iterable[int], mixers: Mixers) -> Candidates:
    check_indices("protect", protect := tuple(protect), scores.num_hidden_layers)
    return Candidates(scores, scores.dropped, frozenset(protect), mixers)


def _chosen(candidates: Candidates, steps: Iterable[Method], named: str, rescore: Rescoring | None = None) -> Selection:
    """What the steps pick in turn, each from what is left, by new scores of it where they can be had."""
    if before := candidates.mask:
        said = f"extends the mask that the scores were measured with: {before.summary()}"
        candidates = candidates.without((), said)
    for number, step in enumerate(steps):
        if number and rescore is not None:
            candidates = replace(candidates, scores=rescore(candidates.mask))
        candidates = step.pick(candidates)
    if candidates.kv_layout.is_padded:
        candidates = candidates.without((), candidates.kv_layout.describe())
    if candidates.mixers != "all":
        named += f", of {candidates.mixers} mixers only"
    if candidates.protect:
        named += f", protecting {', '.join(map(str, sorted(candidates.protect)))}"
    return Selection(candidates.mask, named, tuple(dict.fromkeys(candidates.notes)))


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.4g}%"
