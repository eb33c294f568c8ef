"""Attention that goes or sees a window only: what a goal leaves of each layer is looked for, not how many go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from llmdrop_vllm.checkpoints.checkpoint import Checkpoint
from llmdrop_vllm.errors import MaskError
from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import Space

GONE, WINDOW = "gone", "window"
Choice = tuple[int, str]


def takers(checkpoint: Checkpoint, window: int) -> list[int]:
    """Layers that take the window and have none of the mask's. Raises MaskError where none takes it."""
    found, refused = [], MaskError("no layer has attention that takes a window")
    mask = checkpoint.mask
    for layer in mask.kept_attention:
        try:
            checkpoint.under(windowed(mask, [layer], window))
        except MaskError as error:
            refused = error
        else:
            found.append(layer)
    if not found:
        raise refused
    return [layer for layer in found if layer not in dict(mask.windows)]


def windowed(mask: DropMask, layers: Sequence[int], window: int) -> DropMask:
    """With windows there beside those that it has."""
    windows = dict(mask.windows) | dict.fromkeys(layers, window)
    return replace(mask, windows=tuple(windows.items()))


def new_windows(mask: DropMask, start: DropMask) -> tuple[int, ...]:
    """Layers that have a window in a mask, and none in the one that it was made of."""
    return tuple(layer for layer, _ in mask.windows if layer not in dict(start.windows))


@dataclass(frozen=True)
class StateSpace(Space):
    """Masks that meet a goal by attention that goes, or sees a `window` in the layers of `takers`, whatever numbers
    that takes; `stored` are the KV bytes of a request under a mask.
    """

    window: int = 0
    takers: frozenset[int] = frozenset()
    stored: Callable[[DropMask], float] = lambda _: 0

    def is_whole(self, mask: DropMask) -> bool:
        """Whether it meets the goal."""
        return self.meets(mask)

    def allows(self, mask: DropMask) -> bool:
        """None that does not."""
        return self.meets(mask)

    @property
    def choices(self) -> list[Choice]:
        """What may become of a layer's attention."""
        windows = [(layer, WINDOW) for layer in sorted(self.takers.difference(self.protect, self.start.attention))]
        return [*windows, *((layer, GONE) for layer in self.free(self.start, "attention"))]

    def mask(self, states: Mapping[int, str]) -> DropMask:
        """In which this became of the attention of some layers."""
        gone, windows = ([layer for layer, its in states.items() if its == state] for state in (GONE, WINDOW))
        return windowed(replace(self.start, attention=(*self.start.attention, *gone)), windows, self.window)

    def states(self, mask: DropMask) -> dict[int, str]:
        """What a mask made of attention, as `mask` takes it."""
        gone = dict.fromkeys(self.added(mask, "attention"), GONE)
        return gone | dict.fromkeys(new_windows(mask, self.start), WINDOW)

    def by_losses(self, lost: Mapping[Choice, float]) -> Iterator[DropMask]:
        """By what each choice alone loses: as few windows as it takes beside none gone, one, two and so on, until no
        window is needed.
        """
        ranking = sorted(lost, key=lambda choice: lost[choice])
        windows, gone = ([layer for layer, its in ranking if its == state] for state in (WINDOW, GONE))
        for count in range(min(len(gone), self._room) + 1):
            dropped = dict.fromkeys(gone[:count], GONE)
            left = [layer for layer in windows if layer not in dropped]
            masks = (self.mask(dropped | dict.fromkeys(left[:number], WINDOW)) for number in range(len(left) + 1))
            if (found := next(filter(self.meets, masks), None)) is not None:
                yield found
                if WINDOW not in self.states(found).values():
                    break

    def cheapest(self, lost: Mapping[Choice, float]) -> DropMask | None:
        """What meets the goal by the changes that lose least for a byte of a request, each alone; None where they
        come to nothing more before.
        """
        full = self.stored(self.start)
        saved = {choice: full - self.stored(self.mask(dict([choice]))) for choice in lost}
        states: dict[int, str] = {}
        while not self.meets(mask := self.mask(states)):
            may_go = list(states.values()).count(GONE) < self._room
            prices: dict[Choice, float] = {}
            for choice in lost:
                layer, state = choice
                now = layer, states.get(layer, "")
                if (more := saved[choice] - saved.get(now, 0)) > 0 and (may_go or state != GONE):
                    prices[choice] = (lost[choice] - lost.get(now, 0)) / more
            if not prices:
                return None
            layer, state = min(prices, key=lambda choice: prices[choice])
            states[layer] = state
        return mask

    def can_swap(self, mask: DropMask) -> bool:
        """Whether two layers could change what became of them."""
        return bool(self._pairs(self.states(mask)))

    def swapped(self, mask: DropMask, rng: np.random.Generator) -> DropMask:
        """With what became of two layers changed between them, once to three times, at random."""
        states = self.states(mask)
        for _ in range(int(rng.integers(1, 4, size=2).min())):
            pairs = self._pairs(states)
            one, other = pairs[int(rng.integers(len(pairs)))]
            changed = {**states, one: states.get(other, ""), other: states.get(one, "")}
            states = {layer: state for layer, state in changed.items() if state}
        return self.mask(states)

    def _pairs(self, states: Mapping[int, str]) -> list[tuple[int, int]]:
        """Layers unlike each other, each of which may become what the other did."""
        may = {*self.choices, *((layer, "") for layer, _ in self.choices)}
        layers = sorted({layer for layer, _ in may})
        return [
            (one, other)
            for one, other in combinations(layers, 2)
            if (its := states.get(one, "")) != (others := states.get(other, ""))
            and {(one, others), (other, its)} <= may
        ]

    @property
    def _room(self) -> int:
        """How many attentions may go."""
        return len(self.start.kept_attention) - self.stages
