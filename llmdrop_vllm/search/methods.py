"""Ways to look for a mask. Each gives what it stands at as it goes on, so that what is found is there at any time."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from llmdrop_vllm.masks.mask import DropMask
from llmdrop_vllm.search.space import KINDS, Space
from llmdrop_vllm.search.states import GONE, WINDOW, StateSpace
from llmdrop_vllm.search.trials import Loss, Trials

# Of the evolution: masks in a generation, and the share of the answers and of the masks of its first rounds.
OFFSPRING = 16
ROUNDS = ((8, 4), (2, 2))  # one chunk in so many judges; so many are left


def forward(space: Space, trials: Trials, *, beam: int = 1) -> Iterator[Loss]:
    """Greedily one sublayer more, `beam` masks kept at each step: with more than one, a second best now may be the best
    a step later.
    """
    masks = [space.start]
    while candidates := _extended(space, trials, masks):
        best = sorted(candidates)[:beam]
        masks = [each.mask for each in best]
        yield best[0]


def ranked_alone(space: Space, trials: Trials) -> list[tuple[str, int]]:
    """Sublayers that may go, first the one without which alone least is lost."""
    found = sorted(_judged(trials, space.start, space.extended(space.start)))
    return [(kind, layer) for each in found for kind in KINDS for layer in space.added(each.mask, kind)]


def by_states(space: StateSpace, trials: Trials) -> Iterator[tuple[str, Iterator[Loss]]]:
    """Ways by what is lost where one attention alone is gone or sees a window: windows only, drops only, and both."""
    choices = space.choices
    alone = _judged(trials, space.start, (space.mask(dict([choice])) for choice in choices))
    lost = dict(zip(choices, (each.mean for each in alone), strict=True))
    masks = {mask: {*space.states(mask).values()} for mask in space.by_losses(lost)}

    def with_states(*states: str) -> Iterator[Loss]:
        return _judged(trials, space.start, [mask for mask, its in masks.items() if its == {*states}])

    yield "windows only", with_states(WINDOW)
    yield "drops only", with_states(GONE)
    yield "least lost alone", accumulate(with_states(WINDOW, GONE), min)
    if (cheapest := space.cheapest(lost)) is not None:
        yield "least lost for a byte", _judged(trials, space.start, [cheapest])


def backward(space: Space, trials: Trials, start: DropMask) -> Iterator[Loss]:
    """From more than was asked for, one sublayer back at a time: the one that is missed most."""
    mask = start
    while candidates := list(_judged(trials, mask, space.reduced(mask))):
        best = min(candidates)
        mask = best.mask
        yield best


def evolve(space: Space, trials: Trials, parent: DropMask, *, seed: int = 0) -> Iterator[Loss]:
    """From one mask to a better one by swaps at random, as long as there are any (EvoPress, arXiv 2410.14649): many are
    judged on few answers, few on all.
    """
    rng = np.random.default_rng(seed)
    best = trials.on_answers(parent)
    trials.judge.rebase(parent)
    while space.can_swap(best.mask):
        drawn = (space.swapped(best.mask, rng) for _ in range(OFFSPRING))
        masks = list({each.effect: each for each in drawn if space.allows(each)}.values())
        for every, left in ROUNDS:
            losses = sorted(trials.on_answers(each, every) for each in masks)
            masks = [each.mask for each in losses[:left]]
        before, best = best, min([best, *map(trials.on_answers, masks)])
        if best is not before:
            trials.judge.rebase(best.mask)
        yield best


def _extended(space: Space, trials: Trials, masks: Sequence[DropMask]) -> list[Loss]:
    """Each of them by one sublayer, the same mask once."""
    seen: dict[object, Loss] = {}
    for mask in masks:
        fresh = [each for each in space.extended(mask) if each.dropped not in seen]
        seen |= {found.mask.dropped: found for found in _judged(trials, mask, fresh)}
    return list(seen.values())


def _judged(trials: Trials, base: DropMask, masks: Iterable[DropMask]) -> Iterator[Loss]:
    trials.judge.rebase(base)
    return map(trials.on_answers, masks)
